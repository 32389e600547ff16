"""When a contender reaches what the tuned baseline ends at, and how it does over several tasks (R12)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from etude.race._errors import InputError
from etude.race._model import Outcome, Result
from etude.race._values import value_of

CENSOR = 1.5
"""In shares of the baseline's own seconds: who has not arrived by then never does."""
FEWEST = 3
"""Tasks from which on a profile is drawn."""
FARTHEST = 4.0
"""Beyond so many times the best there is no credit."""
STEP, SECONDS, METRIC = 0, 1, 3


def times_to_target(result: Result) -> dict[str, tuple[float, ...]]:
    """Contender → training seconds until each final run first stands at the target; infinite where it never does.

    The target is the median validation value at which the tuned baseline's final runs end. A step is charged at the
    contender's own median cost. Censored at 1.5 × the baseline's training time.
    """
    plan, base = result.plan, result.standings[0]
    sign = 1 if plan.minimize else -1
    runs = {s.contender: _finals(result, s.contender, s.lr, s.beside) for s in result.standings}
    ends = [run.curve[-1][METRIC] for run in runs[base.contender] if value_of(run) is not None and run.curve]
    if not ends or base.step_seconds is None:
        return {name: tuple(math.inf for _ in found) for name, found in runs.items()}
    target, limit = sign * statistics.median(ends), CENSOR * plan.steps * base.step_seconds
    times: dict[str, tuple[float, ...]] = {}
    for standing in result.standings:
        cost = standing.step_seconds or math.inf
        reached = (
            next((p[STEP] * cost for p in run.curve if sign * p[METRIC] <= target), math.inf)
            for run in runs[standing.contender]
        )
        times[standing.contender] = tuple(t if t <= limit else math.inf for t in reached)
    return times


def profile(
    results: Sequence[Result], taus: Sequence[float] | None = None
) -> dict[str, tuple[tuple[float, float], ...]]:
    """Contender → (τ, share of the tasks on which its median time to target is within τ × that of the fastest).

    Over the contenders that all results share, on at least three tasks. A task that nobody solves counts for nobody.
    """
    return _shares([_medians(result) for result in _checked(results)], taus)


def score(results: Sequence[Result]) -> dict[str, float]:
    """Contender → the mean of its profile over τ from 1 to 4: 1 is fastest on every task, 0 never within four times."""
    medians = [_medians(result) for result in _checked(results)]
    found = {}
    for name, ratios in _ratios(medians).items():
        credit = [max(0.0, FARTHEST - ratio) / (FARTHEST - 1) for ratio in ratios]
        found[name] = math.fsum(credit) / len(credit)
    return found


def _checked(results: Sequence[Result]) -> Sequence[Result]:
    tasks = {canonical_task(result) for result in results}
    if len(tasks) < FEWEST or len(tasks) < len(results):
        raise InputError(f"a profile is drawn over {FEWEST} or more different tasks; these are {len(tasks)}")
    return results


def canonical_task(result: Result) -> str:
    """What tells two tasks apart: its name and its data."""
    return f"{result.plan.task} {result.lock.get('data', '')} {result.lock.get('model', '')}"


def _medians(result: Result) -> dict[str, float]:
    """A median of times, those that never arrive counted as infinitely late."""
    return {
        name: statistics.median_high(times) if times else math.inf for name, times in times_to_target(result).items()
    }


def _ratios(medians: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Contender → its time over the fastest's, per task."""
    names = [name for name in medians[0] if all(name in each for each in medians)]
    if len(names) < 2:
        raise InputError("a profile needs at least two contenders that all the races share")
    best = [min(each[name] for name in names) for each in medians]
    return {
        name: [each[name] / fastest if each[name] < math.inf else math.inf for each, fastest in zip(medians, best)]
        for name in names
    }


def _shares(
    medians: Sequence[Mapping[str, float]], taus: Sequence[float] | None
) -> dict[str, tuple[tuple[float, float], ...]]:
    places = np.linspace(1, FARTHEST, 61).tolist() if taus is None else list(taus)
    return {
        name: tuple((tau, sum(ratio <= tau * (1 + 1e-12) for ratio in ratios) / len(ratios)) for tau in places)
        for name, ratios in _ratios(medians).items()
    }


def _finals(result: Result, name: str, lr: float, more: object) -> list[Outcome]:
    """The final runs of a contender at what was chosen, one per seed that counts."""
    mine = {
        o.cell.seed: o for o in result.outcomes
        if o.cell.contender == name and o.cell.stage == "final" and (o.cell.lr, o.cell.more) == (lr, more)
    }  # fmt: skip
    return [mine[seed] for seed in result.plan.final_seeds if seed in mine]
