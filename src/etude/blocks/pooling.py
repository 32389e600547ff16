"""Pooling of windows, [b, c, h, w] → [b, c, h′, w′], with masks that all channels and places of the layer share.

As in the authors' code a window that hangs over the border counts only what is inside (torch's ``ceil_mode``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method


class Pool(nn.Module):
    """k × k windows, ``stride`` apart; the kinds differ in what they make of a window."""

    _role = "vector"
    _reshapes = "a window becomes one value, so height and width shrink"

    def __init__(self, kernel_size: int, stride: int):
        super().__init__()
        if not 1 <= stride <= kernel_size:
            raise ValueError(f"pooling needs 1 ≤ stride ≤ kernel_size, got stride={stride}, kernel_size={kernel_size}")
        self.kernel_size, self.stride = kernel_size, stride

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the largest value of each window."""
        if x.ndim != 4:
            raise ValueError(f"pooling takes images [b, c, h, w], got shape {list(x.shape)}")
        mean = F.avg_pool2d(x, self.kernel_size, self.stride, ceil_mode=True)
        return mean, F.max_pool2d(x, self.kernel_size, self.stride, ceil_mode=True)

    def products(self, x: Tensor, masks: Tensor) -> Tensor:
        """⟨mask, window⟩ for each of m masks [m, k, k]: [b, c, m, h′, w′]."""
        if x.ndim != 4:
            raise ValueError(f"pooling takes images [b, c, h, w], got shape {list(x.shape)}")
        beyond = [(self.kernel_size - n) % self.stride if n > self.kernel_size else 0 for n in x.shape[:1:-1]]
        padded = F.pad(x, (0, beyond[0], 0, beyond[1])).flatten(0, 1)[:, None]
        found = F.conv2d(padded, masks[:, None].to(x.dtype), stride=self.stride)
        return found.view(*x.shape[:2], *found.shape[1:])

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class MixedPool(Pool):
    """a max + (1 − a) mean, a: []."""

    def __init__(self, kernel_size: int, stride: int, a: float):
        super().__init__(kernel_size, stride)
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x: Tensor) -> Tensor:
        mean, top = self.extremes(x)
        return self.a * top + (1 - self.a) * mean


class GatedPool(Pool):
    """a max + (1 − a) mean with a = σ(⟨mask, window⟩), mask: [1, k, k]."""

    def __init__(self, kernel_size: int, stride: int):
        super().__init__(kernel_size, stride)
        self.mask = nn.Parameter(0.1 * torch.randn(1, kernel_size, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        mean, top = self.extremes(x)
        a = torch.sigmoid(self.products(x, self.mask)[:, :, 0])
        return a * top + (1 - a) * mean


class TreePool(Pool):
    """A tree of ``levels``: leaves [2^(levels − 1), k, k] filter the window, each node above blends two children."""

    def __init__(self, kernel_size: int, stride: int, levels: int):
        super().__init__(kernel_size, stride)
        if levels < 2:
            raise ValueError(f"tree_pooling blends two leaves or more, so it needs levels ≥ 2, got {levels}")
        leaves = 2 ** (levels - 1)
        self.leaves = nn.Parameter(0.1 * torch.randn(leaves, kernel_size, kernel_size))
        self.gates = nn.Parameter(0.1 * torch.randn(leaves - 1, kernel_size, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        found = self.products(x, torch.cat([self.gates, self.leaves]))
        gates, y = torch.sigmoid(found[:, :, : len(self.gates)]), found[:, :, len(self.gates) :]
        while y.shape[2] > 1:  # the last level of gates first: node i blends 2i and 2i + 1 below it
            n = y.shape[2] // 2
            s = gates[:, :, n - 1 : 2 * n - 1]
            y = s * y[:, :, 0::2] + (1 - s) * y[:, :, 1::2]
        return y[:, :, 0]


_PAPER = (
    "Lee et al. 2015, Generalizing Pooling Functions in Convolutional Neural Networks: Mixed, Gated, and Tree, "
    "arXiv:1509.08985"
)


@method(_PAPER)
def mixed_pooling(kernel_size: int = 3, stride: int = 2, a: float = 0.5) -> MixedPool:
    """a max(window) + (1 − a) mean(window), a learned, one number per layer. [b, c, h, w] → [b, c, h′, w′].

    Nothing holds a in [0, 1]: the paper's gradient acts on a itself.
    """
    return MixedPool(kernel_size, stride, a)


@method(_PAPER)
def gated_pooling(kernel_size: int = 3, stride: int = 2) -> GatedPool:
    """a max(window) + (1 − a) mean(window) with a = σ(⟨ω, window⟩), ω ~ N(0, 0.1²) learned. [b, c, h, w]."""
    return GatedPool(kernel_size, stride)


@method(_PAPER)
def tree_pooling(kernel_size: int = 3, stride: int = 2, levels: int = 2) -> TreePool:
    """σ(⟨ω, window⟩) left + (1 − σ(⟨ω, window⟩)) right at each node, ⟨v, window⟩ at each leaf. [b, c, h, w].

    ω and v ~ N(0, 0.1²) are learned. The paper prefers two levels: one gate, two leaves.
    """
    return TreePool(kernel_size, stride, levels)
