"""Layers that add and multiply exactly once their weights have come to −1, 0 or 1. No bias."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method


class Arithmetic(nn.Module):
    """A weight [out, d] that the layer sees clipped to [low, 1]."""

    _role = "vector"
    low: ClassVar[float]

    def __init__(self, d: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, d))

    @property
    def clipped(self) -> Tensor:
        return self.weight.clamp(self.low, 1)

    @torch.no_grad()
    def clip_(self) -> None:
        """To be called after each step: a weight left outside the range gets no gradient from the clipped forward."""
        self.weight.clamp_(self.low, 1)

    def sparsity(self) -> Tensor:
        """The mean distance of a weight to what it should become, min(|W|, |1 − |W||)."""
        size = self.weight.abs()
        return torch.minimum(size, (1 - size).abs()).mean()

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class Nau(Arithmetic):
    """W x, W in [−1, 1]."""

    low = -1.0

    def __init__(self, d: int, out: int):
        super().__init__(d, out)
        bound = min(0.5, math.sqrt(6 / (d + out)))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.clipped)


class Nmu(Arithmetic):
    """Πᵢ (W[j, i] xᵢ + 1 − W[j, i]), W in [0, 1]."""

    low = 0.0

    def __init__(self, d: int, out: int):
        super().__init__(d, out)
        nn.init.uniform_(self.weight, 0.25, 0.75)

    def forward(self, x: Tensor) -> Tensor:
        w = self.clipped
        return torch.addcmul(1 - w, w, x[..., None, :]).prod(-1)


@method("Madsen & Johansen 2020, Neural Arithmetic Units, arXiv:2001.05016")
def nau(d: int, out: int | None = None) -> Nau:
    """yⱼ = Σᵢ Wⱼᵢ xᵢ, W clipped to [−1, 1], so that it can become sums and differences. [..., d] → [..., out].

    W ~ U(±min(½, √(6 / (d + out)))). Call ``clip_`` after each step, and add ``arithmetic_sparsity`` to the loss.
    """
    return Nau(d, out or d)


@method("Madsen & Johansen 2020, Neural Arithmetic Units, arXiv:2001.05016")
def nmu(d: int, out: int | None = None) -> Nmu:
    """yⱼ = Πᵢ (Wⱼᵢ xᵢ + 1 − Wⱼᵢ), W clipped to [0, 1]: at 1 a factor, at 0 left out. [..., d] → [..., out].

    W ~ U(¼, ¾). Call ``clip_`` after each step, and add ``arithmetic_sparsity`` to the loss. A product of many inputs
    overflows.
    """
    return Nmu(d, out or d)


def arithmetic_sparsity(
    model: nn.Module, t: int, factor: float = 10.0, start: int = 1_000_000, end: int = 2_000_000
) -> Tensor:
    """factor · clip((t − start) / (end − start), 0, 1) · Σ of the layers' ``sparsity``, at step t of the training."""
    layers = [m for m in model.modules() if isinstance(m, Arithmetic)]
    if not layers:
        raise ValueError("arithmetic_sparsity found no nau or nmu in the model")
    if start >= end:
        raise ValueError(f"arithmetic_sparsity grows from start to end, got {start} and {end}")
    grown = min(max((t - start) / (end - start), 0.0), 1.0)
    return factor * grown * torch.stack([m.sparsity() for m in layers]).sum()
