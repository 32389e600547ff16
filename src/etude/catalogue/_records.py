"""One plain dict per method, safe for JSON."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from etude._method import Method, methods, stamp
from etude._words import nearest
from etude.catalogue._tests import assign, paper_tests

Record = dict[str, Any]
_PACKAGE = Path(__file__).parents[1]


def records() -> list[Record]:
    """Every method, in the order of the rooms."""
    found = methods()
    tests = {
        room: assign(tests, (name for place, name in found if place == room)) for room, tests in paper_tests().items()
    }
    with torch.random.fork_rng(devices=[]):  # an off pair may draw weights: reading a catalogue must not
        return [_record(m, found, tests.get(m.room, {}).get(m.name, [])) for m in found.values()]


def lookup(name: str, among: list[Record] | None = None) -> Record:
    """The one method called ``name`` or ``room.name``; none, or more than one, is an error that names the nearest."""
    among = records() if among is None else among
    hits = [r for r in among if name in (r["name"], f"{r['room']}.{r['name']}")]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise ValueError(f"{name!r} stands in {len(hits)} rooms; say {' or '.join(_full(r) for r in hits)}")
    known = [_full(r) if "." in name else r["name"] for r in among]
    raise ValueError(f"no method {name!r}; nearest: {nearest(name, known)}; `etude list` shows all {len(among)}")


def _full(record: Record) -> str:
    return f"{record['room']}.{record['name']}"


def _record(m: Method, found: Mapping[tuple[str, str], Method], tests: list[str]) -> Record:
    _, _, details = (inspect.getdoc(m.fn) or "").partition("\n\n")
    return {
        "name": m.name,
        "room": m.room,
        "family": m.family,
        "title": m.title,
        "authors": m.authors,
        "year": m.year,
        "url": m.url,
        "summary": m.summary,
        "details": details,
        "call": f"{m.room}.{m.name}{_signature(m.fn)}",
        "parent": m.parent,
        "off": " = ".join(_text(side, found) for side in m.off()) if m.off else None,
        "knobs": {k: _plain(v) for k, v in m.knobs.items()},
        "note": m.note,
        "source": _source(m.fn),
        "tests": tests,
    }


@functools.cache
def _signature(fn: Callable[..., Any]) -> str:
    signature = inspect.signature(fn)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


@functools.cache
def _source(fn: Callable[..., Any]) -> str:
    code = inspect.unwrap(fn)
    path = Path(inspect.getsourcefile(code) or "").relative_to(_PACKAGE.parent)
    return f"{path.as_posix()}:{inspect.getsourcelines(code)[1]}"


def _text(value: Any, found: Mapping[tuple[str, str], Method]) -> str:
    """A stamped value as one would write it: its name and the knobs that are not at their defaults."""
    made = stamp(value)
    if made is None:
        return getattr(value, "__name__", None) or repr(value)
    defaults = found[made.room, made.name].knobs
    told = {k: v for k, v in made.knobs.items() if k not in defaults or not _same(v, defaults[k])}
    return f"{made.name}({', '.join(f'{k}={v!r}' for k, v in told.items())})"


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _plain(value: Any) -> Any:
    """A knob's default as JSON knows it; what it does not know is spelled out."""
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    made = stamp(value)
    return str(made) if made else getattr(value, "__name__", None) or str(value)
