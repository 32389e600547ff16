"""The norms of the literature: each says which axes share statistics, and is one line of `Norm`."""

from __future__ import annotations

from etude._method import method
from etude.norms._norm import Norm


@method("Ba et al. 2016, Layer Normalization, arXiv:1607.06450")
def layer_norm(d: int, eps: float = 1e-5) -> Norm:
    """(x − mean) / √(var + eps) · weight + bias, statistics of each token over its features. x: [..., d]."""
    return Norm("... d -> ...", d, eps=eps)


@method("Zhang & Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467")
def rms_norm(d: int, eps: float = 1e-5) -> Norm:
    """x / √(mean x² + eps) · weight: layer norm that does not centre and does not shift. x: [..., d]."""
    return Norm("... d -> ...", d, center=False, eps=eps, modulation="scale")


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
