"""Looking more than once without fooling oneself: looks set before the race, the error rate split over them (R8)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from etude.race._asked import LOOKS
from etude.race._model import Outcome, Plan
from etude.race.verdict import judge


def looks_of(seeds: int) -> tuple[int, ...]:
    """6, 10, 16 and 30 as far as there are seeds, the last at all of them."""
    return (*(n for n in LOOKS if n < seeds), seeds)


def split(looks: Sequence[int], alpha: float) -> list[float]:
    """A share of alpha for each look, in the proportion 1 : 2 : 3 : …

    They sum to alpha, so that all looks together err no more often than one would, whatever the data and however many
    contenders Holm holds together. Early looks, which see least, spend least.
    """
    whole = math.fsum(range(1, len(looks) + 1))
    return [alpha * k / whole for k in range(1, len(looks) + 1)]


def stages(plan: Plan) -> list[Plan]:
    """The plan as it stands at each of its looks; itself where it has none."""
    shares = zip(plan.looks, split(plan.looks, plan.alpha))
    found = [
        replace(plan, alpha=share, final_seeds=plan.final_seeds[:n], aa_seeds=plan.aa_seeds[:n]) for n, share in shares
    ]
    return found or [plan]


def decided(stage: Plan, outcomes: Iterable[Outcome]) -> bool:
    """Whether more seeds could not change any contender's word."""
    (base, *others), _ = judge(stage, outcomes)
    still = [s for s in others if s.word == "no significant difference" and not s.failures]
    return base.word == "failed" or bool(base.failures) or not still


def ended(plan: Plan, outcomes: Sequence[Outcome]) -> Plan:
    """The plan at the look where the race ended: the first that decides every contender, or the last."""
    *early, last = stages(plan)
    return next((stage for stage in early if decided(stage, outcomes)), last)
