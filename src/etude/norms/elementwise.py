"""Norms without statistics: each number is squashed by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etude._method import method
from etude.norms._kernels import scaled_tanh


class DyT(nn.Module):
    """weight · tanh(alpha x) + bias: alpha one scalar, weight and bias per feature. x: [..., d], or [b, d, ...]."""

    _role = "norm"

    def __init__(self, features: int, alpha: float = 0.5, channels_last: bool = True):
        super().__init__()
        self.features, self.axis = features, -1 if channels_last else 1
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim <= self.axis or x.shape[self.axis] != self.features:
            raise ValueError(f"DyT has {self.features} features on axis {self.axis} but x has shape {tuple(x.shape)}")
        y = scaled_tanh(x.movedim(self.axis, -1), self.alpha, self.weight, self.bias)
        return y.movedim(-1, self.axis)

    def extra_repr(self) -> str:
        return f"{self.features}" + (", channels_last=False" if self.axis == 1 else "")


@method("Zhu et al. 2025, Transformers without Normalization, arXiv:2503.10622", note="LLaMA: alpha .8 to .2, by width")
def dyt(d: int, alpha: float = 0.5, channels_last: bool = True) -> DyT:
    """weight · tanh(alpha x) + bias in place of a norm; alpha is one learned scalar, here its start. x: [..., d]."""
    return DyT(d, alpha, channels_last)
