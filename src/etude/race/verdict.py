"""The verdict: paired t against the baseline, Holm over the contenders, one word. Pure functions of outcomes.

The rules of a fair race that live here, by number. R2: the baseline against itself on other seeds. R3: at the edge of
its grid a method is *under-tuned*, never *worse*. R4: three tuning seeds, then fresh final seeds. R6: failed runs are
outcomes. R8: *better, worse, equivalent, no significant difference*. R9: repeats of one seed count as one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from etude.race._model import Outcome, Plan, Standing
from etude.race._statistics import (
    Values,
    bootstrap_t,
    detectable,
    holm,
    seeds_needed,
    spread,
    t_interval,
    t_test,
    visible_effect,
    welch,
)

__all__ = [
    "AA_ALPHA", "DIFFERENT", "SAME", "UNCHECKED", "choose_lr", "judge", "next_trials", "value_of", "visible_effect",
]  # fmt: skip

AA_ALPHA = 0.005
SAME = "no difference, as it should be"
DIFFERENT = "different: do not trust this race"
UNCHECKED = "unchecked: fewer than 2 runs to compare"


def next_trials(
    grid: Sequence[float],
    outcomes: Iterable[Outcome],
    budget: int = 13,
    seeds: Sequence[int] = (0, 1, 2),
    minimize: bool = True,
) -> list[tuple[float, int]]:
    """The (lr, index into ``seeds``) to run next, none when tuning is over: a function of finished outcomes (R3, R4).

    Every lr of the grid runs on the first seed; the rest of the budget repeats the best 3 or fewer on the other seeds.
    While one of those is an edge, the grid first grows by a point there (at most 2 a side); if all fail, downwards.
    """
    line = sorted(grid)
    if len(line) < 2:
        return []
    if budget < len(line) + len(seeds) - 1:
        raise ValueError(
            f"{budget} tuning runs cannot try {len(line)} learning rates and repeat the best on {len(seeds)} seeds"
        )
    done = {(o.cell.lr, o.cell.seed): _signed(o, minimize) for o in _distinct(outcomes)}
    lowest, highest = line[0], line[-1]
    factor = (highest / lowest) ** (1 / (len(line) - 1))
    below = [_round(lowest / factor**i) for i in (1, 2)]
    above = [_round(highest * factor**i) for i in (1, 2)]
    while True:
        missing = [(lr, 0) for lr in line if (lr, seeds[0]) not in done]
        if missing:
            return missing
        ranked = sorted(line, key=lambda lr: (done[lr, seeds[0]], lr))
        repeats = min(3, (budget - len(line)) // (len(seeds) - 1))
        top = [lr for lr in ranked[:repeats] if done[lr, seeds[0]] < math.inf]
        beyond = above if line[-1] in top and above else below if line[0] in top or not top else []
        if not beyond or len(line) + len(seeds) > budget:
            break
        line = sorted([*line, beyond.pop(0)])
    return [(lr, i) for i in range(1, len(seeds)) for lr in top if (lr, seeds[i]) not in done]


def choose_lr(
    outcomes: Iterable[Outcome], minimize: bool = True
) -> tuple[float, bool, tuple[tuple[float, float | None], ...]]:
    """The lr to take, whether it is at the edge of what was tried, and (lr, mean metric or None) for every lr tried.

    An lr with a failed run comes after all that have none (R6); then the one tried on more seeds (R4); then the mean.
    """
    runs: dict[float, list[Outcome]] = defaultdict(list)
    for outcome in _distinct(outcomes):
        runs[outcome.cell.lr].append(outcome)
    if not runs:
        raise ValueError("no tuning run has finished: there is no learning rate to choose from")
    tuned = tuple((lr, _mean([v for o in runs[lr] if (v := value_of(o)) is not None])) for lr in sorted(runs))

    def rank(entry: tuple[float, float | None]) -> tuple[float, int, float, float]:
        lr, mean = entry
        failed = sum(value_of(o) is None for o in runs[lr]) / len(runs[lr])
        return failed, -len(runs[lr]), (mean or 0.0) * (1 if minimize else -1), lr

    lr = min(tuned, key=rank)[0]
    return lr, len(tuned) > 1 and lr in (tuned[0][0], tuned[-1][0]), tuned


def _round(lr: float) -> float:
    return float(f"{lr:.6g}")


def value_of(outcome: Outcome) -> float | None:
    """The final metric, or None when the run failed; a metric that is not finite is a failure."""
    if outcome.reason or outcome.metric is None or not math.isfinite(outcome.metric):
        return None
    return float(outcome.metric)


def _signed(outcome: Outcome, minimize: bool) -> float:
    """Smaller is better; failed is infinite."""
    value = value_of(outcome)
    return math.inf if value is None else value if minimize else -value


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _distinct(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """One outcome per cell, by seed: repeats of a seed count as one, their mean, failed if any of them failed (R9)."""
    cells: dict[Any, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        cells[outcome.cell].append(outcome)
    return [_one(cells[cell]) for cell in sorted(cells, key=lambda c: (c.contender, c.stage, c.lr, c.seed))]


def _one(repeats: list[Outcome]) -> Outcome:
    if len(repeats) == 1:
        return repeats[0]
    first = min(repeats, key=lambda o: (value_of(o) is not None, o.reason, o.metric or 0.0, o.seconds))
    values = {v for o in repeats if (v := value_of(o)) is not None}
    return first if value_of(first) is None else replace(first, metric=_mean(sorted(values)))


def _finals(
    plan: Plan, contender: str, outcomes: Sequence[Outcome]
) -> tuple[float, bool, tuple[Any, ...], dict[int, Outcome]]:
    """The chosen lr, whether it is at the edge, what was tuned, and the final run of each seed at that lr."""
    mine = [o for o in outcomes if o.cell.contender == contender]
    tuning = [o for o in mine if o.cell.stage == "tune"]
    finals = [o for o in mine if o.cell.stage == "final"]
    if tuning:
        lr, at_edge, tuned = choose_lr(tuning, plan.minimize)
    else:  # nothing to tune: a fixed lr
        grid = sorted(plan.grids[contender])
        lr, at_edge, tuned = (finals[0].cell.lr if finals else grid[len(grid) // 2]), False, ()
    return lr, at_edge, tuned, {o.cell.seed: o for o in finals if o.cell.lr == lr}


def _failures(stage: str, seeds: Sequence[int], runs: Mapping[int, Outcome]) -> tuple[str, ...]:
    """A line per seed without a value; a run that is missing counts as one that failed (R6)."""
    lines = []
    for seed in seeds:
        if seed not in runs:
            lines.append(f"{stage} seed {seed}: not run")
        elif value_of(runs[seed]) is None:
            lines.append(f"{stage} seed {seed}: {runs[seed].reason or f'the metric is {runs[seed].metric}'}")
    return tuple(lines)


def _median(values: Iterable[float]) -> float | None:
    known = [v for v in values if math.isfinite(v)]
    return float(np.median(known)) if known else None


def judge(plan: Plan, outcomes: Iterable[Outcome]) -> tuple[tuple[Standing, ...], Standing]:
    """Every contender's standing, baseline first, and the A/A control's. The order of outcomes does not matter.

    A side with a failed final run cannot win: such a contender is never *better* or *equivalent*, and against a
    baseline with failed runs nobody is *worse* (R6). A failed contender stays in Holm's family: failing helps nobody.
    """
    runs = _distinct(outcomes)
    base = _describe(plan, plan.baseline, runs)
    others = [_compare(plan, _describe(plan, c, runs), base) for c in plan.contenders if c != plan.baseline]
    adjusted = holm([1.0 if s.p is None or s.word == "failed" else s.p for s in others])
    judged = [_judge(plan, replace(s, p_holm=None if s.p is None else q), base) for s, q in zip(others, adjusted)]
    return (base, *judged), _control(plan, base, runs)


def _describe(plan: Plan, contender: str, outcomes: Sequence[Outcome]) -> Standing:
    """A contender by itself. ``seconds`` is the median training time of its final runs."""
    lr, at_edge, tuned, finals = _finals(plan, contender, outcomes)
    failures = _failures("final", plan.final_seeds, finals)
    return _summary(contender, lr, tuned, at_edge, failures, [finals.get(s) for s in plan.final_seeds])


def _summary(
    contender: str,
    lr: float,
    tuned: tuple[Any, ...],
    at_edge: bool,
    failures: tuple[str, ...],
    runs: list[Outcome | None],
) -> Standing:
    values = tuple(None if o is None else value_of(o) for o in runs)
    finished = [o for o, v in zip(runs, values) if o is not None and v is not None]
    known = np.array([v for v in values if v is not None])
    failed = len(known) < 2 or len(failures) * 2 > len(values)
    return Standing(
        contender=contender, lr=lr, tuned=tuned, at_edge=at_edge, failures=failures, values=values,
        mean=float(known.mean()) if len(known) else None, interval=t_interval(known) if len(known) > 1 else None,
        difference=None, difference_interval=None, bootstrap_interval=None, p=None, p_holm=None, rho=None,
        word="failed" if failed else "baseline", visible=None, more=None,
        step_seconds=_median(s for o in finished if (s := o.step_seconds) is not None),
        seconds=_median(o.seconds for o in finished),
        state_bytes=max((n for o in finished if (n := o.state_bytes) is not None), default=None),
    )  # fmt: skip


def _pairs(standing: Standing, base: Standing) -> tuple[Values, Values]:
    """The finals of both, on the seeds on which both finished.  [n], [n]."""
    common = [(x, y) for x, y in zip(standing.values, base.values) if x is not None and y is not None]
    pairs = np.array(common, dtype=np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _compare(plan: Plan, standing: Standing, base: Standing) -> Standing:
    """The paired difference, contender - baseline, with its intervals, p, correlation and what could have been seen."""
    if not plan.paired:
        return _compare_samples(plan, standing, base)
    mine, theirs = _pairs(standing, base)
    if len(mine) < 2:
        return standing
    d = mine - theirs
    alpha = plan.alpha / (len(plan.contenders) - 1)
    varied = len(d) > 2 and np.ptp(mine) and np.ptp(theirs)
    return replace(
        standing,
        difference=float(d.mean()),
        difference_interval=t_interval(d),
        bootstrap_interval=bootstrap_t(d),
        p=t_test(d),
        rho=float(np.corrcoef(mine, theirs)[0, 1]) if varied else None,
        visible=detectable(len(d), alpha) * spread(d),
    )


def _compare_samples(plan: Plan, standing: Standing, base: Standing) -> Standing:
    """The difference of two independent samples by Welch's t, its interval, and what could have been seen."""
    x, y = _known(standing), _known(base)
    if min(len(x), len(y)) < 2:
        return standing
    p, between = welch(x, y)
    n = min(len(x), len(y))
    return replace(
        standing,
        difference=float(x.mean() - y.mean()),
        difference_interval=between,
        p=p,
        visible=detectable(n, plan.alpha / (len(plan.contenders) - 1)) * math.hypot(spread(x), spread(y)),
    )


