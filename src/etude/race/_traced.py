"""A step as a graph of plain operations, and that graph as kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

Step = Callable[..., Any]


@dataclass(frozen=True)
class Program:
    """What plays a step without its Python. It holds no weights, so every population of one make may play it."""

    play: Step
    operations: int


def traced(play: Step, args: tuple[Any, ...], *, compiled: bool) -> Program:
    """``play`` as a program for arguments of these shapes; it changes its arguments in place as ``play`` does."""
    flat, spec = tree_flatten(args)

    def flatly(*xs: Tensor) -> Any:
        return play(*tree_unflatten(list(xs), spec))

    with torch.no_grad():
        graph = make_fx(flatly, tracing_mode="fake")(*flat)
        _pare(graph)
        count = len(graph.graph.nodes)
        if not compiled:
            graph.recompile()
            return Program(lambda *xs: graph.forward(*tree_flatten(xs)[0]), count)
        inductor = [importlib.import_module(f"torch._inductor.{x}") for x in ("compile_fx", "decomposition", "config")]
        compiler, decomposition, config = inductor  # two seconds to import
        functional = torch.func.functionalize(graph, remove="mutations_and_views")
        table = decomposition.select_decomp_table()
        graph = make_fx(functional, decomposition_table=table, tracing_mode="fake")(*flat)
        fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        with tracing(TracingContext(fakes[0].fake_mode)), config.patch(size_asserts=False):
            kernel: Any = compiler.compile_fx_inner(graph, fakes)
    return Program(lambda *xs: kernel(list(tree_flatten(xs)[0])), count)


def _pare(graph: torch.fx.GraphModule) -> None:
    """Take out what does nothing here: ``detach``, and views of the shape that was there."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        view = node.target in (aten.view.default, aten._unsafe_view.default, aten.expand.default)
        if node.target == aten.detach.default or (view and _same(node.meta["val"], node.args[0].meta["val"])):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.stride() == y.stride()
