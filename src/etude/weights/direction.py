"""Maps that fix the scale or the centre of a weight. Rows are output units; a kernel counts as [out, in · kh · kw]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from etude._linalg import power_iteration
from etude._method import method
from etude.weights._map import Map


def _others(w: Tensor, axis: int) -> tuple[int, ...]:
    """All axes of w but the output units'."""
    return tuple(i for i in range(w.ndim) if i != axis)


def _length(w: Tensor, axis: int) -> Tensor:
    """The length of each output unit, [out, 1, …]."""
    length: Tensor = torch.linalg.vector_norm(w, dim=_others(w, axis), keepdim=True)
    return length


def _refuse_zeros(w: Tensor, axis: int, name: str) -> None:
    if not w.is_meta and (_length(w, axis) == 0).any():
        raise ValueError(f"an output unit has only zeros, so {name} finds no direction; initialise it first")


def _standardized(w: Tensor, axis: int, eps: float, correction: int) -> Tensor:
    var, mean = torch.var_mean(w, _others(w, axis), correction=correction, keepdim=True)
    return (w - mean) * (var + eps).rsqrt()


def _fan_in(w: Tensor, axis: int, name: str) -> int:
    fan_in = w.numel() // w.shape[axis]
    if fan_in < 2:
        raise ValueError(f"{name} needs a fan-in of 2 or more; shape {list(w.shape)} has {fan_in}")
    return fan_in


class WeightNorm(Map):
    """W = g v / ‖v‖ per output unit; g: [out, 1, …], v: as W."""

    def born(self, w: Tensor) -> None:
        _refuse_zeros(w, self.axis, "weight_norm")

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / _length(v, self.axis))

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return _length(w, self.axis), w


class WeightConditioning(Map):
    """W = V / ‖V‖ per output unit."""

    changes = "every output unit gets length 1"

    def born(self, w: Tensor) -> None:
        _refuse_zeros(w, self.axis, "weight_conditioning")

    def forward(self, w: Tensor) -> Tensor:
        return w / _length(w, self.axis)


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
        m = self.matrix(w)
        if not w.is_meta and (m == 0).all():
            raise ValueError("the weight is zero, so spectral_norm cannot divide by its norm; initialise it first")
        self.register_buffer("u", torch.randn_like(m[:, 0]))
        self.register_buffer("v", torch.empty_like(m[0]))

    def forward(self, w: Tensor) -> Tensor:
        m = self.matrix(w)
        if self.training:
            self._follow(m, self.steps)
        return w / torch.dot(self.u.clone(), m @ self.v.clone())  # copies: the next use writes into u and v

    def right_inverse(self, w: Tensor) -> Tensor:
        self._follow(self.matrix(w), 15)  # torch's head start
        return w

    def _follow(self, m: Tensor, steps: int) -> None:
        u, v, _ = power_iteration(m.detach(), self.u, steps)
        self.u.copy_(u)
        self.v.copy_(v)


class SigmaReparam(Map):
    """W = γ V / σ; γ: [1, …], from σ, and a buffer u: [in] that follows the leading right singular vector."""

    u: Tensor

    def born(self, w: Tensor) -> None:
        m = self.matrix(w)
        if w.is_meta:
            self.register_buffer("u", torch.empty_like(m[0]))
            return
        if (m == 0).all():
            raise ValueError("the weight is zero, so sigma_reparam cannot divide by its norm; initialise it first")
        wide = m if m.dtype == torch.float64 else m.float()
        self.register_buffer("u", torch.linalg.svd(wide, full_matrices=False)[2][0].to(w.dtype))

    def forward(self, gamma: Tensor, w: Tensor) -> Tensor:
        u, _, sigma = power_iteration(self.matrix(w).mT, self.u)
        if self.training:
            self.u.copy_(u)
        return w * (gamma / sigma)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        u, _, sigma = power_iteration(self.matrix(w).mT, self.u, 15)
        self.u.copy_(u)
        return self._gamma(sigma).expand([1] * w.ndim).clone(), w

    def _gamma(self, sigma: Tensor) -> Tensor:
        return sigma


