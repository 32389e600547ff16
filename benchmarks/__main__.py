"""``make bench``: every ratio in one run, printed and written to benchmarks/results.md with the machine's description."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results.md")
PARTS = {
    "norms": "Norms, forward and backward, over torch's LayerNorm (eager)",
    "weights": "LoRA, forward and backward, over a frozen Linear(1024, 1024)",
    "optimizers": "One optimizer step over torch's fused AdamW (Muons: over torch's Muon)",
    "imports": "`import etude` beside `import torch`",
}


def machine() -> str:
    """The processor, its threads and the versions, on one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def run(part: str) -> list[tuple[str, float, str]]:
    """The rows of one part, measured in a process of its own: one thread, and an allocator that keeps what is freed."""
    keep = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "OMP_NUM_THREADS": "1"}
    code = f"import torch; torch.set_num_threads(1); from benchmarks.{part} import rows; print(repr(rows()))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **keep}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"benchmarks.{part} failed:\n{done.stderr[-2000:]}")
    rows: list[tuple[str, float, str]] = eval(done.stdout.splitlines()[-1], {"__builtins__": {}})
    return rows


def main() -> None:
    """Measure the parts named on the command line, or all, and write the page."""
    chosen = sys.argv[1:] or list(PARTS)
    page = [
        "# Measured", "", f"By `make bench` on {machine()}.", "",
        "Ratios of medians in one run, the variants taking turns; one thread, process time. Smaller is faster.",
    ]  # fmt: skip
    for part in chosen:
        print(f"{PARTS[part]}")
        page += ["", f"## {PARTS[part]}", "", "| what | ratio | |", "|---|---:|---|"]
        for what, ratio, note in run(part):
            print(f"  {what:56s} {ratio:7.2f}  {note}", flush=True)
            page.append(f"| {what} | {ratio:.2f} | {note} |")
    if set(chosen) == set(PARTS):
        RESULTS.write_text("\n".join(page) + "\n", encoding="utf-8")
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
