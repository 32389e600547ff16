"""What an error message says of a name that does not exist."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(asked: str, known: Iterable[str]) -> str:
    """The few known names nearest to ``asked``, best first, or "none"."""
    names = list(dict.fromkeys(known))
    return ", ".join(get_close_matches(asked.lower(), names, n=4, cutoff=0.5)) or "none"
