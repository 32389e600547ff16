"""A winning stack taken apart: raced again without each of its pieces, on fresh seeds (R14)."""

from __future__ import annotations

from dataclasses import replace

from etude.race._asked import Asked
from etude.race._model import Piece, Result
from etude.race.inclusion import without_each

NO_SIGN = "no sign that it pays"
WORDS = {"worse": "pays", "under-tuned": "pays", "better": "harms"}
"""The stack without a piece, judged against the whole: what that says of the piece."""


def winner(result: Result) -> str | None:
    """The contender that beats the baseline by most, or None."""
    sign = 1 if result.plan.minimize else -1
    better = [s for s in result.standings if s.word == "better"]
    return min(better, key=lambda s: (sign * (s.difference or 0.0), s.contender)).contender if better else None


def apart(asked: Asked, stack: str, result: Result) -> Asked:
    """The race of the whole stack against itself without each piece. Its seeds have decided nothing yet (R4)."""
    names = [rest for _, rest in without_each(stack, result.plan.baseline)]
    used, count = asked.skip + len(result.plan.final_seeds), len(result.plan.final_seeds)
    return replace(
        asked, contenders=(stack, *names), baseline=None, seeds=count, skip=used, looks=False, budget=None,
        gpu_hours=None, trials=result.plan.tune_budget, steps=result.plan.steps, shorten=False, barnacles=False,
    )  # fmt: skip


def pieces(stack: str, baseline: str, result: Result) -> tuple[Piece, ...]:
    """What each piece is worth, from the race of the stack against itself without it.

    A piece whose worth lies inside the range that counts as equivalent does not pay, however sure it is.
    """
    found, margin = [], result.plan.rope * abs(result.standings[0].mean or 0.0)
    for piece, rest in without_each(stack, baseline):
        s = next(s for s in result.standings if s.contender == rest)
        inside = s.difference_interval is not None and max(map(abs, s.difference_interval)) <= margin
        word = "breaks without it" if s.word == "failed" else NO_SIGN if inside else WORDS.get(s.word, NO_SIGN)
        found.append(Piece(piece, rest, word, s.difference, s.difference_interval, s.p_holm))
    return tuple(found)