def _known(standing: Standing) -> Values:
    return np.array([v for v in standing.values if v is not None])


def _judge(plan: Plan, standing: Standing, base: Standing) -> Standing:
    """The word (R3, R6, R8), and how many more seeds an open question needs."""
    if standing.word == "failed":
        return standing
    undecided = replace(standing, word="no significant difference")
    if standing.p_holm is None or standing.difference is None or base.word == "failed":
        return undecided
    if standing.p_holm > plan.alpha:
        clean = not standing.failures and not base.failures
        if clean and _within_rope(plan, standing, base):
            return replace(standing, word="equivalent")
        return replace(undecided, more=_more(plan, standing, base))
    if (standing.difference < 0) == plan.minimize:
        return undecided if standing.failures else replace(standing, word="better")
    return undecided if base.failures else replace(standing, word="under-tuned" if standing.at_edge else "worse")


def _within_rope(plan: Plan, standing: Standing, base: Standing) -> bool:
    """Two one-sided tests at alpha: the 1 - 2 alpha interval of the difference lies inside ± rope · |baseline mean|."""
    mine, theirs = _pairs(standing, base)
    if plan.paired:
        low, high = t_interval(mine - theirs, 1 - 2 * plan.alpha)
    else:
        _, (low, high) = welch(_known(standing), _known(base), 1 - 2 * plan.alpha)
    margin = plan.rope * abs(base.mean or 0.0)
    return -margin <= low and high <= margin


