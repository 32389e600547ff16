"""Steps sized by the weights they move, and gradients kept in bounds by their own past. u: [k, …]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from etude._method import method
from etude.rules._rule import (
    Chain,
    Context,
    Part,
    State,
    Width,
    Within,
    chain,
    debias,
    mix_,
    mix_square_,
    norm,
    pair,
    scalars,
)
from etude.rules.gate import Decay, Scale
from etude.rules.geometry import Rms
from etude.rules.statistic import Ema, Momentum

Betas = tuple[float, float]


@dataclass(frozen=True)
class LayerRate(Part):
    """(u + λ w) · η ‖w‖ / (‖u‖ + λ ‖w‖) for each tensor; u + λ w where either norm is 0."""

    width: ClassVar[Width] = "tensor"
    trust_coefficient: float = 1e-3
    weight_decay: float = 0.0

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        size, step = norm(w), norm(u)
        ratio = c.trust_coefficient * size / (step + c.weight_decay * size)
        return torch.mul(u + c.weight_decay * w, torch.where((size > 0) & (step > 0), ratio, 1.0))


@dataclass(frozen=True)
class Fade(Part):
    """u · φ(t), φ(t) = 1 / (α + exp(λ (t − dₑ))) + γ_min: high until about step dₑ, then down to γ_min."""

    lmbda: float = 1e-3
    delay: float = 0.0
    alpha: float = 0.1
    gamma_min: float = 0.0

    def clock(self, t: int) -> dict[str, float]:
        return {"phi": 1 / (self.alpha + math.exp(min(self.lmbda * (t - self.delay), 700.0))) + self.gamma_min}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return torch.mul(u, c.phi)


@method(
    "You et al. 2017, Large Batch Training of Convolutional Networks, arXiv:1708.03888",
    note="biases and norm gains are usually left to sgd: route(matrices=lars(), rest=sgd())",
)
def lars(lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 1e-4, trust_coefficient: float = 1e-3) -> Chain:
    """v ← μ v + lr η ‖w‖ / (‖g‖ + λ ‖w‖) (g + λ w), w ← w − v, the norms of each tensor.

    For large batches: the paper trains AlexNet with 8 192 images at a time. lr stands inside the momentum, as in the
    paper; timm and torch's sgd have it outside, which is the same at a constant lr.
    """
    return chain(LayerRate(trust_coefficient, weight_decay), Scale(lr), Momentum(momentum))


@method(
    "Do et al. 2023, Revisiting LARS for Large Batch Training Generalization of Neural Networks, arXiv:2309.14053",
    off=lambda: (tvlars(lmbda=0.0, alpha=0.0), lars()),
    note="lmbda between 1e-6 and 1e-2 in the authors' runs; trust_coefficient is 1e-3",
)
def tvlars(
    lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 1e-4, lmbda: float = 1e-3, alpha: float = 0.1,
    delay: float = 0.0,
) -> Chain:  # fmt: skip
    """v ← μ v + lr φ(t) η ‖w‖ / (‖g‖ + λ ‖w‖) (g + λ w), w ← w − v, φ(t) = 1 / (α + exp(lmbda (t − delay))).

    For large batches: high rates at first in place of a warm-up. This is the paper's layer rate (γ_min 0); its code
    divides by ‖g + λ w‖ instead, clamps both norms at 10 and takes ``delay`` for 0.
    """
    return chain(LayerRate(1e-3, weight_decay), Fade(lmbda, delay, alpha), Scale(lr), Momentum(momentum))


def unit_norm(x: Tensor) -> Tensor:
    """The norm of each row, what leads to one output; a vector or a number is one row.  [k, …] → [k, …, 1, …]"""
    size: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(1 if x.ndim == 2 else 2, x.ndim)), keepdim=True)
    return size


@dataclass(frozen=True)
class ClipUnits(Part):
    """Each row of u at most λ max(‖w row‖, ε) long; a vector or a number is one row. The gradient that is left."""

    width: ClassVar[Width] = "shape"
    on_gradient: ClassVar[bool] = True
    clip_factor: float = 0.01
    eps: float = 1e-3

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        size, step = unit_norm(w), unit_norm(u)
        most = size.clamp(min=c.eps) * c.clip_factor
        return torch.where(step > most, u * (most / step.clamp(min=1e-6)), u)


@method(
    "Brock et al. 2021, High-Performance Large-Scale Image Recognition Without Normalization, arXiv:2102.06171",
    note="clip_factor 0.01 for batches of 4096, up to 0.08 for 1024; lr is 0.1 per 256 images",
)
def adaptive_gradient_clipping(
    lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 2e-5, clip_factor: float = 0.01, eps: float = 1e-3,
    nesterov: bool = True,
) -> Chain:  # fmt: skip
    """g row ← g row · min(1, λ max(‖w row‖, ε) / ‖g row‖), a row for each output; then sgd with Nesterov momentum.

    For large batches and for networks without normalisation. The paper leaves the last layer unclipped:
    ``route(head=sgd(momentum=0.9), rest=adaptive_gradient_clipping())``.
    """
    return chain(ClipUnits(clip_factor, eps), Decay(weight_decay), Momentum(momentum, nesterov), Scale(lr))


@dataclass(frozen=True)
class ClipSpikes(Part):
    """u where |u| ≤ T̂, else u · T̂ / max|u|, T̂ the debiased average of each tensor's max|u|. The gradient left."""

    width: ClassVar[Width] = "tensor"
    on_gradient: ClassVar[bool] = True
    beta: float = 0.999

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {"threshold": scalars(w)}

    def clock(self, t: int) -> dict[str, float]:
        return {"debias": debias(self.beta, t)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        size = u.abs()
        top = size.amax(dim=tuple(range(1, u.ndim)), keepdim=True)
        most = mix_(s.threshold, top, c.beta) * c.debias
        return torch.where(size > most, u * (most / top), u)


@dataclass(frozen=True)
class KeepNorm(Part):
    """u / ‖u‖ · μ̂ / (√ν̂ + ε), μ and ν averages of each tensor's ‖u‖ and ‖u‖². The gradient left."""

    width: ClassVar[Width] = "tensor"
    on_gradient: ClassVar[bool] = True
    beta1: float = 0.7
    beta2: float = 0.9
    eps: float = 1e-8

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {"norm_avg": scalars(w), "norm_avg_sq": scalars(w)}

    def clock(self, t: int) -> dict[str, float]:
        return {"debias1": debias(self.beta1, t), "debias2": debias(self.beta2, t)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        size = norm(u)
        mean = mix_(s.norm_avg, size, c.beta1) * c.debias1
        square = mix_square_(s.norm_avg_sq, size, c.beta2) * c.debias2
        return u * torch.where(size > 0, mean / (square.sqrt() + c.eps) / size, 1.0)


@dataclass(frozen=True)
class Restart(Within):
    """Plays its inner parts, whose state and step count begin again at every step that ``every`` divides."""

    every: int = 1000

    def clock(self, t: int) -> dict[str, float]:
        again = self.every > 0 and t % self.every == 0
        return {**super().clock(t % self.every + 1 if self.every and t >= self.every else t), "keep": float(not again)}

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return self.started(w)

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        for x in vars(s).values():
            x.mul_(c.keep)
        return self.played(u, g, w, s, c)


@method(
    "Huang et al. 2025, Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam, arXiv:2502.17055",
    note="reset_every 500 for training in 4 bits; gammas (0.85, 0.99999, 0.999) for bf16 in the authors' scripts",
)
def stable_spam(
    lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    gammas: tuple[float, float, float] = (0.7, 0.9, 0.999), reset_every: int = 1000,
) -> Chain:  # fmt: skip
    """adam on ĝ: spikes of g above the debiased average of max|g| are cut to it, then ‖g‖ becomes μ̂ / (√ν̂ + ε).

    Against loss spikes, and for training in few bits. All statistics are of one tensor; the moments begin again every
    ``reset_every`` steps (0: never). The other averages keep their own count there; in the authors' code they share the
    reset one, which inflates the threshold for hundreds of steps.
    """
    (beta1, beta2), (g1, g2, g3) = pair(betas), gammas
    moments = Restart((Ema(beta1, debias=True), Rms(beta2, eps)), reset_every)
    return chain(ClipSpikes(g3), KeepNorm(g1, g2, eps), moments, Decay(weight_decay), Scale(lr))
