"""What an outcome is worth: its value or none, and one outcome per cell however often a seed was repeated (R6, R9)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from etude.race._model import Cell, Outcome


def value_of(outcome: Outcome) -> float | None:
    """The final metric, or None when the run failed; a metric that is not finite is a failure."""
    if outcome.reason or outcome.metric is None or not math.isfinite(outcome.metric):
        return None
    return float(outcome.metric)


def signed(outcome: Outcome, minimize: bool) -> float:
    """Smaller is better; failed is infinite."""
    value = value_of(outcome)
    return math.inf if value is None else value if minimize else -value


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return math.fsum(values) / len(values) if values else None


def distinct(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """One outcome per cell, by seed: repeats of a seed count as one, their mean, failed if any of them failed (R9)."""
    cells: dict[Cell, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        cells[outcome.cell].append(outcome)
    return [_one(cells[cell]) for cell in sorted(cells, key=lambda c: (c.contender, c.stage, c.lr, c.more, c.seed))]


def _one(repeats: list[Outcome]) -> Outcome:
    if len(repeats) == 1:
        return repeats[0]
    first = min(repeats, key=lambda o: (value_of(o) is not None, o.reason, o.metric or 0.0, o.seconds))
    values = {v for o in repeats if (v := value_of(o)) is not None}
    return first if value_of(first) is None else replace(first, metric=mean(sorted(values)))
