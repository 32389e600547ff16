"""What ``import etude`` costs beside ``import torch``: whole processes, in turn."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def rows(rounds: int = 7) -> list[tuple[str, float, str]]:
    """(what, ratio to importing torch, seconds)."""
    taken: dict[str, list[float]] = {"torch": [], "torch, etude": []}
    for _ in range(rounds):
        for names, ts in taken.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {names}"], check=True)
            ts.append(time.perf_counter() - start)
    base, both = (statistics.median(ts) for ts in taken.values())
    return [("import torch", 1.0, f"{base:.2f} s"), ("import torch, etude", both / base, f"{both - base:.2f} s more")]
