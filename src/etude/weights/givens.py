"""Adapters W Q whose Q is a product of in − 1 maps of planes, in rounds, as of a tournament."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from etude._method import method
from etude.weights._factors import Factor, Product, Scale, tournament
from etude.weights._map import Adapter
from etude.weights.rotations import Turn


class GOFT(Turn):
    """W Q diag(s), Q by plane rotations through π tanh(theta); theta: [in − 1], s: [in]."""

    theta: nn.Parameter

    def __init__(self, scaling: bool) -> None:
        super().__init__()
        self.scaling = scaling

    def born(self, w: Tensor) -> None:
        d = self._fan_in(w)
        self.theta = nn.Parameter(w.new_zeros(d - 1))
        self.s = nn.Parameter(w.new_ones(d)) if self.scaling else None

    def turn(self) -> Factor:
        angle = math.pi * torch.tanh(self.theta)
        c, s = angle.cos(), angle.sin()
        q = tournament(torch.stack([c, s, -s, c], -1).view(-1, 2, 2), len(c) + 1).T
        return q if self.s is None else Product((q, Scale(self.s)))


class QGOFT(Turn):
    """W Q, Q by plane maps that are free; planes: [in − 1, 2, 2], each on a column (a, b)."""

    planes: nn.Parameter

    def born(self, w: Tensor) -> None:
        self.planes = nn.Parameter(torch.eye(2, dtype=w.dtype, device=w.device).repeat(self._fan_in(w) - 1, 1, 1))

    def turn(self) -> Factor:
        return tournament(self.planes.mT, len(self.planes) + 1).T

    def penalty(self) -> Tensor:
        return self.planes.prod(-1).sum(-1).square().sum()


@method("Ma et al. 2024, Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation, arXiv:2404.04316")
def goft(scaling: bool = False) -> Adapter:
    """W Q, Q of in − 1 plane rotations by π tanh θ in ⌈log₂ in⌉ rounds: angles and lengths of output units are kept.

    Round k turns the inputs (i, i + 2ᵏ), i a multiple of 2ᵏ⁺¹, the first round first, as in the authors' code; the
    paper writes Qᵀ. ``scaling``, its GOFT*, trains a gain per input besides. Any one x can be taken to the first axis;
    all rotations, which the paper speaks of, have more angles than these.
    """
    return GOFT(scaling)


@method("Ma et al. 2024, Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation, arXiv:2404.04316")
def qgoft() -> Adapter:
    """W Q, Q of in − 1 plane maps in the rounds of ``goft``, each a free 2 × 2 matrix, the identity at birth.

    The paper holds the columns of each orthogonal by a penalty on the loss, ``weights.orthogonality``.
    """
    return QGOFT()
