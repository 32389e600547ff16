"""Every knob matters: turn it and the play differs. Read from the signatures; no code per method.

``plays/<room>.py`` has ``make(method, **knobs)`` and ``play(value)``. Where a knob needs company (``nesterov`` needs
``momentum``) or cannot be turned by its type alone, ``TURNS["method.knob"]`` there names two settings that must differ.
"""

import importlib
import inspect
import types
import typing

import pytest
import torch

from etude._method import methods


def turned(value, hint):
    """Other settings of one knob, near the default and inside its usual range."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next((c for c in choices if c is not type(None)), hint)
        return turned({bool: False, int: 0, float: 0.0}.get(hint) if value is None else value, hint)
    if typing.get_origin(hint) is typing.Literal:
        return [c for c in choices if c != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int) and hint is not float:
        return [value + 1]
    if isinstance(value, (int, float)):
        return [0.1 if value == 0 else 1 - 1.7 * (1 - value) if 0.6 < value < 1 else 1.7 * value]
    if isinstance(value, tuple):
        hints = choices if len(choices) == len(value) else (type(value[0]),) * len(value)
        return [(*value[:i], t, *value[i + 1 :]) for i in range(len(value)) for t in turned(value[i], hints[i])]
    return []


def cases():
    for m in methods().values():
        hints = typing.get_type_hints(inspect.unwrap(m.fn.__init__ if inspect.isclass(m.fn) else m.fn))
        for knob, default in m.knobs.items():
            yield pytest.param(m, knob, default, hints.get(knob), id=f"{m.room}.{m.name}.{knob}")


@pytest.mark.parametrize("m, knob, default, hint", [*cases()])
def test_every_knob_matters(m, knob, default, hint):
    plays = importlib.import_module(f"plays.{m.room}")
    named = getattr(plays, "TURNS", {}).get(f"{m.name}.{knob}")
    pairs = [named] if named else [({}, {knob: other}) for other in turned(default, hint)]
    assert pairs, f"cannot turn {knob}={default!r} by its type; name two settings in plays.{m.room}.TURNS"

    def play(knobs):
        torch.manual_seed(0)
        return plays.play(plays.make(m, **knobs))

    for before, after in pairs:
        assert torch.equal(play(before), play(before)), "the play itself must be deterministic"
        one, other = play(before), play(after)
        assert other.isfinite().all()
        assert one.shape != other.shape or not torch.equal(one, other), f"{before} and {after} play alike"
