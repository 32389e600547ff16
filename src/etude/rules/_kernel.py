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
        if u.shape != w.shape:
            raise ValueError(f"{part} made an update of shape {tuple(u.shape)} for weights of shape {tuple(w.shape)}")
        if part.on_gradient:
            g = u
    return u, g


_BUILT: dict[Any, Callable[..., None]] = {}
_CANNOT = (
    torch._inductor.exc.InductorError,
    torch._dynamo.exc.BackendCompilerFailed,
    torch._dynamo.exc.FailOnRecompileLimitHit,
)
"""What a build that fails raises; nothing has moved then."""
_OPTIONS: dict[str, Any] = {"size_asserts": False}  # the compiler's guards check sizes already, at every call


def compiled(
    name: str, structure: tuple[Any, ...], parts: Sequence[Part], states: States, numbers: Numbers, *, fresh: bool
) -> Callable[..., None]:
    """w ← w − run(…) as one kernel for this structure of a chain, built once a process, at its first call.

    It takes g, w, the packed numbers, the tensors among states and numbers in order, and u unless ``fresh``, when u is
    g. Sizes are symbols and numbers are a tensor, so neither a shape nor a schedule builds it again; the arguments are
    few and flat because each one is checked at every call.
    """
    keys = tuple((tuple(s), tuple((k, isinstance(v, Tensor)) for k, v in n.items())) for s, n in zip(states, numbers))
    key = (structure, keys, fresh)
    if key not in _BUILT:
        _BUILT[key] = _build(f"{name}_{len(_BUILT)}", tuple(parts), keys, fresh)
    return _BUILT[key]


def packed(numbers: Numbers) -> Tensor:
    """The plain numbers in order, as one float64 tensor."""
    return torch.tensor([x for n in numbers for x in n.values() if not isinstance(x, Tensor)], dtype=torch.float64)


def _build(name: str, parts: tuple[Part, ...], keys: tuple[Any, ...], fresh: bool) -> Callable[..., None]:
    def kernel(g: Tensor, w: Tensor, packed: Tensor, *tensors: Tensor) -> None:
        left, scalars = iter(tensors), iter(packed.unbind(0))
        states = [{key: next(left) for key in state} for state, _ in keys]
        numbers = [{key: next(left if tensor else scalars) for key, tensor in number} for _, number in keys]
        u = g if fresh else next(left)
        w.sub_(run(parts, u, g, w, states, numbers)[0])

    # torch counts recompilations per code object: each rule gets its own, or the ninth rule would be refused.
    code = kernel.__code__.replace(co_name=name)
    own = types.FunctionType(code, kernel.__globals__, name, None, kernel.__closure__)
    log.info("etude: building the kernel %s, some seconds, once", name)
    built = torch.compile(own, dynamic=True, fullgraph=True, options=_OPTIONS)

    def call(*args: Tensor) -> None:
        try:
            built(*args)
        except _CANNOT as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise NoKernel(lines[0].strip() if lines else type(error).__name__) from None

    return call
