"""How a contender is tuned: which points to try next, and which to take. Functions of finished runs alone, so that a
race that was interrupted, or whose runs finished in another order, tunes the same (R3, R4)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import qmc

from etude.race._errors import InputError
from etude.race._model import More, Outcome, Plan, Range
from etude.race._values import distinct, mean, signed, value_of

Point = tuple[float, More]
Firsts = Mapping[Point, float]
"""Point → its value on the first tuning seed, smaller is better, infinite where it failed."""

SEARCHES = ("grid", "sobol", "optuna")
REPEATED = 3
"""So many of the points tried once are repeated on the other tuning seeds."""
MARGIN = 0.05
"""A learning rate is at the edge of a range in the outer twentieth of it, in decades."""
WIDE = 1.5
"""Decades to each side in which lr and weight decay are searched."""
STARTS = {"weight_decay": 1e-3}
"""Where a knob is searched that is 0 unless said otherwise."""
MOST_VALUES = 4
TRIALS = (13, 22, 38, 38)
"""Tuning runs of each contender by how many values are tuned: 7, 16 and 32 points once, the best 3 three times."""
ROUND = 4
"""Trials that Optuna is asked for before it is told what came of them: as many can run at a time."""


@dataclass(frozen=True)
class Chosen:
    """The point to take, whether its lr is at the edge of what was tried, and (lr, mean metric or None) per point."""

    lr: float
    more: More
    at_edge: bool
    tuned: tuple[tuple[float, float | None], ...]


@dataclass(frozen=True, kw_only=True)
class Search:
    """Every point is tried on the first seed; the rest of the budget repeats the best 3 or fewer on the others."""

    budget: int = 13
    seeds: tuple[int, ...] = (0, 1, 2)
    minimize: bool = True

    def ask(self, outcomes: Iterable[Outcome]) -> list[tuple[Point, int]]:
        """The (point, index into ``seeds``) to run next, none when tuning is over."""
        done = {((o.cell.lr, o.cell.more), o.cell.seed): signed(o, self.minimize) for o in distinct(outcomes)}
        firsts = {point: value for (point, seed), value in done.items() if seed == self.seeds[0]}
        points, missing = self.explore(firsts)
        if missing:
            return [(point, 0) for point in missing]
        best, others = self.best(points, firsts), range(1, len(self.seeds))
        return [(point, i) for i in others for point in best if (point, self.seeds[i]) not in done]

    def explore(self, firsts: Firsts) -> tuple[list[Point], list[Point]]:
        """All points to try as far as ``firsts`` tells, and those that are not in it."""
        raise NotImplementedError

    def best(self, points: Iterable[Point], firsts: Firsts) -> list[Point]:
        """Which points to repeat; none that failed."""
        ranked = sorted(points, key=lambda point: (firsts[point], point))
        repeats = min(REPEATED, (self.budget - len(ranked)) // max(1, len(self.seeds) - 1))
        return [point for point in ranked[:repeats] if firsts[point] < math.inf]

    def choose(self, outcomes: Iterable[Outcome]) -> Chosen:
        """The point with the best mean.

        One with a failed run comes after all that have none (R6); then the one tried on more seeds (R4); then the mean.
        """
        runs: dict[Point, list[Outcome]] = defaultdict(list)
        for outcome in distinct(outcomes):
            runs[outcome.cell.lr, outcome.cell.more].append(outcome)
        if not runs:
            raise ValueError("no tuning run has finished: there is no learning rate to choose from")
        means = {p: mean([v for o in runs[p] if (v := value_of(o)) is not None]) for p in sorted(runs)}

        def rank(point: Point) -> tuple[float, int, float, Point]:
            failed = sum(value_of(o) is None for o in runs[point]) / len(runs[point])
            return failed, -len(runs[point]), (means[point] or 0.0) * (1 if self.minimize else -1), point

        lr, more = min(means, key=rank)
        lrs = sorted({lr for lr, _ in means})
        return Chosen(lr, more, self.at_edge(lr, lrs), tuple((lr, value) for (lr, _), value in means.items()))

    def at_edge(self, lr: float, tried: list[float]) -> bool:
        """Whether a better lr may lie beyond what was tried."""
        return len(tried) > 1 and lr in (tried[0], tried[-1])


@dataclass(frozen=True)
class Grid(Search):
    """The default, for lr alone: a log grid that grows at the edge where the best is, within the budget (R3).

    While one of the points to be repeated is an edge, the grid first grows by a point there (at most 2 a side); if all
    fail, downwards. A grid of one lr has nothing to tune.
    """

    lrs: tuple[float, ...]

    def explore(self, firsts: Firsts) -> tuple[list[Point], list[Point]]:
        line = sorted(self.lrs)
        if len(line) < 2:
            return [], []
        if self.budget < len(line) + len(self.seeds) - 1:
            raise ValueError(
                f"{self.budget} tuning runs cannot try {len(line)} learning rates and repeat the best on "
                f"{len(self.seeds)} seeds"
            )
        lowest, highest = line[0], line[-1]
        factor = (highest / lowest) ** (1 / (len(line) - 1))
        below = [rounded(lowest / factor**i) for i in (1, 2)]
        above = [rounded(highest * factor**i) for i in (1, 2)]
        while True:
            points: list[Point] = [(lr, ()) for lr in line]
            if missing := [point for point in points if point not in firsts]:
                return points, missing
            top = [lr for lr, _ in self.best(points, firsts)]
            beyond = above if line[-1] in top and above else below if line[0] in top or not top else []
            if not beyond or len(line) + len(self.seeds) > self.budget:
                return points, []
            line = sorted([*line, beyond.pop(0)])

    def choose(self, outcomes: Iterable[Outcome]) -> Chosen:
        held = list(outcomes)
        return Chosen(self.lrs[0], (), False, ()) if not held and len(self.lrs) == 1 else super().choose(held)


@dataclass(frozen=True)
class Sobol(Search):
    """One to four tuned values: the declared point, then a scrambled Sobol sequence over their ranges.

    The points of the unit cube depend on ``seed`` and on how many values are tuned: contenders that tune as many get
    the same ones.
    """

    ranges: tuple[Range, ...]
    seed: int = 0

    def explore(self, firsts: Firsts) -> tuple[list[Point], list[Point]]:
        count = tried_once(self.budget, len(self.seeds))
        cube = qmc.Sobol(len(self.ranges), rng=self.seed).random_base2(math.ceil(math.log2(max(count - 1, 1))))
        points = [self.point([r.start for r in self.ranges])]
        points += [self.point([r.at(u) for r, u in zip(self.ranges, row)]) for row in cube[: count - 1].tolist()]
        return points, [point for point in points if point not in firsts]

    def point(self, values: Iterable[float]) -> Point:
        """The point of one value per range, lr first."""
        (_, lr), *more = ((r.knob, rounded(value)) for r, value in zip(self.ranges, values))
        return lr, tuple(more)

    def at_edge(self, lr: float, tried: list[float]) -> bool:
        return not MARGIN <= self.ranges[0].place(lr) <= 1 - MARGIN


@dataclass(frozen=True)
class Optuna(Sobol):
    """One to four tuned values, asked of Optuna's seeded TPE four at a time and told in the order of asking.

    The study is played again from the finished runs at every question: nothing of it is stored, and nothing depends on
    which run finished first.
    """

    def explore(self, firsts: Firsts) -> tuple[list[Point], list[Point]]:
        optuna = _optuna()
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self.seed))
        unit = {r.knob: optuna.distributions.FloatDistribution(0.0, 1.0) for r in self.ranges}
        study.enqueue_trial({r.knob: r.place(r.start) for r in self.ranges})
        count, points = tried_once(self.budget, len(self.seeds)), list[Point]()
        while len(points) < count:
            trials = [study.ask(unit) for _ in range(min(ROUND, count - len(points)))]
            asked = [self.point(r.at(trial.params[r.knob]) for r in self.ranges) for trial in trials]
            points += asked
            if missing := [point for point in asked if point not in firsts]:
                return points, missing
            for trial, point in zip(trials, asked):
                failed = firsts[point] == math.inf
                study.tell(trial, **({"state": optuna.trial.TrialState.FAIL} if failed else {"values": firsts[point]}))
        return points, []


def ranges(contender: str, centre: float, knobs: Mapping[str, Any], tune: Sequence[str]) -> tuple[Range, ...]:
    """Where the values of ``tune`` are searched, lr first; what the contender's rule does not have is left out.

    Each range is centred on what the recipe says or the method declares: lr and weight decay 1.5 decades to each side,
    any other knob one; a knob between 0.5 and 1, as a momentum, in decades of 1 - value. ``betas`` are two values.
    """
    found = [_range("lr", centre, WIDE)]
    for name in tune:
        for knob, value in _entries(name, knobs.get(name)) if name != "lr" else ():
            if isinstance(value, bool) or not isinstance(value, float):
                raise InputError(f"{contender}: {knob}={value!r} is no real number that could be tuned")
            if not (start := value or STARTS.get(knob, 0.0)) > 0:
                raise InputError(f"{contender}: {knob}={value} centres no range; write a start, e.g. {knob}=0.9")
            found.append(_range(knob, start, WIDE if knob in STARTS else 1.0))
    if len(found) > MOST_VALUES:
        names = ", ".join(r.knob for r in found)
        raise InputError(f"{contender}: {names} are {len(found)} values; a race tunes at most {MOST_VALUES}")
    return tuple(found)


def _entries(name: str, value: Any) -> Sequence[tuple[str, Any]]:
    """A knob under its name, the entries of a tuple as ``name[i]``, nothing where the rule has no such knob."""
    if isinstance(value, tuple):
        return [(f"{name}[{i}]", entry) for i, entry in enumerate(value)]
    return [] if value is None else [(name, value)]


def _range(knob: str, start: float, decades: float) -> Range:
    if 0.5 < start < 1 and knob not in ("lr", *STARTS):
        near = 1 - start
        return Range(knob, 1 - min(0.5, near * 10**decades), start, 1 - near / 10**decades, mirrored=True)
    top = start * 10**decades
    return Range(knob, rounded(start / 10**decades), start, rounded(min(1.0, top) if knob in STARTS else top))


def search_of(plan: Plan, contender: str) -> Search:
    """How the plan tunes a contender."""
    budget, seeds, minimize = plan.tune_budget, plan.tune_seeds or (0, 1, 2), plan.minimize
    if plan.search == "grid":
        return Grid(plan.grids[contender], budget=budget, seeds=seeds, minimize=minimize)
    kind = Sobol if plan.search == "sobol" else Optuna
    return kind(plan.ranges[contender], seed=seeds[0], budget=budget, seeds=seeds, minimize=minimize)


def check_search(search: str, tune: Sequence[str], trials: int) -> None:
    """Refuse a search that cannot be had, before anything is started."""
    if search not in SEARCHES:
        raise InputError(f"search={search!r}: it is one of {', '.join(SEARCHES)}")
    if search == "grid" and set(tune) != {"lr"}:
        raise InputError(f"search='grid' tunes lr alone; for {', '.join(tune)} it is sobol or optuna")
    least = 9 if search == "grid" else 10
    if trials < least:
        raise InputError(f"trials={trials}: the search {search} needs at least {least} tuning runs of each contender")
    if search == "optuna":
        _optuna()


def tried_once(budget: int, seeds: int) -> int:
    """How many points a budget tries on the first seed when the best 3 are repeated on the others."""
    return budget - REPEATED * (seeds - 1)


def rounded(value: float) -> float:
    """To six digits: what is printed is what was run."""
    return float(f"{value:.6g}")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise InputError('search="optuna" needs Optuna; install it with: pip install "etude[optuna]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
