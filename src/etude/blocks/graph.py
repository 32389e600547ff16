"""Graph convolution and its parts. Nodes x: [n, d]; edges: [2, e], rows source and target; messages: [e, d]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.blocks._residual import Residual

MakeNorm = Callable[[int], nn.Module]

_PAPER = "Li et al. 2020, DeeperGCN: All You Need to Train Deeper GCNs, arXiv:2006.07739"


def _hold(module: nn.Module, name: str, value: float | None, learn: bool) -> None:
    """A scalar of the module, or None: a parameter if it learns, else a buffer."""
    scalar = None if value is None else torch.tensor(float(value))
    if learn and scalar is not None:
        module.register_parameter(name, nn.Parameter(scalar))
    else:
        module.register_buffer(name, scalar)


class Aggregation(nn.Module):
    """(messages [e, d], target of each [e], number of nodes n) → [n, d]; a node without messages gets 0."""

    _reshapes = "gathers the messages of many edges at each node"
    scale: Tensor
    y: Tensor | None

    def __init__(self, scale: float, learn: bool, y: float | None):
        super().__init__()
        _hold(self, "scale", scale, learn)
        _hold(self, "y", y, learn)

    def forward(self, messages: Tensor, target: Tensor, n: int) -> Tensor:
        m = messages.to(torch.promote_types(messages.dtype, torch.float32))
        nodes = m.new_zeros(n, m.shape[-1])
        degree = m.new_zeros(n, 1).index_add(0, target, m.new_ones(len(m), 1))
        y = torch.where(degree > 0, self.gather(m, target, nodes, degree), 0.0)
        if self.y is not None:
            y = y * degree ** torch.sigmoid(self.y)
        return y.to(messages.dtype)

    def gather(self, m: Tensor, target: Tensor, nodes: Tensor, degree: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.scale.item():g}" + (f", y={self.y.item():g}" if self.y is not None else "")


def _exp(z: Tensor, target: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """exp(z − the largest z at the same node), and those largest [n, d]."""
    index = target[:, None].expand_as(z)
    top = nodes.scatter_reduce(0, index, z.detach(), "amax", include_self=False)
    return (z - top[target]).exp(), top


class SoftmaxAggregation(Aggregation):
    """Σ softmax(t m) m over the messages m of a node, channel by channel."""

    def gather(self, m: Tensor, target: Tensor, nodes: Tensor, degree: Tensor) -> Tensor:
        e, _ = _exp(self.scale * m, target, nodes)
        # A node with messages has a sum of at least exp(0) = 1.
        return nodes.index_add(0, target, e * m) / nodes.index_add(0, target, e).clamp(min=1)


class PowerAggregation(Aggregation):
    """(mean mᵖ)^(1/p) over the messages m > 0 of a node, channel by channel."""

    def gather(self, m: Tensor, target: Tensor, nodes: Tensor, degree: Tensor) -> Tensor:
        e, top = _exp(self.scale * m.clamp(min=1e-7).log(), target, nodes)
        mean = nodes.index_add(0, target, e) / degree.clamp(min=1)
        root: Tensor = (torch.where(mean > 0, mean, 1.0).log() + top) / self.scale
        return root.exp()


@method(_PAPER)
def softmax_aggregation(t: float = 1.0, learn: bool = False, y: float | None = None) -> SoftmaxAggregation:
    """Σⱼ mⱼ exp(t mⱼ) / Σₖ exp(t mₖ) per channel: t = 0 is the mean, t → ∞ the maximum. (m: [e, d], target: [e], n).

    ``learn``: whether t, and y if given, are trained. ``y``: times (number of messages)^σ(y), between mean and sum.
    The gradient is the function's own; with a fixed t the authors' code holds the softmax constant in it.
    """
    return SoftmaxAggregation(t, learn, y)


@method(_PAPER)
def power_aggregation(p: float = 1.0, learn: bool = False, y: float | None = None) -> PowerAggregation:
    """(meanⱼ mⱼᵖ)^(1/p) per channel: p = 1 is the mean, p → ∞ the maximum. (m > 0: [e, d], target: [e], n).

    ``learn``: whether p, and y if given, are trained. ``y``: times (number of messages)^σ(y), between mean and sum.
    Messages below 1e-7 count as 1e-7. The paper's formula; the authors' code also clamps m and the mean of mᵖ to 10,
    and so has no maximum in the limit.
    """
    if p == 0:
        raise ValueError("power_aggregation takes the root of degree p, so p cannot be 0")
    return PowerAggregation(p, learn, y)


class MessageNorm(nn.Module):
    """s ‖x‖ m / ‖m‖."""

    s: Tensor

    def __init__(self, s: float, learn: bool):
        super().__init__()
        _hold(self, "s", s, learn)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (self.s * length * F.normalize(m, dim=-1)).to(m.dtype)


@method(_PAPER)
def msg_norm(s: float = 1.0, learn: bool = True) -> MessageNorm:
    """s ‖x‖₂ m / ‖m‖₂: what a node is told gets the length of what it holds, times s. (x: [n, d], m: [n, d]).

    ``learn``: whether s is trained. A node that was told nothing, m = 0, stays at 0.
    """
    return MessageNorm(s, learn)


class GenConv(nn.Module):
    """mlp(x + norm(aggregate of relu(x_source + edge features) + eps))."""

    def __init__(self, d: int, out: int, aggregation: nn.Module, message_norm: nn.Module | None, norm: MakeNorm):
        super().__init__()
        self.aggregation, self.message_norm = aggregation, message_norm
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), norm(2 * d), nn.ReLU(), nn.Linear(2 * d, out))

    def forward(self, x: Tensor, edges: Tensor, features: Tensor | None = None) -> Tensor:
        if edges.ndim != 2 or len(edges) != 2:
            raise ValueError(f"gen_conv takes edges [2, e], rows source and target; got {list(edges.shape)}")
        heard = x[edges[0]] if features is None else x[edges[0]] + features
        m = self.aggregation(heard.relu() + 1e-7, edges[1], len(x))
        if self.message_norm is not None:
            m = self.message_norm(x, m)
        return self.mlp(x + m)  # type: ignore[no-any-return]


@method(_PAPER)
def gen_conv(
    d: int,
    out: int | None = None,
    aggregation: nn.Module | None = None,
    message_norm: nn.Module | None = None,
    norm: MakeNorm = nn.BatchNorm1d,
) -> GenConv:
    """mlp(xᵢ + m̂ᵢ), mᵢ the softmax aggregation of relu(xⱼ + edgeⱼᵢ) + 1e-7 over i's neighbours j. [n, d] → [n, out].

    Called with (x, edges [2, e], edge features [e, d] or None). The mlp has one hidden layer of width 2 d, normed.
    ``message_norm``: m̂ = msg_norm of m, else m itself. ``out`` is d unless given.
    """
    return GenConv(d, out or d, aggregation or softmax_aggregation(), message_norm, norm)


@method(_PAPER)
def res_plus(d: int, f: nn.Module, norm: MakeNorm = nn.BatchNorm1d) -> Residual:
    """x + f(relu(norm(x))): pre-activation for graphs, so that nothing bends the residual path. x: [n, d].

    What f takes besides x (edges, their features) is handed on. A stack ends in one norm and one relu.
    """
    return Residual(f, norm_in=nn.Sequential(norm(d), nn.ReLU()))
