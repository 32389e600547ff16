"""Plants one bug at a time and demands that the named tests see it: `python tests/mutants.py [words to select by]`.

Each mutant is an edit of one place. A mutant that survives shows a hole in the tests, and so does a test that fails
without any.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORKERS = 2


@dataclass(frozen=True)
class Mutant:
    """``old``, found exactly once in src/etude/``file``, becomes ``new``; ``tests``, under tests/, must fail."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    # the spine: the tie to the paper, the catalogue, the commands
    Mutant("_method.py", "_CITATION.fullmatch(citation)", "_CITATION.match(citation)", "test_method.py"),
    Mutant("_method.py", "bound.apply_defaults()", "pass", "test_method.py"),
    Mutant("_method.py", "stamped.name != self.name", "True", "test_method.py"),
    Mutant("_method.py", "m.name == name and m.fn is of", "m.name == name", "test_method.py"),
    Mutant("_method.py", "_METHODS.values() if m.room in ROOMS]", "_METHODS.values()]", "test_method.py"),
    Mutant("catalogue/_tests.py", "key=len, reverse=True", "key=len", "test_catalogue.py::test_a_test_goes_to_the_longest_name"),
    Mutant("catalogue/_tests.py", 'f"test_{name}_"', 'f"test_{name}"', "test_catalogue.py::test_a_test_goes_to_the_longest_name"),
    Mutant("catalogue/_records.py", "fork_rng(devices=[])", "fork_rng(enabled=False)", "test_catalogue.py::test_reading_the_catalogue_draws_no_random_numbers"),
    Mutant("catalogue/_records.py", "k not in defaults or not", "k in defaults and not", "test_catalogue.py::test_a_value_is_told_by_what_is_not_at_its_default"),
    Mutant("catalogue/_find.py", "len(among) / max(1, ", "len(among) * max(1, ", "test_catalogue.py::test_rare_words_weigh_more"),
    Mutant("catalogue/_find.py", "key=lambda i: -scores[i]", "key=lambda i: scores[i]", "test_catalogue.py::test_rare_words_weigh_more"),
    Mutant("_commands.py", "        return 2\n", "        return 1\n", "test_cli.py::test_bad_input_is_one_line_and_writes_nothing"),
    Mutant("cli.py", "        sys.stdout.flush()\n", "", "test_cli.py::test_a_reader_that_leaves_early_is_no_error"),
    # init
    # weights
    # norms
    # blocks
    # losses
    # risks
    # penalties
    # gradients
    # rules
    # schedules
    # after
    # probes
    # recipes
    # race
]  # fmt: skip


def plant(mutant: Mutant, tree: Path) -> str:
    """Edit one place; returns the text that was there."""
    file = tree / "src" / "etude" / mutant.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file}: {mutant.old!r} stands there {text.count(mutant.old)} times, not once")
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return text


def pytest(tree: Path, tests: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of a copy on the sources of that copy."""
    env = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    named = [str(tree / "tests" / test) for test in tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *more, *named]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=1200)


def copy() -> Path:
    """What the tests need, in a folder of its own."""
    tree = Path(tempfile.mkdtemp(prefix="etude-mutant-"))
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", "tests", "docs", "benchmarks"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tree / folder, ignore=skip)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, tree)
    return tree


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if all(w in f"{m.file} {m.old} {m.tests}" for w in words)]
    if not chosen:
        print(f"no mutant speaks of {' '.join(words)!r}", file=sys.stderr)
        return 2
    trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for _ in range(WORKERS):
        trees.put(copy())
    began = time.monotonic()

    def clean(tests: str) -> str:
        tree = trees.get()
        try:
            done = pytest(tree, tests)
            return "" if done.returncode == 0 else done.stdout + done.stderr
        finally:
            trees.put(tree)

    def caught(mutant: Mutant) -> bool:
        tree = trees.get()
        whole = plant(mutant, tree)
        try:
            code = pytest(tree, mutant.tests).returncode
        finally:
            (tree / "src" / "etude" / mutant.file).write_text(whole, encoding="utf-8")
            trees.put(tree)
        said = {0: "SURVIVED", 1: "caught  ", 2: "caught  "}.get(code, f"pytest exit {code}")
        print(f"{said}  {mutant.file}: {mutant.old.strip()!r} → {mutant.new.strip()!r}  [{mutant.tests}]", flush=True)
        return code in (1, 2)

    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            broken = [said for said in pool.map(clean, sorted({m.tests for m in chosen})) if said]
            if broken:
                print("the tests fail without any mutant:", *broken, sep="\n", file=sys.stderr)
                return 1
            seen = list(pool.map(caught, chosen))
    finally:
        while not trees.empty():
            shutil.rmtree(trees.get())
    print(f"{sum(seen)} of {len(seen)} caught in {time.monotonic() - began:.0f} s")
    return 0 if all(seen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
