"""A race that fits a budget: how many tuning runs, seeds, looks and steps, or what it would take to decide anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from etude.race._asked import FLOOR, LOOKS, Asked, seconds_of
from etude.race._errors import InputError
from etude.race.progress import clock
from etude.race.search import TRIALS

SHORTER = (1.0, 0.75, 0.5, 1 / 3, 0.25)
"""Shares of the steps that a race which may be shortened tries, longest first."""
SPARE = 0.9
"""Of a budget, what is planned with when the steps are chosen: the rest is for the second probe."""


@dataclass(frozen=True)
class Choice:
    """What a budget buys; ``seconds``: predicted, of the clock on the wall, if no look ends the race before."""

    trials: int
    seeds: int
    looks: bool
    steps: int
    seconds: float


def work(seconds: Mapping[str, float], trials: int, seeds: int) -> float:
    """Seconds of all runs one after another; ``seconds``: of a run of each contender, baseline first."""
    costs = list(seconds.values())
    return (trials + seeds) * math.fsum(costs) + seeds * costs[0]  # the A/A control


def fit(
    asked: Asked, seconds: Mapping[str, float], *, steps: int, workers: int, spent: float = 0.0, spare: float = 1.0
) -> Choice:
    """The most that the budget buys: full tuning before many seeds, fewer steps only where that was allowed.

    ``spent``: seconds of the budget that are gone. From 16 seeds on the race is also looked at earlier, so that it may
    end before. What fits nothing is an InputError that says what would do.
    """
    limit = 3600 * asked.gpu_hours if asked.gpu_hours else max(0.0, seconds_of(asked.budget) - spent) * workers
    for share in SHORTER if asked.shorten and asked.steps is None else SHORTER[:1]:
        costs = {name: cost * share for name, cost in seconds.items()}
        for trials in _trials(asked):
            for n in _seeds(asked):
                if (needed := work(costs, trials, n)) <= limit * spare:
                    looks = asked.looks or (asked.seeds is None and n >= LOOKS[2])
                    return Choice(trials, n, looks, max(1, round(steps * share)), needed / workers)
    raise InputError(_too_little(asked, seconds, workers, spent))


def _trials(asked: Asked) -> Iterator[int]:
    """Tuning runs to try: those of the search, and where nobody said how many, down to the least that can choose."""
    search, most = asked.searched
    yield most
    if asked.trials is None:
        yield from (11, 9) if search == "grid" else range(most - 4, TRIALS[0] - 1, -4)


def _seeds(asked: Asked) -> Iterable[int]:
    """Final seeds to try."""
    return [asked.seeds] if asked.seeds else range(LOOKS[-1], FLOOR - 1, -1)


def _too_little(asked: Asked, seconds: Mapping[str, float], workers: int, spent: float) -> str:
    trials, n = min(_trials(asked)), min(_seeds(asked))
    needed = work(seconds, trials, n)
    if asked.gpu_hours:
        given, enough = f"{asked.gpu_hours:g} GPU hours", f"--gpu-hours {math.ceil(needed / 36) / 100:g}"
    else:
        given, enough = f"{asked.budget}", f"--budget {_text(needed / workers * 1.1 + spent)}"
    fewer = "fewer contenders or fewer steps" if asked.shorten else "fewer contenders, or --shorten"
    return (
        f"{given} cannot decide this: the least that can, {trials} tuning and {n} final runs of each of {len(seconds)} "
        f"contenders and {n} A/A runs, takes about {clock(needed / workers)} on {workers} "
        f"worker{'s' * (workers > 1)}; give {enough}, {fewer}"
    )


def _text(seconds: float) -> str:
    """``90s``, ``25m``: rounded up."""
    return f"{math.ceil(seconds)}s" if seconds < 120 else f"{math.ceil(seconds / 60)}m"
