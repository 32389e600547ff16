"""What the rules beyond the verdict have to say of a race, as (kind, line): R3, R7, R11, R14."""

from __future__ import annotations

from etude.race._model import Clock, Result, Standing
from etude.race.inclusion import includes


def remarks(result: Result) -> list[tuple[str, str]]:
    """Lines to be read with the verdict."""
    base, *others = result.standings
    lines = [("clock", line) for line in _seconds(others, base)]
    lines += [
        (
            "bad",
            f"{s.contender} can be turned into {base.contender}, so it need not lose: tuning probably insufficient.",
        )
        for s in others
        if s.word in ("worse", "under-tuned") and includes(s.contender, base.contender)
    ]
    lines += [("piece", f"{p.piece}: {p.word} (the stack against {p.without}).") for p in result.pieces]
    return lines


def _seconds(others: list[Standing], base: Standing) -> list[str]:
    """Where the verdict at equal seconds is another than at equal steps."""
    said = []
    for s in others:
        clock = next((c for c in s.clocks if c.name == "seconds"), None)
        if clock is not None and clock.word not in (s.word, "failed"):
            said.append(f"At {base.contender}'s training time {s.contender} reads: {clock.word}{_read_off(clock)}.")
    return said


def _read_off(clock: Clock) -> str:
    """A slower contender is read off a schedule that had not ended."""
    slower = clock.ratio is not None and clock.ratio > 1.01
    return f" (read off its curve after {100 / clock.ratio:.0f} % of its steps)" if slower and clock.ratio else ""
