"""Ratios in one run: the variants take turns, and the median of each is divided by the first's.

Process time on one thread (immune to neighbours on a shared machine), wall time otherwise.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def medians(variants: Mapping[str, Callable[[], object]], rounds: int = 15, warm: int = 2) -> dict[str, float]:
    """Median seconds of each variant, played in turn ``rounds`` times after ``warm`` unmeasured ones."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for play in variants.values():
        for _ in range(warm):
            play()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, play in variants.items():
                start = clock()
                play()
                taken[name].append(clock() - start)
    finally:
        gc.enable()
    return {name: statistics.median(ts) for name, ts in taken.items()}
