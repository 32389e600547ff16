"""What a recipe contains: which can be turned into which (R11), and which pieces make a stack (R14)."""

from __future__ import annotations

from etude import recipes
from etude.recipes import Part, Recipe

IDENTITIES = {"plain"}
"""Methods that are what a recipe does without them."""


def includes(contender: str, baseline: str) -> bool:
    """Whether the contender can be turned into the baseline, so that well tuned it would not lose to it.

    Each piece of the baseline stands in the contender, or is what a piece of it becomes at its neutral setting (``off``
    in the catalogue); what the contender has beside can be turned off.
    """
    mine, its = _read(contender), _read(baseline)
    if mine is None or its is None or mine == its:
        return False
    left = list(mine.parts)
    for part in its.parts:
        found = next((p for p in left if p == part), None) or next((p for p in left if _becomes(p, part)), None)
        if found is None:
            return False
        left.remove(found)
    return all(IDENTITIES & {*_ancestors(part)} for part in left)


def without_each(stack: str, baseline: str) -> list[tuple[str, str]]:
    """(piece, the stack without it) for each piece that the baseline does not have; nothing where there is only one.

    A rule cannot be left out: the baseline's takes its place.
    """
    mine, its = _read(stack), _read(baseline)
    if mine is None or its is None:
        return []
    own = [part for part in mine.parts if part not in its.parts]
    rule = [part for part in its.parts if part.room == "rules"]
    found = []
    for part in own if len(own) > 1 else ():
        rest = tuple(p for p in mine.parts if p != part)
        found.append((str(part), str(Recipe((*rule, *rest) if part.room == "rules" else rest))))
    return found


def _becomes(part: Part, other: Part) -> bool:
    return part.room == other.room and other.name in _ancestors(part)


def _ancestors(part: Part) -> list[str]:
    """The method that the neutral setting of a part equals, that one's, and so on."""
    room, name = part.room, part.method.parent
    found: list[str] = []
    while name is not None and name not in found:
        found.append(name)
        name = Part(room, name).method.parent
    return found


def _read(text: str) -> Recipe | None:
    try:
        return recipes.parse(text)
    except (ValueError, TypeError):
        return None  # a command's contender is no recipe
