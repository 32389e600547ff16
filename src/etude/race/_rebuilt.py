"""Values of the race back from their JSON, by the types of their fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def rebuilt(kind: Any, held: Any) -> Any:
    """The value of type ``kind`` behind its ``asdict`` after a trip through JSON; what is unknown to it is left out."""
    origin, inner = get_origin(kind), get_args(kind)
    if held is None:
        return None
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        known = [f.name for f in fields(kind) if f.name in held]
        return kind(**{name: rebuilt(hints[name], held[name]) for name in known})  # type: ignore[operator]
    if origin in (Union, UnionType):
        return rebuilt(next(each for each in inner if each is not type(None)), held)
    if origin is tuple:
        each = [inner[0]] * len(held) if inner[-1] is Ellipsis else inner
        return tuple(rebuilt(one, value) for one, value in zip(each, held))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: rebuilt(inner[1], value) for key, value in held.items()}
    return held
