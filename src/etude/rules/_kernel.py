"""How a chain runs on one piece of work: eagerly, or as one compiled kernel per rule. Both trace the same function."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from etude.rules._rule import Bag, Part

States = list[dict[str, Tensor]]
Numbers = list[dict[str, Any]]
log = logging.getLogger("etude")


class NoKernel(RuntimeError):
    """No kernel could be built here; the message is one line."""


def run(
    parts: Sequence[Part], u: Tensor, g: Tensor, w: Tensor, states: States, numbers: Numbers
) -> tuple[Tensor, Tensor]:
    """The update after the parts, and the gradient as they leave it."""
    for part, state, number in zip(parts, states, numbers):
        u = part(u, g, w, Bag(state), Bag(number))
        if part.on_gradient:
            g = u
    return u, g


_BUILT: dict[Any, Callable[..., None]] = {}


def compiled(
    name: str, structure: tuple[Any, ...], parts: Sequence[Part], g: Tensor, w: Tensor, states: States,
    numbers: Numbers, u: Tensor | None = None,
) -> None:  # fmt: skip
    """w ← w − run(…) as one kernel for this structure of a chain, built once a process, at its first call.

    Sizes are symbols and numbers are tensors, so neither a shape nor a schedule builds it again. The kernel's
    arguments are one flat tuple: nested ones are checked at every call, at five times its cost.
    """
    keys = tuple((tuple(s), tuple(n)) for s, n in zip(states, numbers))
    key = (structure, keys, u is None)
    if key not in _BUILT:
        _BUILT[key] = _build(f"{name}_{len(_BUILT)}", tuple(parts), keys, u is None)
    flat = [x for s, n in zip(states, numbers) for d in (s, n) for x in d.values()]
    _BUILT[key](g, w, *flat) if u is None else _BUILT[key](g, w, *flat, u)


def _build(name: str, parts: tuple[Part, ...], keys: tuple[Any, ...], fresh: bool) -> Callable[..., None]:
    def kernel(g: Tensor, w: Tensor, *flat: Tensor) -> None:
        left = iter(flat)
        states, numbers = [], []
        for state, number in keys:
            states.append({key: next(left) for key in state})
            numbers.append({key: next(left) for key in number})
        u = g if fresh else next(left)
        w.sub_(run(parts, u, g, w, states, numbers)[0])

    # torch counts recompilations per code object: each rule gets its own, or the ninth rule would be refused.
    code = kernel.__code__.replace(co_name=name)
    own = types.FunctionType(code, kernel.__globals__, name, None, kernel.__closure__)
    log.info("etude: building the kernel %s, some seconds, once", name)
    built = torch.compile(own, dynamic=True, fullgraph=True)

    def call(*args: Tensor) -> None:
        try:
            built(*args)
        except (torch._inductor.exc.InductorError, torch._dynamo.exc.BackendCompilerFailed) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise NoKernel(lines[0].strip() if lines else type(error).__name__) from None

    return call


def as_tensors(numbers: Numbers, kept: dict[tuple[int, str], Tensor]) -> Numbers:
    """The numbers as 0-d tensors that live from step to step and are refilled: values, never constants of a kernel."""
    for i, number in enumerate(numbers):
        for key, value in number.items():
            if isinstance(value, Tensor):
                kept[i, key] = value
            elif (i, key) in kept:
                kept[i, key].fill_(value)
            else:
                kept[i, key] = torch.tensor(value, dtype=torch.float64)
    return [{key: kept[i, key] for key in number} for i, number in enumerate(numbers)]
