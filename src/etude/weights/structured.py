"""Weights made of small cores, trained from scratch: fewer numbers, and fewer multiplications where x meets the cores.

A kernel counts as [out, in · kh · kw].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as P

from etude._method import method
from etude.weights._factors import Blocks, Factor, Product, Shuffle, wide
from etude.weights._map import Map


class BlockTensorTrain(Map):
    """W[(a, b), (m, c)] = Σ_s L[a, (m, s), b] R[m, c, (a, s)], s < r; R: [m2, m1, n1 r], L: [n1, m2 r, n2]."""

    changes = "it is drawn anew as a product of cores, or replaced by the nearest one"

    def __init__(self, r: int, fresh: bool) -> None:
        super().__init__()
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"block_tensor_train: r={r!r} must be a whole number, and at least 1")
        self.r, self.fresh = r, fresh

    def born(self, w: Tensor) -> None:
        self.n1, self.n2 = balanced(self.matrix(w).shape[0])
        self.m1, self.m2 = balanced(self.matrix(w).shape[1])
        self.like = w.new_empty(w.shape, device="meta")

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        one = first.view(self.m2, self.m1, self.n1, self.r)
        two = second.view(self.n1, self.m2, self.r, self.n2)
        m = torch.einsum("amsb,mcas->abmc", two, one)
        return self.stored(m.reshape(self.n1 * self.n2, -1), self.like)

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        parts = wide(self.matrix(w)).view(self.n1, self.n2, self.m2, self.m1).transpose(1, 2)  # [a, m, b, c]
        u, s, vh = torch.linalg.svd(parts, full_matrices=False)
        if self.fresh and not w.is_meta and s[..., self.r :].norm() > torch.finfo(w.dtype).eps ** (2 / 3) * s.norm():
            return self._drawn(w)
        root, short = s[..., : self.r].sqrt(), max(0, self.r - s.shape[-1])
        one = nn.functional.pad(vh[..., : self.r, :] * root[..., None], (0, 0, 0, short))  # [a, m, s, c]
        two = nn.functional.pad(u[..., : self.r] * root[..., None, :], (0, short))  # [a, m, b, s]
        first = one.permute(1, 3, 0, 2).flatten(2)
        second = two.permute(0, 1, 3, 2).flatten(1, 2)
        return first.to(w.dtype).contiguous(), second.to(w.dtype).contiguous()

    def product(self, first: Tensor, second: Tensor, x: Tensor) -> Tensor:
        """x Wᵀ, core by core: rows · r (in · n1 + m2 · out) multiplications."""
        cores: Factor = Product((Blocks(first), Shuffle(self.m2, self.n1, self.r), Blocks(second)))
        return cores(x)

    def lr_scale(self) -> tuple[float, float]:
        """Adam's lr of each core over a dense layer's: (in / fan-in of the core) / number of cores."""
        into = self.m1 * self.m2
        return into / self.m1 / 2, into / (self.r * self.m2) / 2

    def _drawn(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """N(0, σ²), σ = √(1 / fan-in) · min(1, √(fan-out / fan-in)) of each core as a matrix."""
        shapes = (self.m2, self.m1, self.n1 * self.r), (self.n1, self.m2 * self.r, self.n2)
        first, second = (w.new_empty(s).normal_(0, min(1, math.sqrt(s[2] / s[1])) / math.sqrt(s[1])) for s in shapes)
        return first, second


def balanced(n: int) -> tuple[int, int]:
    """n as a product of two whole numbers that are as near as can be, the smaller first."""
    a = next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
    return a, n // a


def lr_groups(model: nn.Module, lr: float) -> list[dict[str, object]]:
    """Parameter groups for Adam in which each core has the lr of its own fan-in, and all else has ``lr``."""
    scale: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, P.ParametrizationList) and len(module) and isinstance(module[0], BlockTensorTrain):
            scale |= dict(zip(module.parameters(recurse=False), module[0].lr_scale()))
    if not scale:
        raise ValueError(f"{type(model).__name__} has no weight of cores; put weights.block_tensor_train() on it first")
    groups: dict[float, list[nn.Parameter]] = {}
    for p in model.parameters():
        groups.setdefault(scale.get(p, 1.0), []).append(p)
    return [{"params": params, "lr": lr * factor} for factor, params in groups.items()]


@method("Qiu et al. 2024, Compute Better Spent: Replacing Dense Layers with Structured Matrices, arXiv:2406.06248")
def block_tensor_train(r: int = 1, fresh: bool = True) -> Map:
    """W[(a, b), (m, c)] = Σ_s L[a, (m, s), b] R[m, c, (a, s)], s < r; out = n1 n2 and in = m1 m2 split near the middle.

    r (in · n1 + m2 · out) numbers and multiplications per row of x; r = 1 is a Monarch matrix. A weight that is not of
    this form is drawn anew, for training from scratch, or, with ``fresh=False``, replaced by the nearest that is.
    ``weights.lr_groups`` gives each core its lr. Keep the last layer dense; zero L at the end of a residual branch.
    """
    return BlockTensorTrain(r, fresh)
