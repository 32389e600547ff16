"""How a chain runs on one piece of work: eagerly, or as one compiled kernel per rule. Both trace the same function."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


Kernel = Callable[[list[Tensor]], Any]
_CHOSEN: dict[Any, Kernel | NoKernel] = {}
"""What plays a chain's structure at these shapes and types."""
_BUILT: dict[Any, list[tuple[Callable[[list[Tensor]], bool], Kernel | NoKernel]]] = {}
"""For a structure the kernels there are, each with the test of the sizes it was lowered for (more than 4096, say)."""


def play(
    name: str, structure: tuple[Any, ...], parts: Sequence[Part], u: Tensor | None, g: Tensor, w: Tensor,
    states: States, numbers: Numbers, floats: Tensor,
) -> Kernel:  # fmt: skip
    """w ← w − run(…) as one kernel for this structure of a chain, built at its first call, once or twice a process.

    ``u``: None where it is g. ``floats``: the plain numbers, packed. Sizes are symbols and numbers are a tensor, so
    a schedule never builds it again, and another shape only where the compiler chose by size.
    """
    tensors = [x for given in (*states, *numbers) for x in given.values() if isinstance(x, Tensor)]
    args = [g, w, floats, *tensors, *(() if u is None else (u,))]
    if not all(map(Tensor.is_contiguous, args)):
        raise NoKernel("a strided update")
    keys = tuple((tuple(s), tuple((k, isinstance(v, Tensor)) for k, v in n.items())) for s, n in zip(states, numbers))
    kind = (structure, keys, tuple((x.dtype, x.ndim) for x in args), w.device, torch.get_num_threads())
    key = (kind, tuple(x.shape for x in args))
    chosen = _CHOSEN.get(key)
    if chosen is None:
        known = _BUILT.setdefault(kind, [])
        chosen = next((kernel for fits, kernel in known if fits(args)), None)
        if chosen is None:
            log.info("etude: building the kernel of %s, a second or more, once", name)
            lower = importlib.import_module("etude.rules._lower")  # the compiler takes two seconds to import
            chosen = lower.build(tuple(parts), keys, args, known, fresh=u is None)
        _CHOSEN[key] = chosen
    if isinstance(chosen, NoKernel):
        raise chosen
    chosen(args)
    torch.autograd.graph.increment_version(w)  # the kernel writes behind autograd's back
    return chosen


@dataclass(frozen=True)
class Ready:
    """The kernel of one tensor that is updated in place, and all it takes but the gradient and the step's numbers."""

    kernel: Kernel
    at: int
    """Where the weights lie in memory."""
    shape: torch.Size
    w: Tensor
    """The weights as the kernel sees them."""
    state: list[Tensor]
    names: Any
    """What the numbers are called."""
    threads: int

    def fits(self, p: Tensor, g: Tensor) -> bool:
        """Whether the tensors are still what the kernel was chosen for: users replace both."""
        return (
            p.data_ptr() == self.at
            and p.is_contiguous()
            and g.shape == self.shape
            and g.dtype == self.w.dtype
            and g.layout is torch.strided
            and g.is_contiguous()
            and torch.get_num_threads() == self.threads
        )

    def play(self, g: Tensor, floats: Tensor) -> None:
        """w ← w − run(…)."""
        self.kernel([g.view(self.w.shape), self.w, floats, *self.state])
        torch.autograd.graph.increment_version(self.w)


def packed(numbers: Numbers, device: torch.device) -> Tensor:
    """The plain numbers in order, as one float64 tensor."""
    plain = [x for n in numbers for x in n.values() if not isinstance(x, Tensor)]
    return torch.tensor(plain, dtype=torch.float64).to(device)
