"""What writes to the input of a norm and what reads its output, found in the graph that autograd records.

So a model is known by what it computes on an example, not by what its layers are called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Node = Any
"""An operation in the graph. Axes are counted from 0, in the shape of what it makes."""

_ALIKE = ("AddBackward0", "SubBackward0", "CloneBackward0", "AliasBackward0", "ToCopyBackward0", "ExpandBackward0")
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
SUMS = ("AddBackward0", "SubBackward0", "CatBackward0")
LINEAR = {"AddmmBackward0": (1, 2, 0), "MmBackward0": (0, 1, None), "ConvolutionBackward0": (0, 1, 2)}
"""Where their inputs stand: what they act on, weight, bias. Axis 1 of what they make and act on has the features."""


class Mark(torch.autograd.Function):
    """x, leaving a trace in the graph of the norm whose input or output it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, side: str) -> Tensor:
        ctx.spot, ctx.shape = (name, side), x.shape
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


class Graph:
    """One run of the model in eval mode: every operation on the way from a parameter to an output."""

    def __init__(self, model: nn.Module, inputs: Any, norms: Mapping[str, nn.Module]):
        self.users: dict[Node, list[tuple[Node, int]]] = {}
        self.marks: dict[tuple[str, str], list[Node]] = {}
        with _marked(model, norms):
            made = [t for t in tree_leaves(run(model, inputs)) if isinstance(t, Tensor) and t.grad_fn is not None]
        self.outputs: set[Node] = {t.grad_fn for t in made}
        todo, seen = [*self.outputs], {*self.outputs}
        while todo:
            node = todo.pop()
            if hasattr(node, "spot"):
                self.marks.setdefault(node.spot, []).append(node)
            for i, (source, _) in enumerate(node.next_functions):
                if source is not None:
                    self.users.setdefault(source, []).append((node, i))
                    todo += [source] * (source not in seen)
                    seen.add(source)

    def readers(self, name: str, axis: int) -> list[Node] | None:
        """The linear operations that read this norm's output along its features; None if anything else reads it."""
        found: list[Node] = []
        todo = [(mark, axis % len(mark.shape)) for mark in self.marks.get((name, "out"), ())]
        while todo:
            node, at = todo.pop()
            if node in self.outputs:
                return None
            for user, i in self.users.get(node, ()):
                if user.name() in LINEAR and LINEAR[user.name()][0] == i and at == 1 and plain(user):
                    found.append(user)
                    continue
                to = None if user.name() in SUMS else route(user, i)
                then = None if to is None else to[at]
                if then is None:
                    return None
                todo.append((user, then))
        return found

    def leaf(self, node: Node, i: int, at: int) -> tuple[nn.Parameter, int] | None:
        """The parameter that is the i-th input of an operation and of no other, and its axis for axis ``at`` there."""
        source = node.next_functions[i][0]
        while source is not None and self.users[source] == [(node, i)]:
            if hasattr(source, "variable"):
                return source.variable, at
            to = route(source, 0)
            if to is None or at not in to:
                return None
            node, i, at = source, 0, to.index(at)
            source = node.next_functions[0][0]
        return None


class Written:
    """All that is summed up in the inputs of these norms (name → axis of the features), traced back to parameters."""

    def __init__(self, graph: Graph, norms: Mapping[str, int]):
        self.graph = graph
        self.axes: dict[Node, int] = {}
        self.leaves: dict[nn.Parameter, int] = {}
        self._seen: set[tuple[Node, int]] = set()
        self._names = {*norms}
        self._todo = []
        for name, axis in norms.items():
            if not (marks := graph.marks.get((name, "in"))):
                raise ValueError("nothing that a parameter makes reaches it")
            self._todo += [(mark, 0, axis % len(mark.shape)) for mark in marks]
        while self._todo:
            self._follow(*self._todo.pop())

    def _follow(self, user: Node, i: int, at: int) -> None:
        source = user.next_functions[i][0]
        self._seen.add((user, i))
        if self.axes.setdefault(source, at) != at:
            raise ValueError("it is read along two axes")
        kind = source.name()
        if hasattr(source, "variable"):
            if not isinstance(source.variable, nn.Parameter):
                raise ValueError("the input of the model itself is written to it")
            self.leaves[source.variable] = at
        elif kind in LINEAR and at == 1 and plain(source, grouped=True):
            _, weight, bias = LINEAR[kind]
            self._todo.append((source, weight, 0 if kind.startswith("Conv") else 1))
            if bias is not None and source.next_functions[bias][0] is not None:
                self._todo.append((source, bias, 0))
        elif kind == "EmbeddingBackward0" and at == len(shape(source)) - 1:
            self._todo.append((source, 0, 1))
        else:
            for j in range(1 if kind in ("MulBackward0", "DivBackward0") else len(source.next_functions)):
                to = route(source, j)
                if source.next_functions[j][0] is None:
                    raise ValueError("something that no parameter made is written to it")
                if to is None or at not in to:
                    raise ValueError(f"{kind.removesuffix('Backward0')} writes to it")
                self._todo.append((source, j, to.index(at)))

    def leak(self, names: Mapping[int, str]) -> str:
        """What else reads the sum or a part of it, or "". ``names``: the parameters' by id."""
        for node in self.axes:
            what = names[id(node.variable)] if hasattr(node, "variable") else "the stream"
            if node in self.graph.outputs:
                return f"{what} is an output of the model"
            for user, i in self.graph.users[node]:
                if (user, i) not in self._seen and getattr(user, "spot", ("", ""))[0] not in self._names:
                    return f"{what} is read by {user.name().removesuffix('Backward0')}"
        return ""


