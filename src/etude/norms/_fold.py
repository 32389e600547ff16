"""The matrices beside a norm, and what of a norm can be put into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etude._roles import _is_transposed_linear
from etude.norms._norm import Norm
from etude.norms._stream import LINEAR, SUMS, Graph, Node, plain, route
from etude.norms._swap import _twin
from etude.norms._trial import Trial
from etude.norms.running import UnifiedNorm

_SIZES = ((nn.Linear, -2, "out_features"), (nn.Linear, -1, "in_features"), (nn.Embedding, -1, "embedding_dim"))


@dataclass(frozen=True)
class Matrix:
    """A weight that one layer alone uses, the axis of its that meets the norm, and its bias."""

    weight: nn.Parameter
    axis: int
    bias: nn.Parameter | None
    owner: nn.Module | None


def affine_on(m: nn.Module) -> tuple[int, nn.Module] | None:
    """The axis of the features of a norm that multiplies or adds something fixed, and what is left without that."""
    t = _twin(m)
    if isinstance(m, UnifiedNorm):
        return -1, nn.Identity()
    if type(t) is not Norm:
        return None
    if t.momentum is not None:
        return (1, nn.Identity()) if t.pattern == "b c ... -> c" and t.center else None
    bare = Norm(t.pattern, t.features, t.center, t.eps, "none", **t.sizes)
    return (t.axis, bare) if t.modulation != "none" else None


def affine(m: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of what `affine_on` takes off, in float64."""
    some = next(t for t in (m.weight, m.bias, getattr(m, "running_var", None)) if t is not None)
    scale = torch.ones_like(some, dtype=torch.float64) if m.weight is None else m.weight.detach().double()
    shift = torch.zeros_like(scale) if getattr(m, "bias", None) is None else m.bias.detach().double()
    if isinstance(m, UnifiedNorm):
        scale = scale * (m.running_square.double() + m.eps).rsqrt()
    elif getattr(m, "running_var", None) is not None:
        scale = scale * (m.running_var.double() + m.eps).rsqrt()
        shift = shift - scale * m.running_mean.double()
    return scale, shift


def matrices_after(
    model: nn.Module, graph: Graph, readers: list[Node], shift: Tensor, own: bool = False
) -> list[Matrix] | None:
    """The matrices of these operations, if the shift can go into all of them; own: of linear layers that own them."""
    found = []
    for node in readers:
        conv = node.name() == "ConvolutionBackward0"
        matrix = _matrix(model, graph, node, 1 if conv else 0)
        if matrix is None or (own and not _is_linear(matrix.owner)):
            return None
        padded = conv and any(node._saved_padding)
        if shift.any() and (padded or (matrix.bias is None and matrix.owner is None)):
            return None
        found.append(matrix)
    return found


def matrix_before(model: nn.Module, graph: Graph, name: str, axis: int, shift: Tensor) -> Matrix | None:
    """The matrix whose product, and nothing else, this norm reads."""
    marks = graph.marks.get((name, "in"), [])
    if len(marks) != 1:
        return None
    node, at = marks[0], axis % len(marks[0].shape)
    source = node.next_functions[0][0]
    while source is not None and graph.users[source] == [(node, 0)] and source not in graph.outputs:
        if source.name() in LINEAR and at == 1 and plain(source, grouped=True):
            matrix = _matrix(model, graph, source, 0 if source.name() == "ConvolutionBackward0" else 1)
            lost = matrix is None or (shift.any() and matrix.bias is None and matrix.owner is None)
            return None if lost else matrix
        to = None if source.name() in SUMS else route(source, 0)
        if to is None or at not in to:
            return None
        node, at = source, to.index(at)
        source = node.next_functions[0][0]
    return None


def _matrix(model: nn.Module, graph: Graph, node: Node, at: int) -> Matrix | None:
    """The weight of a linear operation, with its axis for axis ``at`` of what the operation multiplies by."""
    _, weight_at, bias_at = LINEAR[node.name()]
    leaf = graph.leaf(node, weight_at, at)
    if leaf is None:
        return None
    owner = next((m for m in model.modules() if any(p is leaf[0] for p in m._parameters.values())), None)
    owner = owner if _is_linear(owner) or isinstance(owner, nn.modules.conv._ConvNd) else None
    if bias_at is not None and node.next_functions[bias_at][0] is not None:
        bias = graph.leaf(node, bias_at, 0)
        return None if bias is None else Matrix(*leaf, bias[0], owner)
    return None if getattr(owner, "bias", None) is not None else Matrix(*leaf, None, owner)


def _is_linear(m: nn.Module | None) -> bool:
    return isinstance(m, nn.Linear) or (m is not None and _is_transposed_linear(m))


def fold_forward(matrices: list[Matrix], scale: Tensor, shift: Tensor, trial: Trial) -> None:
    """W ← W · scale along its input, b ← b + W shift."""
    for m in matrices:
        exact = m.weight.data.double()
        along = [-1 if i == m.axis else 1 for i in range(exact.ndim)]
        added = (exact * shift.view(along)).sum([i for i in range(exact.ndim) if i != 1 - m.axis])
        _rebias(m, 1.0, added, trial)
        trial.set(m.weight, "data", (exact * scale.view(along)).to(m.weight.dtype))


def fold_back(m: Matrix, scale: Tensor, shift: Tensor, trial: Trial) -> None:
    """W ← scale · W along its output, b ← scale · b + shift."""
    along = [-1 if i == m.axis else 1 for i in range(m.weight.ndim)]
    trial.set(m.weight, "data", (m.weight.data.double() * scale.view(along)).to(m.weight.dtype))
    _rebias(m, scale, shift, trial)


def _rebias(m: Matrix, scale: Tensor | float, shift: Tensor, trial: Trial) -> None:
    """b ← scale · b + shift; a layer without a bias gets one."""
    bias = getattr(m.owner, "bias", None) if m.bias is None else m.bias
    if bias is not None:
        trial.set(bias, "data", (bias.data.double() * scale + shift).to(bias.dtype))
    elif shift.any():
        trial.set(m.owner, "bias", nn.Parameter(shift.to(m.weight.dtype)))


def resize(model: nn.Module, p: nn.Parameter, axis: int, trial: Trial) -> None:
    """Layers say the sizes of their weights."""
    trial.set(p, "grad", None)
    for m in model.modules():
        if any(p is q for q in m._parameters.values()) and p.ndim > 1:
            for kind, at, size in _SIZES:
                if isinstance(m, kind) and at % p.ndim == axis % p.ndim:
                    trial.set(m, size, p.shape[axis])
            if isinstance(m, nn.modules.conv._ConvNd):
                trial.set(m, "out_channels", p.shape[0])
            if _is_transposed_linear(m):
                trial.set(m, "nf" if axis % 2 else "nx", p.shape[axis])
