"""Activations, x → y of the same shape: each a line, and the sine, which comes with the matrix before it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from etude._method import method


@method(
    "Clevert et al. 2015, Fast and Accurate Deep Network Learning by Exponential Linear Units (ELUs), arXiv:1511.07289"
)
def elu(alpha: float = 1.0) -> nn.ELU:
    """x where x > 0, else alpha (eˣ − 1): negative values pull the mean to 0, and saturate at −alpha. x: [...]."""
    return nn.ELU(alpha)


@method("Klambauer et al. 2017, Self-Normalizing Neural Networks, arXiv:1706.02515")
def selu() -> nn.SELU:
    """1.0507 x where x > 0, else 1.0507 · 1.6733 (eˣ − 1): mean 0 and variance 1 are an attracting fixed point.

    That needs weights of mean 0 and variance 1 / fan-in (LeCun's initialisation; torch's default has a third of it),
    no norms, and ``alpha_dropout`` in the place of dropout. x: [...].
    """
    return nn.SELU()


@method(
    "Klambauer et al. 2017, Self-Normalizing Neural Networks, arXiv:1706.02515",
    note="the paper finds rates of 0.05 and 0.10 to serve",
)
def alpha_dropout(p: float = 0.1) -> nn.AlphaDropout:
    """a (x kept, else −1.7581) + b, where −1.7581 is selu's floor and a, b keep mean 0 and variance 1. x: [...].

    ``p``: the share of values dropped while training; nothing in eval.
    """
    return nn.AlphaDropout(p)


class Siren(nn.Module):
    """sin(w0 (W x + b)), W drawn so that what comes out is again arcsine-distributed whatever the depth."""

    def __init__(self, d: int, out: int, w0: float, first: bool):
        super().__init__()
        self.linear, self.w0 = nn.Linear(d, out), w0
        bound = 1 / d if first else math.sqrt(6 / d) / w0
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * self.linear(x))

    def extra_repr(self) -> str:
        return f"w0={self.w0}"


@method(
    "Sitzmann et al. 2020, Implicit Neural Representations with Periodic Activation Functions, arXiv:2006.09661",
    note="w0=30 serves images with coordinates in [−1, 1]; audio wants 3000 in the first layer (the authors' code)",
)
def siren(d: int, out: int | None = None, w0: float = 30.0, first: bool = False) -> Siren:
    """sin(w0 (W x + b)) with W ~ U(±√(6/d) / w0), in the first layer of a network U(±1/d). [..., d] → [..., out].

    The layer's derivative is such a layer again, so a network of them fits signals together with their derivatives.
    A network ends in an ordinary linear layer, with the same weights as a hidden one. ``out`` is d unless given.
    """
    if w0 <= 0:
        raise ValueError(f"siren divides its weights by w0, so w0={w0} must be above 0")
    return Siren(d, out or d, w0, first)