def _more(plan: Plan, standing: Standing, base: Standing) -> int | None:
    """How many more seeds find the observed difference with 80 % power; None when it is none, or decided already."""
    mine, theirs = _pairs(standing, base)
    sd = spread(mine - theirs) if plan.paired else math.hypot(spread(_known(standing)), spread(_known(base)))
    if len(mine) < 2 or not standing.difference or not sd:
        return None
    needed = seeds_needed(standing.difference / sd, plan.alpha / (len(plan.contenders) - 1))
    return None if needed is None else max(needed - len(mine), 1)


def _control(plan: Plan, base: Standing, outcomes: Sequence[Outcome]) -> Standing:
    """A/A: the baseline on other seeds against itself. Not paired, so Welch's t, at alpha = .005 (R2)."""
    runs = {
        o.cell.seed: o for o in outcomes
        if o.cell.stage == "aa" and o.cell.contender == plan.baseline and o.cell.lr == base.lr
    }  # fmt: skip
    failures = _failures("A/A", plan.aa_seeds, runs)
    aa = _summary(plan.baseline, base.lr, base.tuned, base.at_edge, failures, [runs.get(s) for s in plan.aa_seeds])
    x = np.array([v for v in aa.values if v is not None])
    y = np.array([v for v in base.values if v is not None])
    if len(x) < 2 or len(y) < 2:
        return replace(aa, word=UNCHECKED)
    p, between = welch(x, y)
    return replace(
        aa, difference=float(x.mean() - y.mean()), difference_interval=between, p=p,
        word=DIFFERENT if p <= AA_ALPHA else SAME,
    )  # fmt: skip
