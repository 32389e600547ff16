"""The two ways in which a race says no, each in one line."""

from __future__ import annotations


class InputError(ValueError):
    """What was asked does not exist or does not fit; nothing was written."""

    exit_code = 2


class RaceError(RuntimeError):
    """The machine or the ledger stands in the way; what was finished is kept."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or "no message").splitlines()[0]
