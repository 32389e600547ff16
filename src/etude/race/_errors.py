"""The two ways in which a race says no, each in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What was asked does not exist or does not fit; nothing was written."""

    exit_code = 2


class RaceError(RuntimeError):
    """The machine or the ledger stands in the way; what was finished is kept."""

    exit_code = 1


def nearest(asked: str, known: Iterable[str]) -> str:
    """``"did you mean 'digits'?"``, or all the known names when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(asked, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"there is {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or "no message").splitlines()[0]
