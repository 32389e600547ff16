"""The verdict: paired t against the baseline, Holm over the contenders, one word. Pure functions of outcomes.

The rules of a fair race that live here, by number. R2: the baseline against itself on other seeds. R3: at the edge of
its grid a method is *under-tuned*, never *worse*. R4: three tuning seeds, then fresh final seeds. R6: failed runs are
outcomes. R8: *better, worse, equivalent, no significant difference*. R9: repeats of one seed count as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from etude.race._model import Clock, Outcome, Plan, Standing
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
from etude.race._values import distinct, value_of
from etude.race.search import Chosen, search_of

__all__ = [
    "AA_ALPHA", "DIFFERENT", "SAME", "UNCHECKED", "judge", "value_of", "visible_effect",
]  # fmt: skip

AA_ALPHA = 0.005
SAME = "no difference, as it should be"
DIFFERENT = "different: do not trust this race"
UNCHECKED = "unchecked: fewer than 2 runs to compare"


def _finals(plan: Plan, contender: str, outcomes: Sequence[Outcome]) -> tuple[Chosen, dict[int, Outcome]]:
    """What was chosen, and the final run of each seed at that point."""
    mine = [o for o in outcomes if o.cell.contender == contender]
    tuning = [o for o in mine if o.cell.stage == "tune"]
    finals = [o for o in mine if o.cell.stage == "final"]
    if tuning:
        chosen = search_of(plan, contender).choose(tuning)
    else:  # nothing to tune: a fixed lr
        grid = sorted(plan.grids[contender])
        chosen = Chosen(finals[0].cell.lr if finals else grid[len(grid) // 2], (), False, ())
    return chosen, {o.cell.seed: o for o in finals if (o.cell.lr, o.cell.more) == (chosen.lr, chosen.more)}


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
    runs = distinct(outcomes)
    base = _describe(plan, plan.baseline, runs)
    judged = _words(plan, base, [_describe(plan, c, runs) for c in plan.contenders if c != plan.baseline])
    if plan.paired:
        judged = [replace(s, bootstrap_interval=bootstrap_t(np.subtract(*_pairs(s, base)))) for s in judged]
    timed = _at_equal_seconds(plan, base, judged, runs)
    return (base, *(replace(s, clocks=(*timed[s.contender], *_counted(plan, base, s))) for s in judged)), _control(
        plan, base, runs
    )


def _words(plan: Plan, base: Standing, others: Sequence[Standing]) -> list[Standing]:
    """Each of ``others`` against the baseline, Holm over all of them, one word for each."""
    found = [_compare(plan, s, base) for s in others]
    adjusted = holm([1.0 if s.p is None or s.word == "failed" else s.p for s in found])
    return [_judge(plan, replace(s, p_holm=None if s.p is None else q), base) for s, q in zip(found, adjusted)]


def _at_equal_seconds(
    plan: Plan, base: Standing, others: Sequence[Standing], runs: Sequence[Outcome]
) -> dict[str, tuple[Clock, ...]]:
    """The verdict on the validation metric at the baseline's training time, where a step is charged at its median (R7).

    A faster contender is judged at its end. A slower one is read off its curve before its schedule has ended, which
    does it no favour: rank at the end of a schedule that fits the time, ``--steps``, to be fair to it (R5).
    """
    none: dict[str, tuple[Clock, ...]] = {s.contender: () for s in others}
    if not base.step_seconds or base.word == "failed":
        return none
    limit = plan.steps * base.step_seconds

    def at_limit(standing: Standing) -> Standing:
        _, finals = _finals(plan, standing.contender, runs)
        steps = limit / standing.step_seconds if standing.step_seconds else 0.0
        values = tuple(_read(finals[s].curve, steps) if s in finals else None for s in plan.final_seeds)
        held = tuple(None if final is None else v for v, final in zip(values, standing.values))
        known = [v for v in held if v is not None]
        word = standing.word if len(known) > 1 else "failed"
        return replace(standing, values=held, word=word, mean=float(np.mean(known)) if known else None)

    there = at_limit(base)
    if there.word == "failed":
        return none
    found = _words(plan, there, [at_limit(s) for s in others])
    return {
        s.contender: (Clock("seconds", s.word, _ratio(own.step_seconds, base.step_seconds), s.difference,
                            s.difference_interval, s.p_holm),)
        for s, own in zip(found, others)
    }  # fmt: skip


def _read(curve: Sequence[tuple[float, ...]], step: float) -> float | None:
    """The validation metric at a step, on the line between two points of the curve; None before the first."""
    if not curve or step < curve[0][0]:
        return None
    value = float(np.interp(step, [point[0] for point in curve], [point[3] for point in curve]))
    return value if math.isfinite(value) else None


def _counted(plan: Plan, base: Standing, standing: Standing) -> tuple[Clock, ...]:
    """What is counted, not drawn: bytes of optimizer state, operations and energy of a step, over the baseline's."""
    mine, its = standing.contender, base.contender
    pairs = {
        "memory": (standing.state_bytes, base.state_bytes),
        "FLOPs": (plan.flops.get(mine), plan.flops.get(its)),
        "energy": (plan.joules.get(mine), plan.joules.get(its)),
    }
    ratios = {name: _ratio(*pair) for name, pair in pairs.items()}
    return tuple(
        Clock(name, "same" if abs(ratio - 1) < 0.005 else "less" if ratio < 1 else "more", ratio)
        for name, ratio in ratios.items()
        if ratio is not None
    )


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _describe(plan: Plan, contender: str, outcomes: Sequence[Outcome]) -> Standing:
    """A contender by itself. ``seconds`` is the median training time of its final runs."""
    chosen, finals = _finals(plan, contender, outcomes)
    failures = _failures("final", plan.final_seeds, finals)
    return _summary(contender, chosen, failures, [finals.get(s) for s in plan.final_seeds])


