"""What a race is made of, in plain values: a cell is one run, an outcome what came of it, a result the verdicts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


More = tuple[tuple[str, float], ...]
"""What is tuned beside lr: (knob, value)."""


@dataclass(frozen=True)
class Cell:
    """One training run.

    ``contender``: canonical recipe text without lr, e.g. ``"adamw + dyt"``. ``stage``: ``"tune" | "final" | "aa"``
    (aa: the baseline again on other seeds). ``more``: what is tuned beside lr, (knob, value) by name.
    """

    contender: str
    stage: str
    lr: float
    seed: int
    more: More = ()

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Cell:
        """The cell behind its ``asdict`` after a trip through JSON."""
        return cls(**{**held, "more": tuple((str(name), value) for name, value in held.get("more", ()))})

    def key(self, lock: Mapping[str, Any]) -> str:
        """sha256 over everything that decides the result: the lock and the cell."""
        return hashlib.sha256(canonical({"lock": dict(lock), "cell": asdict(self)}).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What came of a cell.

    ``metric``: the value at the end of the full schedule, None when failed; ``reason``: ``""`` or why it failed
    ("diverged at step 120: loss is nan", "raised ValueError: …"). ``curve``: (step, seconds of training so far, mean
    train loss since the last point, validation metric). ``seconds``: the whole training, evaluation excluded;
    ``step_seconds``: median time of one step, synchronised; both in processor time on a CPU. ``state_bytes``:
    optimizer state. Both are None where only the run itself could tell.
    """

    cell: Cell
    metric: float | None
    reason: str
    curve: tuple[tuple[int, float, float, float], ...]
    seconds: float
    step_seconds: float | None
    state_bytes: int | None


@dataclass(frozen=True)
class Opened:
    """What a subject says of itself before anything is trained. ``lock``: what of it decides a result.

    ``steps``: 0 where only it knows. ``probed``: whether a few steps can be tried. ``workers``: runs at a time, when
    not as many as cores.
    """

    steps: int
    metric: str
    minimize: bool
    lock: dict[str, Any]
    probed: bool = True
    workers: int | None = None


@dataclass(frozen=True)
class Range:
    """Where a knob is tuned: from ``low`` over the declared ``start`` to ``high``, in decades.

    ``mirrored``: in decades of 1 - value, as for a momentum. An entry of a tuple is named ``betas[0]``.
    """

    knob: str
    low: float
    start: float
    high: float
    mirrored: bool = False

    def at(self, place: float) -> float:
        """The value at a place from 0 to 1."""
        low, high = map(self._log, (self.low, self.high))
        value = math.exp(low + place * (high - low))
        return 1 - value if self.mirrored else value

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        low, high = map(self._log, (self.low, self.high))
        return (self._log(value) - low) / (high - low)

    def _log(self, value: float) -> float:
        return math.log(1 - value if self.mirrored else value)


@dataclass(frozen=True)
class Clock:
    """A verdict by one clock: ``name`` is "seconds" (at the baseline's training time), "memory" or "FLOPs" of a step.

    ``difference``, ``interval``, ``p_holm``: paired, as in `Standing`, of the validation metric at that time; None
    where the clock counts and nothing is tested: there ``ratio`` to the baseline decides the word, "less", "more" or
    "same".
    """

    name: str
    word: str
    ratio: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Piece:
    """What a piece of a winning stack is worth (R14): the stack ``without`` it, judged against the whole stack.

    ``word``: "pays" where the stack is better with it, "harms" where worse, "breaks without it" where most runs fail
    without it, else "no sign that it pays".
    ``difference``: stack without the piece − stack, paired, with its interval.
    """

    piece: str
    without: str
    word: str
    difference: float | None
    interval: tuple[float, float] | None
    p_holm: float | None


@dataclass(frozen=True)
class Plan:
    """What will be run, decided before the first run.

    ``contenders``: baseline first. ``grids``: per contender 7 learning rates, factor √10, centred on the method's
    default or the one written in the recipe. ``rope``: half-width of "equivalent" as a share of the baseline's metric.
    ``seconds_per_run`` per contender. ``visible``: smallest effect the race can see, in standard deviations of a seed
    (80 % power). ``workers``: how many runs at a time. ``paired``: False where seeds cannot be matched, and runs are
    independent samples. ``search``: "grid", "sobol" or "optuna"; ``ranges``: what the latter two tune of each
    contender, lr first. ``looks``: at how many final seeds the race is judged, and ends when every contender is
    decided; once it has ended, ``final_seeds`` and ``alpha`` are those of that look (R8). ``flops``, ``joules``: of
    one step, where they could be read (R7).
    """

    task: str
    metric: str
    minimize: bool
    steps: int
    baseline: str
    contenders: tuple[str, ...]
    grids: Mapping[str, tuple[float, ...]]
    tune_budget: int = 13
    tune_seeds: tuple[int, ...] = ()
    final_seeds: tuple[int, ...] = ()
    aa_seeds: tuple[int, ...] = ()
    rope: float = 0.01
    alpha: float = 0.05
    seconds_per_run: Mapping[str, float] = field(default_factory=dict)
    visible: float | None = None
    workers: int = 1
    paired: bool = True
    search: str = "grid"
    ranges: Mapping[str, tuple[Range, ...]] = field(default_factory=dict)
    looks: tuple[int, ...] = ()
    flops: Mapping[str, float] = field(default_factory=dict)
    joules: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """One contender's verdict.

    ``tuned``: (lr, mean tuning metric, None if all failed). ``values``: final metric per final seed, in seed order,
    None where it failed. ``interval``: 95 % of the mean (t). ``difference``: paired, contender − baseline, with its t
    interval at 95 % before Holm; ``rho``: correlation across seeds with the baseline. ``word``: "baseline", "better",
    "worse", "equivalent", "no significant difference", "under-tuned" or "failed". ``visible``: smallest difference
    this race could have seen (80 % power, metric units); ``more``: how many more seeds until the observed difference
    would be decided, if undecided. ``beside``: what was chosen beside lr, as `Cell.more`. ``clocks``: the verdict by
    the other clocks (R7).
    """

    contender: str
    lr: float
    tuned: tuple[tuple[float, float | None], ...]
    at_edge: bool
    failures: tuple[str, ...]
    values: tuple[float | None, ...]
    mean: float | None
    interval: tuple[float, float] | None
    difference: float | None
    difference_interval: tuple[float, float] | None
    bootstrap_interval: tuple[float, float] | None
    p: float | None
    p_holm: float | None
    rho: float | None
    word: str
    visible: float | None
    more: int | None
    step_seconds: float | None
    state_bytes: int | None
    seconds: float | None
    beside: More = ()
    clocks: tuple[Clock, ...] = ()


@dataclass(frozen=True)
class Result:
    """A finished race: plan, standings (baseline first), the A/A control, every outcome, the lock and the folder.

    ``looks``: at how many other final seeds these contenders were judged before, unplanned. ``report``: the HTML file.
    ``pieces``: the winning stack taken apart, where that was asked.
    """

    plan: Plan
    standings: tuple[Standing, ...]
    aa: Standing
    outcomes: tuple[Outcome, ...]
    lock: Mapping[str, Any]
    folder: Path | None
    looks: tuple[int, ...] = ()
    report: Path | None = None
    pieces: tuple[Piece, ...] = ()