def plain(node: Node, grouped: bool = False) -> bool:
    """Whether a linear operation is a matrix or a convolution, and a bias, with nothing special about it."""
    if node.name() == "ConvolutionBackward0":
        return not node._saved_transposed and bool(grouped or node._saved_groups == 1)
    return bool(node.name() == "MmBackward0" or node._saved_alpha == node._saved_beta == 1)


def shape(node: Node, which: int = 0) -> tuple[int, ...]:
    if hasattr(node, "spot"):
        return tuple(node.shape)
    return tuple(node.variable.shape) if hasattr(node, "variable") else tuple(node._input_metadata[which].shape)


def route(node: Node, i: int) -> list[int | None] | None:
    """To which axis of what it makes an operation takes each axis of its i-th input, None if it acts along it.

    None instead of a list: it is not one that only moves numbers about and sums them.
    """
    if len(node.next_functions) <= i or node.next_functions[i][0] is None:
        return None
    kind = node.name()
    out, into = shape(node), shape(*node.next_functions[i])
    n = len(into)
    same: list[int | None] = list(range(n))
    match kind:
        case "MulBackward0" | "DivBackward0" if node.next_functions[1][0] is None and node._saved_other.numel() == 1:
            return same
        case "CatBackward0" | "SliceBackward0":
            return [p if p != _dim(node._saved_dim, n) else None for p in range(n)]
        case "SelectBackward0":
            gone = _dim(node._saved_dim, n)
            return [None if p == gone else p - (p > gone) for p in range(n)]
        case "UnsqueezeBackward0":
            return [p + (p >= _dim(node._saved_dim, n + 1)) for p in range(n)]
        case "MeanBackward1":
            gone_too = {_dim(d, n) for d in node._saved_dim}
            kept = node._saved_keepdim
            return [None if p in gone_too else p - (0 if kept else sum(g < p for g in gone_too)) for p in range(n)]
        case "TBackward0":
            return same[::-1]
        case "TransposeBackward0":
            a, b = _dim(node._saved_dim0, n), _dim(node._saved_dim1, n)
            same[a], same[b] = b, a
            return same
        case "PermuteBackward0":
            return [[_dim(d, n) for d in node._saved_dims].index(p) for p in range(n)]
    if kind in _ALIKE:
        more = len(out) - n
        return [p + more if into[p] == out[p + more] else None for p in range(n)]
    if kind in _VIEWS:
        starts = {(math.prod(out[:q]), size): q for q, size in reversed([*enumerate(out)])}
        return [starts.get((math.prod(into[:p]), into[p])) for p in range(n)]
    return None


def _dim(saved: int, n: int) -> int:
    """An axis as autograd saves it, negative ones modulo 2⁶⁴."""
    return (saved - 2**64 if saved >= 2**63 else saved) % n


def run(model: nn.Module, inputs: Any) -> Any:
    args, named = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    return model(*args, **named)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in eval; then as it was."""
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def _marked(model: nn.Module, norms: Mapping[str, nn.Module]) -> Iterator[None]:
    """Every parameter requires a gradient, and the norms mark what goes in and what comes out."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    hooks: list[Any] = []
    for name, m in norms.items():
        hooks += _hooks(name, m)
    try:
        _require(frozen, True)
        with at_rest(model), torch.enable_grad():
            yield
    finally:
        _require(frozen, False)
        for hook in hooks:
            hook.remove()


def _hooks(name: str, m: nn.Module) -> list[Any]:
    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (Mark.apply(args[0], name, "in"), *args[1:])  # type: ignore[no-untyped-call]

    def after(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        return Mark.apply(y, name, "out")  # type: ignore[no-untyped-call, no-any-return]

    return [m.register_forward_pre_hook(before), m.register_forward_hook(after)]


def _require(parameters: Iterable[nn.Parameter], grad: bool) -> None:
    for p in parameters:
        p.requires_grad_(grad)
