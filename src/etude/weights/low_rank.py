"""Adapters of low rank. A weight counts as a matrix [out, in], however stored; a kernel as [out, in · kh · kw]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.weights._map import Adapter


class LoRA(Adapter):
    """W + (alpha / r) B A; A: [r, in], B: [out, r]."""

    additive = True
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, r: int, alpha: float) -> None:
        super().__init__()
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"lora: r={r!r} must be at least 1, and a whole number")
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"lora: alpha={alpha!r} must be a finite number")
        self.r, self.scale = r, alpha / r

    def born(self, w: Tensor) -> None:
        a, b = _silent(w.movedim(self.axis, 0).flatten(1), self.r)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)

    def forward(self, w: Tensor) -> Tensor:
        rows = w.movedim(self.axis, 0)
        rows = torch.addmm(rows.flatten(1), self.B, self.A, alpha=self.scale).view_as(rows)
        return rows.movedim(0, self.axis).contiguous()

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        y, h = base(x), F.linear(x, self.A)
        rows = y.reshape(-1, y.shape[-1]), h.reshape(-1, self.r)
        return torch.addmm(*rows, self.B.mT, alpha=self.scale).view_as(y)  # one pass over y, not three


def _silent(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The authors' birth, A as nn.Linear's default and B zero: B A = 0."""
    out, into = w.shape
    return nn.init.kaiming_uniform_(w.new_empty(r, into), a=math.sqrt(5)), w.new_zeros(out, r)


@method("Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685")
def lora(r: int = 8, alpha: float = 16.0) -> Adapter:
    """W + (alpha / r) B A with W frozen; A: [r, in] random, B: [out, r] zero.

    To fine-tune a large pretrained model: with all else frozen, the optimizer's memory is that of A and B.
    Biases, norms and head go on training; ``weights.freeze(model)`` leaves the adapters alone to train, as the paper.
    """
    return LoRA(r, alpha)
