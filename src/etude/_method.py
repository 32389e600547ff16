"""Ties a method to its paper.

``@method("Authors year, Title, arXiv:…", off=…)`` is a citation a person reads and a record a program parses. The
value a factory returns is stamped with the factory and its knobs, so that it can print, serialise and rebuild itself.
The registry is computed from the code: nobody keeps a list.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

ROOMS = (
    "init", "weights", "norms", "blocks", "losses", "risks", "penalties", "gradients", "rules", "schedules", "after",
    "probes", "recipes",
)  # fmt: skip
"""The rooms in the order in which data meets them."""

_CITATION = re.compile(
    r"(?P<authors>\S.*?) (?P<year>(?:18|19|20)\d\d), (?P<title>\S.*), (?P<where>arXiv:\S+|doi:\S+|https?://\S+)"
)
_URL = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """One method: where it lives, what it cites, which knobs it has."""

    name: str
    room: str
    family: str
    authors: str
    year: int
    title: str
    url: str
    summary: str
    knobs: Mapping[str, Any]
    off: Callable[[], tuple[Any, Any]] | None
    note: str
    fn: Callable[..., Any] = field(repr=False)

    @property
    def parent(self) -> str | None:
        """The method that the neutral setting must equal, read from ``off``."""
        if self.off is None:
            return None
        stamped = stamp(self.off()[1])
        return stamped.name if stamped and stamped.name != self.name else None


@dataclass(frozen=True)
class Stamp:
    """Which method made a value, with which knobs (defaults filled in)."""

    room: str
    name: str
    knobs: Mapping[str, Any]

    def __str__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self.knobs.items())
        return f"{self.name}({shown})"


_METHODS: dict[tuple[str, str], Method] = {}


def method(citation: str, *, off: Callable[[], tuple[Any, Any]] | None = None, note: str = "") -> Callable[[F], F]:
    """Cite the paper of a factory, a function or a class.

    ``citation``: ``"Authors year, Exact Title, arXiv:id | doi:… | https://…"``; a malformed one raises at import.
    ``off``: returns the neutral setting and the parent it must equal exactly; without one the method is a root.
    ``note``: where the starting value of a knob differs by regime, with its source.
    """
    cited = _CITATION.fullmatch(citation)
    if cited is None:
        raise ValueError(f'citation {citation!r} must read "Authors year, Title, arXiv:id" (or doi:…, https://…)')

    def tie(fn: F) -> F:
        room, family = _place(fn)
        summary = (inspect.getdoc(fn) or "").split("\n\n")[0].replace("\n", " ")
        if not summary:
            raise ValueError(f"{room}.{fn.__name__} needs a docstring: one sentence with the formula")
        scheme, _, rest = cited["where"].partition(":")
        knobs = {k: p.default for k, p in inspect.signature(fn).parameters.items() if p.default is not p.empty}
        tied = _stamping(fn, room)
        _METHODS[room, fn.__name__] = Method(
            fn.__name__, room, family, cited["authors"], int(cited["year"]), cited["title"],
            _URL[scheme] + rest if scheme in _URL else cited["where"], summary, knobs, off, note, tied,
        )  # fmt: skip
        return tied

    return tie


def _place(fn: Callable[..., Any]) -> tuple[str, str]:
    parts = fn.__module__.split(".")
    if len(parts) < 3 or parts[0] != "etude" or parts[1] not in ROOMS:
        return "yours", parts[-1]  # a method of the user's own, outside the house
    return parts[1], parts[2]


def _stamping(fn: F, room: str) -> F:
    """The same callable, whose values carry a Stamp. A class stays the same class; tensors are never stamped."""
    signature = inspect.signature(fn)
    target = fn.__init__ if inspect.isclass(fn) else fn

    @functools.wraps(target)
    def make(*args: Any, **kwargs: Any) -> Any:
        value = target(*args, **kwargs)
        made = args[0] if inspect.isclass(fn) else value
        if not isinstance(made, torch.Tensor) and hasattr(made, "__dict__"):
            bound = signature.bind(*(args[1:] if inspect.isclass(fn) else args), **kwargs)
            bound.apply_defaults()
            object.__setattr__(made, "_stamp", Stamp(room, fn.__name__, dict(bound.arguments)))
        return value

    if inspect.isclass(fn):
        fn.__init__ = make  # type: ignore[method-assign]
        return fn
    return make  # type: ignore[return-value]


def stamp(value: Any) -> Stamp | None:
    """Which method made this value, or None."""
    if isinstance(value, functools.partial):
        found = find_method(getattr(value.func, "__name__", ""), of=value.func)
        return Stamp(found.room, found.name, {**found.knobs, **value.keywords}) if found else None
    made = getattr(value, "__dict__", {}).get("_stamp")
    if made is None and callable(value):
        found = find_method(getattr(value, "__name__", ""), of=value)
        made = Stamp(found.room, found.name, dict(found.knobs)) if found else None
    return made


def find_method(name: str, of: Any) -> Method | None:
    """The record of the callable ``of``, if it is a method's."""
    return next((m for m in _METHODS.values() if m.name == name and m.fn is of), None)


def methods() -> dict[tuple[str, str], Method]:
    """Every method of the house by (room, name), in the order of the rooms. Computed: all rooms are imported."""
    for room in ROOMS:
        package = importlib.import_module(f"etude.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"etude.{room}.{module.name}")
    found = [m for m in _METHODS.values() if m.room in ROOMS]
    return {(m.room, m.name): m for m in sorted(found, key=lambda m: (ROOMS.index(m.room), m.family))}
