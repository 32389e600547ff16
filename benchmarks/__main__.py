"""``make bench``: ratios in one run, printed and written to benchmarks/results.md with the machine's description."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from etude.catalogue._choose import between

RESULTS = Path(__file__).with_name("results.md")
README = Path(__file__).parents[1] / "README.md"
PARTS = {
    "norms": ("norms", 1, "Norms, forward and backward, over torch's LayerNorm (eager); one thread, process time"),
    "norms2": ("norms", 2, "Norms, forward and backward, over torch's LayerNorm (eager); two threads, wall time"),
    "image_norms": (
        "image_norms",
        1,
        "Norms of images in training, forward and backward, over torch's BatchNorm2d; one thread, process time",
    ),
    "weights": (
        "weights",
        1,
        "Adapters, forward and backward, over a frozen Linear(1024, 1024); one thread, process time",
    ),
    "orthogonal": (
        "orthogonal",
        1,
        "Orthogonal weights, forward and backward, over a Linear; one thread, process time",
    ),
    "rules": (
        "rules",
        1,
        "One step over torch's fused AdamW (matrix rules: over the fastest Muon); one thread, process time",
    ),
    "rules2": (
        "rules",
        2,
        "One step over torch's fused AdamW (matrix rules: over the fastest Muon); two threads, wall time",
    ),
    "loop": ("loop", 1, "A run of the race over a bare loop; one thread, process time"),
    "population2": (
        "population",
        2,
        "A step of one of many cells trained together, over a loop with torch's fused AdamW; two threads, wall time",
    ),
    "imports": ("imports", 1, "`import etude` beside `import torch`; whole processes, wall time"),
}
"""Part → its file, its threads, its title."""

HIGHLIGHTS = {
    "rules": (
        ("50 large tensors: etude adamw compiled", "50 large tensors: torch AdamW"),
        ("200 small tensors: etude adamw compiled", "200 small tensors: torch AdamW"),
        ("50 large tensors: etude lion compiled", "50 large tensors: timm Lion"),
        ("50 large tensors: etude lamb compiled", "50 large tensors: timm Lamb"),
        ("50 large tensors: etude adafactor compiled", "50 large tensors: timm Adafactor"),
        ("50 large tensors: etude muon compiled", "50 large tensors: torch Muon"),
    ),
    "norms": (
        ("4096×512 rms_norm", "4096×512 torch RMSNorm"),
        ("4096×512 rms_norm, compiled", "4096×512 torch RMSNorm, compiled"),
        ("4096×512 dyt", "4096×512 naive DyT"),
    ),
    "weights": (
        ("2048 rows: lora", "2048 rows: lora, by peft"),
        ("2048 rows: dora", "2048 rows: dora, by peft"),
        ("2048 rows: hra", "2048 rows: hra, by peft"),
    ),
}
"""The rows that the README shows: ours, and what a peer calls the same."""


def machine() -> str:
    """The processor, its threads and the versions, on one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def run(part: str) -> list[tuple[str, float, str]]:
    """The rows of one part, measured in a process of its own, with an allocator that keeps what is freed."""
    file, threads, _ = PARTS[part]
    keep = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    keep["OMP_NUM_THREADS"] = str(threads)
    code = f"import torch; torch.set_num_threads({threads}); from benchmarks.{file} import rows; print(repr(rows()))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **keep}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"benchmarks.{file} failed:\n{done.stderr[-2000:]}")
    rows: list[tuple[str, float, str]] = eval(done.stdout.splitlines()[-1], {"__builtins__": {}, "nan": math.nan})
    return rows


def sections(page: str) -> dict[str, str]:
    """A page's title of each table → the table."""
    found = (x.partition("\n") for x in page.split("\n## ")[1:])
    return {title: table.strip() for title, _, table in found}


def shown(page: str, tables: dict[str, str]) -> str:
    """The README with the highlights of these tables between its marks."""
    start, end = "<!-- how fast: written by `make bench` -->\n", "<!-- end of how fast -->"
    lines = []
    for part, pairs in HIGHLIGHTS.items():
        title = PARTS[part][-1]
        cells = [line.split("|") for line in tables[title].splitlines()]
        ratio = {row[1].strip(): row[2].strip() for row in cells if len(row) > 2}
        lines += [f"| {title} | | a peer | |", "|---|---:|---|---:|"]
        lines += [f"| {a} | {ratio[a]} | {b.partition(': ')[2] or b} | {ratio[b]} |" for a, b in pairs] + [""]
    return between(page, start, "\n".join(lines), end)


def main() -> None:
    """Measure the parts named on the command line, or all, and write them into the page; the others stay."""
    chosen = sys.argv[1:] or list(PARTS)
    tables = sections(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in chosen:
        title = PARTS[part][-1]
        print(title)
        table = ["| what | ratio | |", "|---|---:|---|"]
        for what, ratio, note in run(part):
            print(f"  {what:56s} {ratio:7.2f}  {note}", flush=True)
            table.append(f"| {what} | {ratio:.2f} | {note} |")
        tables[title] = "\n".join(table)
    page = [
        "# Measured", "", f"By `make bench` on {machine()}.", "",
        "Ratios of medians in one run, the variants taking turns. Smaller is faster.",
    ]  # fmt: skip
    for title in (title for *_, title in PARTS.values() if title in tables):
        page += ["", f"## {title}", "", tables[title]]
    RESULTS.write_text("\n".join(page) + "\n", encoding="utf-8")
    README.write_text(shown(README.read_text(encoding="utf-8"), tables), encoding="utf-8")
    print(f"written to {RESULTS}, and what the README shows of it")


if __name__ == "__main__":
    main()
