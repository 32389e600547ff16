"""Norms without statistics: each number is squashed by itself. weight and bias per feature; x: [..., d] or [b, d, ...].

What they squash with has scalars of its own, one set per layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from etude._method import method
from etude.norms._kernels import scaled_erf, scaled_tanh


class Elementwise(nn.Module):
    """weight · squash(x) + bias; a child says what ``squashed`` is."""

    _role = "norm"

    def __init__(self, features: int, channels_last: bool = True):
        super().__init__()
        self.features, self.axis = features, -1 if channels_last else 1
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim <= self.axis or x.shape[self.axis] != self.features:
            raise ValueError(
                f"{type(self).__name__} has {self.features} features on axis {self.axis} "
                f"but x has shape {tuple(x.shape)}"
            )
        return self.squashed(x.movedim(self.axis, -1)).movedim(-1, self.axis)

    def squashed(self, x: Tensor) -> Tensor:
        """The whole formula, features last."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.features}" + (", channels_last=False" if self.axis == 1 else "")


class DyT(Elementwise):
    """weight · tanh(alpha x) + bias: alpha one scalar."""

    def __init__(self, features: int, alpha: float = 0.5, channels_last: bool = True):
        super().__init__(features, channels_last)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def squashed(self, x: Tensor) -> Tensor:
        return scaled_tanh(x, self.alpha, self.weight, self.bias)


class Derf(Elementwise):
    """weight · erf(alpha x + s) + bias: alpha and s scalars."""

    def __init__(self, features: int, alpha: float = 0.5, channels_last: bool = True):
        super().__init__(features, channels_last)
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.s = nn.Parameter(torch.tensor(0.0))

    def squashed(self, x: Tensor) -> Tensor:
        return scaled_erf(x, self.alpha, self.s, self.weight, self.bias)


class ElementwiseLayerNorm(Elementwise):
    """weight · √(d − 1) x / √(x² + beta) + bias: beta one scalar, learned as its logarithm, so it stays positive."""

    def __init__(self, features: int, beta: float | None = None, channels_last: bool = True):
        super().__init__(features, channels_last)
        if beta is not None and beta <= 0:
            raise ValueError(f"ElementwiseLayerNorm: beta must be positive, got {beta}")
        self.log_beta = nn.Parameter(torch.tensor(math.log(features if beta is None else beta)))

    def squashed(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        y = wide * (wide.square() + self.log_beta.exp()).rsqrt()
        return torch.addcmul(self.bias, y, self.weight * math.sqrt(self.features - 1)).to(x.dtype)


@method("Zhu et al. 2025, Transformers without Normalization, arXiv:2503.10622", note="LLaMA: alpha .8 to .2, by width")
def dyt(d: int, alpha: float = 0.5, channels_last: bool = True) -> DyT:
    """weight · tanh(alpha x) + bias in place of a norm; alpha is one learned scalar, here its start. x: [..., d].

    Normalising without statistics: each element is squashed by itself.
    """
    return DyT(d, alpha, channels_last)


@method("Chen et al. 2025, Stronger Normalization-Free Transformers, arXiv:2512.10938")
def derf(d: int, alpha: float = 0.5, channels_last: bool = True) -> Derf:
    """weight · erf(alpha x + s) + bias; alpha and s are learned scalars that start at ``alpha`` and 0. x: [..., d]."""
    return Derf(d, alpha, channels_last)


@method(
    "Stollenwerk 2025, Elementwise Layer Normalization, arXiv:2503.21708",
    note="the paper gives no start for beta: d is what tokens of variance one have",
)
def elementwise_layer_norm(d: int, beta: float | None = None, channels_last: bool = True) -> ElementwiseLayerNorm:
    """weight · √(d − 1) x / √(x² + beta) + bias: layer norm as a function of one number; beta starts at d by default.

    Vary one number z = x_i − mean of the others and hold those: layer norm is √(d − 1) z / √(z² + beta), exactly. The
    paper was later renamed On the Mathematical Relationship Between Layer Normalization and Dynamic Activation
    Functions, where the layer is DyISRU and comes from rms_norm, with √d.
    """
    return ElementwiseLayerNorm(d, beta, channels_last)
