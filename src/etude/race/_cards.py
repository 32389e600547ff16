"""What each contender cost, when it reached the baseline, and the card of what it was given."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from etude.race import _charts, _text
from etude.race._model import Outcome, Result, Standing
from etude.race._sheet import line
from etude.race.verdict import value_of

COLUMNS = {
    "step": "one step", "state": "optimizer state", "run": "one run", "reached": "runs that reach",
    "steps": "after steps", "clock": "after",
}  # fmt: skip
Reached = tuple[float, float] | None
"""(step, seconds) at which a run stood at the target, or None if it never did."""


def columns(result: Result) -> list[tuple[str, str]]:
    """The columns of the cost table, (key, heading), of which something is known."""
    rows = [cost(result, s) for s in result.standings]
    return [(key, label) for key, label in COLUMNS.items() if any(row[key] not in ("–", "") for row in rows)]


def cost(result: Result, standing: Standing) -> dict[str, str]:
    """What a contender costs, and when it reaches the baseline's median final validation metric (R12)."""
    base = result.standings[0]
    reached, usual = _reach(result, standing), _reach(result, base)
    steps, clock = _middle(reached, 0), _middle(reached, 1)
    curves = any(o.curve for o in result.outcomes)

    def against(value: float | None, other: float | None) -> str:
        return "" if standing is base or value is None else _text.ratio(value, other)

    return {
        "contender": standing.contender,
        "step": _text.seconds(standing.step_seconds),
        "step_ratio": against(standing.step_seconds, base.step_seconds),
        "state": _text.size(standing.state_bytes),
        "state_ratio": against(standing.state_bytes, base.state_bytes),
        "run": _text.seconds(standing.seconds) if standing.seconds else "–",
        "run_ratio": "",
        "reached": f"{sum(r is not None for r in reached)} of {len(standing.values)}" if curves else "–",
        "reached_ratio": "",
        "steps": "–" if steps is None else f"{steps:,.0f}",
        "steps_ratio": against(steps, _middle(usual, 0)),
        "clock": _text.seconds(clock),
        "clock_ratio": against(clock, _middle(usual, 1)),
    }


def reach(result: Result) -> dict[str, list[Reached]]:
    """Contender → when each of its final runs first stood where the tuned baseline's curves end, in median."""
    return {s.contender: _reach(result, s) for s in result.standings}


def _reach(result: Result, standing: Standing) -> list[Reached]:
    """Curves are taken on validation data, and so is the target, wherever the verdict is."""
    ends = [
        run.curve[-1][3]
        for run in _charts.finals(result, result.standings[0])
        if value_of(run) is not None and run.curve
    ]
    if not ends:
        return [None for _ in standing.values]
    sign = 1 if result.plan.minimize else -1
    target = float(np.median(ends))
    runs = _charts.finals(result, standing)
    return [
        next(((float(p[0]), p[1]) for p in run.curve if sign * p[3] <= sign * target), None) for run in runs
    ]  # fmt: skip


def _middle(reached: Sequence[Reached], which: int) -> float | None:
    """The median over runs, those that never arrive counted as infinitely late."""
    if not reached:
        return None
    middle = statistics.median_low([math.inf if r is None else r[which] for r in reached])
    return middle if math.isfinite(middle) else None


def card(result: Result, standing: Standing) -> dict[str, Any]:
    """The fairness card: what the contender was given, what came of it, and the numbers behind the word."""
    own = [o for o in result.outcomes if o.cell.contender == standing.contender]
    tuning = [o for o in own if o.cell.stage == "tune"]
    finals = _charts.finals(result, standing)
    base = result.standings[0]
    facts = []
    if standing.tuned:
        lr, edge = _text.chosen(standing).rstrip("*"), "at the edge" if standing.at_edge else "inside"
        facts = [("learning rate", lr if lr == "–" else f"{lr}, {edge}"), ("rates tried", str(len(standing.tuned)))]
        facts += _spent("tuning", tuning, result.plan.tune_seeds)
    facts += _spent("final", finals, result.plan.final_seeds if result.plan.paired else ())
    if standing is not base:
        facts += _numbers(standing, base)
    return {"line": line(result, standing), "facts": facts, "failures": standing.failures}


def _numbers(standing: Standing, base: Standing) -> list[tuple[str, str]]:
    """What decides the word, beyond what the table shows."""
    factor, unit = _text.scale(base)
    boot = standing.bootstrap_interval
    ends = None if boot is None else _text.with_interval(0.0, (factor * boot[0], factor * boot[1]), signed=True)
    visible = None if standing.visible is None else factor * standing.visible
    facts = [
        ("p", _text.chance(standing.p)),
        ("p by Holm", _text.chance(standing.p_holm)),
        ("bootstrap-t", "–" if ends is None else ends.partition(" ")[2] + unit),
        ("visible from", "–" if visible is None else _text.number(visible, visible) + unit),
        ("ρ across seeds", "–" if standing.rho is None else _text.number(standing.rho, 0.1, signed=True)),
    ]
    return [fact for fact in facts if fact[1] != "–"]


def _spent(stage: str, runs: Sequence[Outcome], seeds: Sequence[int]) -> list[tuple[str, str]]:
    """``13 runs, 2 failed`` · ``0–2`` · ``41 s``; without ``seeds`` or seconds, without those."""
    failed = sum(value_of(o) is None for o in runs)
    used, spent = sorted(set(seeds)), sum(o.seconds for o in runs)
    row = used == list(range(used[0], used[-1] + 1)) if used else False
    facts = [
        (stage, f"{len(runs)} runs, {failed or 'none'} failed"),
        ("on seeds", f"{used[0]}–{used[-1]}" if row else ", ".join(map(str, used))),
        ("in", _text.seconds(spent) if spent else ""),
    ]
    return [fact for fact in facts if fact[1]]