def _summary(contender: str, chosen: Chosen, failures: tuple[str, ...], runs: Sequence[Outcome | None]) -> Standing:
    values = tuple(None if o is None else value_of(o) for o in runs)
    finished = [o for o, v in zip(runs, values) if o is not None and v is not None]
    known = np.array([v for v in values if v is not None])
    failed = len(known) < 2 or len(failures) * 2 > len(values)
    return Standing(
        contender=contender, lr=chosen.lr, tuned=chosen.tuned, at_edge=chosen.at_edge, failures=failures, values=values,
        mean=float(known.mean()) if len(known) else None, interval=t_interval(known) if len(known) > 1 else None,
        difference=None, difference_interval=None, bootstrap_interval=None, p=None, p_holm=None, rho=None,
        word="failed" if failed else "baseline", visible=None, more=None,
        step_seconds=_median(s for o in finished if (s := o.step_seconds) is not None),
        seconds=_median(o.seconds for o in finished),
        state_bytes=max((n for o in finished if (n := o.state_bytes) is not None), default=None), beside=chosen.more,
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
        if o.cell.stage == "aa" and o.cell.contender == plan.baseline
        and (o.cell.lr, o.cell.more) == (base.lr, base.beside)
    }  # fmt: skip
    failures = _failures("A/A", plan.aa_seeds, runs)
    chosen = Chosen(base.lr, base.beside, base.at_edge, base.tuned)
    aa = _summary(plan.baseline, chosen, failures, [runs.get(s) for s in plan.aa_seeds])
    x = np.array([v for v in aa.values if v is not None])
    y = np.array([v for v in base.values if v is not None])
    if len(x) < 2 or len(y) < 2:
        return replace(aa, word=UNCHECKED)
    p, between = welch(x, y)
    return replace(
        aa, difference=float(x.mean() - y.mean()), difference_interval=between, p=p,
        word=DIFFERENT if p <= AA_ALPHA else SAME,
    )  # fmt: skip
