"""Maps that fix the scale or the centre of a weight. Rows are output units; a kernel counts as [out, in · kh · kw]."""

from __future__ import annotations

import torch
from torch import Tensor

from etude._linalg import power_iteration
from etude._method import method
from etude.weights._map import Map


def _others(w: Tensor, axis: int) -> tuple[int, ...]:
    """All axes of w but the output units'."""
    return tuple(i for i in range(w.ndim) if i != axis)


class WeightNorm(Map):
    """W = g v / ‖v‖ per output unit; g: [out, 1, …], v: as W."""

    def born(self, w: Tensor) -> None:
        if not w.is_meta and (self._norm(w) == 0).any():
            raise ValueError("an output unit has only zeros, so weight_norm finds no direction; initialise it first")

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / self._norm(v))

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return self._norm(w), w

    def _norm(self, w: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(w, dim=_others(w, self.axis), keepdim=True)
        return norm


class SpectralNorm(Map):
    """W = V / σ with buffers u: [out] and v: [in] that follow the leading singular vectors while training."""

    changes = "the largest singular value becomes 1"
    u: Tensor
    v: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"spectral_norm: n_power_iterations={steps} must be at least 1")
        self.steps = steps

    def born(self, w: Tensor) -> None:
        m = self._matrix(w)
        if not w.is_meta and (m == 0).all():
            raise ValueError("the weight is zero, so spectral_norm cannot divide by its norm; initialise it first")
        self.register_buffer("u", torch.randn_like(m[:, 0]))
        self.register_buffer("v", torch.empty_like(m[0]))

    def forward(self, w: Tensor) -> Tensor:
        m = self._matrix(w)
        if self.training:
            self._follow(m, self.steps)
        return w / torch.dot(self.u.clone(), m @ self.v.clone())  # copies: the next use writes into u and v

    def right_inverse(self, w: Tensor) -> Tensor:
        self._follow(self._matrix(w), 15)  # torch's head start
        return w

    def _follow(self, m: Tensor, steps: int) -> None:
        u, v, _ = power_iteration(m.detach(), self.u, steps)
        self.u.copy_(u)
        self.v.copy_(v)

    def _matrix(self, w: Tensor) -> Tensor:
        return w.movedim(self.axis, 0).flatten(1)


class WeightStandardization(Map):
    """W = (V − mean) / √(var + eps) per output unit."""

    changes = "every output unit gets mean 0 and variance 1"

    def __init__(self, eps: float, correction: int) -> None:
        super().__init__()
        self.eps, self.correction = eps, correction

    def born(self, w: Tensor) -> None:
        fan_in = w.numel() // w.shape[self.axis]
        if fan_in < 2:
            raise ValueError(f"weight_standardization needs a fan-in of 2 or more; shape {list(w.shape)} has {fan_in}")

    def forward(self, w: Tensor) -> Tensor:
        var, mean = torch.var_mean(w, _others(w, self.axis), correction=self.correction, keepdim=True)
        return (w - mean) * (var + self.eps).rsqrt()


@method(
    "Salimans and Kingma 2016, Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural "
    "Networks, arXiv:1602.07868"
)
def weight_norm() -> Map:
    """W = g v / ‖v‖ per output unit, so that length g and direction v are learned apart."""
    return WeightNorm()


@method("Miyato et al. 2018, Spectral Normalization for Generative Adversarial Networks, arXiv:1802.05957")
def spectral_norm(n_power_iterations: int = 1) -> Map:
    """W = V / σ(V), the largest singular value σ = uᵀ V v from power iteration, u and v constants of the gradient.

    The iteration runs at each use of the weight in training mode, and starts warm, after 15 steps from a random u.
    """
    return SpectralNorm(n_power_iterations)


@method(
    "Qiao et al. 2019, Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, "
    "arXiv:1903.10520"
)
def weight_standardization(eps: float = 1e-6, correction: int = 0) -> Map:
    """W = (V − mean) / √(var + eps) over the fan-in of each output unit.

    For small batches, of one or two images, beside batch-channel or group normalisation.
    The paper's variance divides by the fan-in (``correction=0``); the authors' code divides by one less, with eps 1e-5.
    """
    return WeightStandardization(eps, correction)
