"""The norms of the literature: which axes share statistics, or how much of a token its statistic sees."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from etude._method import method
from etude.norms._kernels import rms
from etude.norms._norm import Norm
from etude.norms._token import TokenNorm

_RMS = "Zhang & Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467"


@method("Ba et al. 2016, Layer Normalization, arXiv:1607.06450")
def layer_norm(d: int, eps: float = 1e-5) -> Norm:
    """(x − mean) / √(var + eps) · weight + bias, statistics of each token over its features. x: [..., d]."""
    return Norm("... d -> ...", d, eps=eps)


@method(_RMS)
def rms_norm(d: int, eps: float = 1e-5) -> Norm:
    """x / √(mean x² + eps) · weight: layer norm that does not centre and does not shift. x: [..., d]."""
    return Norm("... d -> ...", d, center=False, eps=eps, modulation="scale")


@method(_RMS, off=lambda: (partial_rms_norm(6, p=1.0), rms_norm(6)))
def partial_rms_norm(d: int, p: float = 0.0625, eps: float = 1e-5) -> TokenNorm:
    """x / √(mean of the first ⌈p d⌉ x² + eps) · weight: the root mean square guessed from a share p of the features.

    The authors' code rounds p d down, the paper up.
    """
    if not 0 < p <= 1:
        raise ValueError(f"partial_rms_norm: p, the share of the features it looks at, must be in (0, 1], got {p}")
    return TokenNorm(_partial_rms, d, {"weight": torch.ones(d)}, k=math.ceil(p * d - 1e-9), eps=eps)


def _partial_rms(x: Tensor, weight: Tensor, k: int, eps: float) -> Tensor:
    if k == x.shape[-1]:
        return rms(x, weight, eps)
    return x * (x[..., :k].square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@method(
    "Nguyen & Salazar 2019, Transformers without Tears: Improving the Normalization of Self-Attention, arXiv:1910.05895"
)
def scale_norm(d: int, eps: float = 1e-5) -> TokenNorm:
    """g · x / max(‖x‖, eps): every token gets the length g, one learned scalar that starts at √d. x: [..., d]."""
    return TokenNorm(_scale, d, {"g": torch.tensor(math.sqrt(d))}, eps=eps)


def _scale(x: Tensor, g: Tensor, eps: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (g / length.clamp_min(eps))


@method(
    "Jiang et al. 2023, Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers, "
    "arXiv:2305.14858"
)
def crms_norm(d: int, eps: float = 1e-5) -> TokenNorm:
    """x / √((Σ x² + (Σ x)²) / (d + 1) + eps): rms_norm of a token of mean 0 whose last entry, −Σ x, is left out.

    So d is one less than the width it stands for, and there is nothing learned: fold that into the next linear.
    """
    return TokenNorm(_crms, d, {}, eps=eps)


def _crms(x: Tensor, eps: float) -> Tensor:
    squares = x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True).square()
    return x * (squares / (x.shape[-1] + 1) + eps).rsqrt()


@method(
    "Ioffe & Szegedy 2015, Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate "
    "Shift, arXiv:1502.03167"
)
def batch_norm(d: int, eps: float = 1e-5, momentum: float = 0.1) -> Norm:
    """(x − mean) / √(var + eps) · weight + bias, each channel over the batch, or running in eval. x: [b, c, ...]."""
    return Norm("b c ... -> c", d, eps=eps, momentum=momentum)


@method("Ulyanov et al. 2016, Instance Normalization: The Missing Ingredient for Fast Stylization, arXiv:1607.08022")
def instance_norm(d: int, eps: float = 1e-5) -> Norm:
    """(x − mean) / √(var + eps) · weight + bias, each channel of each image by itself. x: [b, c, ...]."""
    return Norm("b c ... -> b c", d, eps=eps)


@method("Wu & He 2018, Group Normalization, arXiv:1803.08494")
def group_norm(d: int, groups: int = 32, eps: float = 1e-5) -> Norm:
    """(x − mean) / √(var + eps) · weight + bias, each group of neighbouring channels of each image. x: [b, c, ...]."""
    return Norm("b (g c) ... -> b g", d, eps=eps, g=groups)
