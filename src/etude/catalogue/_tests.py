"""Finds the paper tests by their names.

Imports nothing of etude: the build runs this file alone, to write ``tests.json`` into the wheel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

_CHECKOUT = Path(__file__).parents[3] / "tests" / "papers"
_SHIPPED = Path(__file__).with_name("tests.json")


def scan(papers: Path) -> dict[str, list[str]]:
    """Room → the paper tests of its methods, each as pytest names it."""
    found: dict[str, list[str]] = {}
    for file in sorted(papers.glob("test_*.py")):
        names = re.findall(r"^def (test_\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
        found.setdefault(file.stem.split("_")[1], []).extend(f"tests/papers/{file.name}::{name}" for name in names)
    return found


def paper_tests() -> dict[str, list[str]]:
    """The paper tests of the checkout this file lies in, else those of the wheel; a bare copy of src has none."""
    if _CHECKOUT.is_dir() or not _SHIPPED.is_file():
        return scan(_CHECKOUT)
    shipped: dict[str, list[str]] = json.loads(_SHIPPED.read_text(encoding="utf-8"))
    return shipped


def assign(tests: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Method → its tests. The longest name wins: ``test_adamw_decays`` is adamw's and never adam's."""
    longest_first = sorted(names, key=len, reverse=True)
    found: dict[str, list[str]] = {name: [] for name in longest_first}
    for test in tests:
        claim = test.rpartition("::")[2]
        owner = next((name for name in longest_first if claim.startswith(f"test_{name}_")), None)
        if owner is not None:
            found[owner].append(test)
    return found
