"""How a chain runs on one piece of work: eagerly, or as one compiled kernel per rule. Both trace the same function.

The kernel is traced here and lowered by the compiler behind ``torch.compile``, without the machinery around it that
checks every argument at every call: a call costs 3 µs instead of 30. The checks run once for each set of shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx.experimental._config as size_settings
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

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
) -> None:  # fmt: skip
    """w ← w − run(…) as one kernel for this structure of a chain, built at its first call, once or twice a process.

    ``u``: None where it is g. ``floats``: the plain numbers, packed. Sizes are symbols and numbers are a tensor, so
    a schedule never builds it again, and another shape only where the compiler chose by size.
    """
    tensors = [x for given in (*states, *numbers) for x in given.values() if isinstance(x, Tensor)]
    args = [g, w, floats, *tensors, *(() if u is None else (u,))]
    if not all(x.is_contiguous() for x in args):
        raise NoKernel("a strided update")
    keys = tuple((tuple(s), tuple((k, isinstance(v, Tensor)) for k, v in n.items())) for s, n in zip(states, numbers))
    kind = (structure, keys, tuple(x.dtype for x in args), w.device, torch.get_num_threads())
    key = (kind, tuple(x.shape for x in args))
    chosen = _CHOSEN.get(key)
    if chosen is None:
        known = _BUILT.setdefault(kind, [])
        chosen = next((kernel for fits, kernel in known if fits(args)), None)
        if chosen is None:
            log.info("etude: building the kernel of %s, a second or more, once", name)
            chosen = _build(tuple(parts), keys, args, known, fresh=u is None)
        _CHOSEN[key] = chosen
    if isinstance(chosen, NoKernel):
        raise chosen
    chosen(args)
    torch.autograd.graph.increment_version(w)  # the kernel writes behind autograd's back


def packed(numbers: Numbers, device: torch.device) -> Tensor:
    """The plain numbers in order, as one float64 tensor."""
    plain = [x for n in numbers for x in n.values() if not isinstance(x, Tensor)]
    return torch.tensor(plain, dtype=torch.float64).to(device)


def _build(
    parts: tuple[Part, ...], keys: tuple[Any, ...], args: list[Tensor], known: list[Any], *, fresh: bool
) -> Kernel | NoKernel:
    def kernel(g: Tensor, w: Tensor, floats: Tensor, *tensors: Tensor) -> tuple[()]:
        left, scalars = iter(tensors), iter(floats.unbind(0))
        states = [{key: next(left) for key in state} for state, _ in keys]
        numbers = [{key: next(left if tensor else scalars) for key, tensor in number} for _, number in keys]
        u = g if fresh else next(left)
        w.sub_(run(parts, u, g, w, states, numbers)[0])
        return ()

    try:
        functional = torch.func.functionalize(kernel, remove="mutations_and_views")
        # or two axes that happen to be equal would be taken for one
        with size_settings.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            trace = make_fx(functional, decomposition_table=select_decomp_table(), tracing_mode="symbolic")
            graph = trace(*args)
        fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        sizes = fakes[0].fake_mode.shape_env
        with tracing(TracingContext(fakes[0].fake_mode)), torch._inductor.config.patch(size_asserts=False):
            built: Kernel = compile_fx_inner(graph, fakes)
        code = sizes.produce_guards_expression(fakes)
        known.append((lambda xs: code is None or bool(sizes.evaluate_guards_expression(code, xs)), built))
        return built
    except Exception as error:  # a part that is wrong raises again, and better, when it is played eagerly
        lines = [line for line in str(error).splitlines() if line.strip()]
        failed, ones = NoKernel(lines[0].strip() if lines else type(error).__name__), _ones(args)
        known.append((lambda xs: _ones(xs) == ones, failed))  # not tried again for each shape
        return failed


def _ones(args: list[Tensor]) -> list[list[bool]]:
    """Which axes are of size one: those are never symbols."""
    return [[n == 1 for n in x.shape] for x in args]