class UnitSigmaReparam(SigmaReparam):
    """The same with γ from 1."""

    changes = "the largest singular value becomes 1, where γ starts"

    def _gamma(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


class WeightStandardization(Map):
    """W = (V − mean) / √(var + eps) per output unit."""

    changes = "every output unit gets mean 0 and variance 1"

    def __init__(self, eps: float, correction: int) -> None:
        super().__init__()
        self.eps, self.correction = eps, correction

    def born(self, w: Tensor) -> None:
        _fan_in(w, self.axis, "weight_standardization")

    def forward(self, w: Tensor) -> Tensor:
        return _standardized(w, self.axis, self.eps, self.correction)


class ScaledWeightStandardization(Map):
    """W = g γ (V − mean) / √((var + eps) · fan-in) per output unit; g: [out, 1, …] from 1, v: as W."""

    changes = "every output unit gets mean 0 and length γ"

    def __init__(self, gamma: float, eps: float) -> None:
        super().__init__()
        self.gamma, self.eps = gamma, eps

    scale: float

    def born(self, w: Tensor) -> None:
        self.scale = self.gamma * _fan_in(w, self.axis, "scaled_weight_standardization") ** -0.5

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return _standardized(v, self.axis, self.eps, 0) * (g * self.scale)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(_length(w, self.axis)), w


@method(
    "Salimans and Kingma 2016, Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural "
    "Networks, arXiv:1602.07868"
)
def weight_norm() -> Map:
    """W = g v / ‖v‖ per output unit, so that length g and direction v are learned apart.

    For a model from scratch ``weights.weight_norm_init(model, x)`` then chooses g and the biases from one batch.
    """
    return WeightNorm()


@method("Saratchandran et al. 2024, Weight Conditioning for Smooth Optimization of Neural Networks, arXiv:2409.03424")
def weight_conditioning() -> Map:
    """W = E V with E = diag(1 / ‖Vᵢ‖) over the output units, by which the rows of V are equilibrated at each use.

    Of all diagonal matrices E comes within √out of the one after which the condition number is least (Van der Sluis).
    The gradient goes through E. A kernel is taken as a matrix [out, in · kh · kw].
    """
    return WeightConditioning()


@method("Miyato et al. 2018, Spectral Normalization for Generative Adversarial Networks, arXiv:1802.05957")
def spectral_norm(n_power_iterations: int = 1) -> Map:
    """W = V / σ(V), the largest singular value σ = uᵀ V v from power iteration, u and v constants of the gradient.

    The iteration runs at each use of the weight in training mode, and starts warm, after 15 steps from a random u.
    """
    return SpectralNorm(n_power_iterations)


@method("Zhai et al. 2023, Stabilizing Transformer Training by Preventing Attention Entropy Collapse, arXiv:2303.06296")
def sigma_reparam(start: Literal["norm", "one"] = "norm") -> Map:
    """W = γ V / σ(V), σ = uᵀ V v from one step of power iteration at each use, u and v constants of the gradient.

    For attention whose entropy collapses (loss spikes): γ alone, one number a layer, sets the largest singular value.
    ``start``: γ is σ, which changes nothing (the authors' vision code), or 1 (their speech code, and the paper). u is
    exact at first. Then norms, warm-up and weight decay may be left out.
    """
    if start not in ("norm", "one"):
        raise ValueError(f'sigma_reparam: start={start!r} must be "norm" or "one"')
    return SigmaReparam() if start == "norm" else UnitSigmaReparam()


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


@method(
    "Brock et al. 2021, Characterizing signal propagation to close the performance gap in unnormalized ResNets, "
    "arXiv:2101.08692",
    note="γ undoes what the activation before does to the variance: 1 for none or where the activation has γ, "
    "√(2 / (1 − 1/π)) = 1.7129 for ReLU, 1.7015 for GELU, 1.7881 for SiLU",
)
def scaled_weight_standardization(gamma: float = 1.0, eps: float = 1e-6) -> Map:
    """W = g γ (V − mean) / √((var + eps) · N) over the fan-in N of each output unit; g: [out, 1, …] learned, from 1.

    For residual networks without norms (`blocks.nf_residual`): the layer keeps variance and adds no mean. eps is inside
    the root as in timm; the authors' code has max(N · var, 1e-4) there.
    """
    return ScaledWeightStandardization(gamma, eps)
