"""What else may be kept of past gradients: the last one, the largest ones, a share of this one, a starting speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from etude._method import method
from etude.rules._rule import Chain, Context, Part, State, Width, chain, mix_, norm, pair
from etude.rules.gate import Decay, Scale
from etude.rules.geometry import Rms, Sign
from etude.rules.moments import Debias, zeros
from etude.rules.named import adamw
from etude.rules.statistic import Ema

Betas = tuple[float, float]


@dataclass(frozen=True)
class VarianceReduced(Part):
    """c / max(1, ‖c‖) with c = u + γ β / (1 − β) (u − u₋₁), u₀ = 0: takes the place of the gradient."""

    width: ClassVar[Width] = "tensor"
    on_gradient: ClassVar[bool] = True
    gamma: float = 0.025
    beta: float = 0.95

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "previous")

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        corrected = torch.add(u, (u - s.previous) * (c.gamma * c.beta / (1 - c.beta)))
        s.previous.copy_(u)
        return corrected / norm(corrected).clamp(min=1.0)


@method(
    "Yuan et al. 2024, MARS: Unleashing the Power of Variance Reduction for Training Large Models, arXiv:2411.10438",
    note="the authors' code: the clipped c makes v too, and c = (1 + γ β₁ / (1 − β₁)) g at the first step",
)
def mars(
    lr: float = 3e-3, betas: Betas = (0.95, 0.99), eps: float = 1e-8, weight_decay: float = 0.0, gamma: float = 0.025
) -> Chain:
    """w ← w − lr (m̂ / (√v̂ + ε) + λ w), adamw on c = g + γ β₁ / (1 − β₁)(g − g₋₁) cut to norm 1: less noise.

    For language models. The authors give vectors to adamw: ``route(matrices=mars(), rest=adamw(betas=(0.9, 0.95)))``.
    """
    beta1, beta2 = pair(betas)
    steady = VarianceReduced(gamma, beta1)
    return chain(steady, Ema(beta1, debias=True), Rms(beta2, eps), Decay(weight_decay), Scale(lr))


@method(
    "Yuan et al. 2024, MARS: Unleashing the Power of Variance Reduction for Training Large Models, arXiv:2411.10438"
)
def mars_lion(lr: float = 3e-4, momentum: float = 0.95, weight_decay: float = 0.0, gamma: float = 0.025) -> Chain:
    """w ← w − lr (sign(m) + λ w), signum on c = g + γ μ / (1 − μ)(g − g₋₁) cut to norm 1: the sign of less noise."""
    return chain(VarianceReduced(gamma, momentum), Ema(momentum), Sign(), Decay(weight_decay), Scale(lr))


@dataclass(frozen=True)
class TopGradient(Part):
    """g where |g| is among the largest 1 − ``mask_ratio`` of its tensor, else 0: takes the place of the gradient."""

    width: ClassVar[Width] = "tensor"
    plain: ClassVar[bool] = True  # the compiler's kernel for a rank crashes
    on_gradient: ClassVar[bool] = True
    mask_ratio: float = 0.5

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        size, n = u.abs().flatten(1), w[0].numel()
        ratios = torch.as_tensor(c.mask_ratio, dtype=torch.float64).flatten().expand(len(w)).tolist()
        least = [row.kthvalue(min(int(r * n + 1e-9), n - 1) + 1).values for r, row in zip(ratios, size)]
        return torch.where(size >= torch.stack(least)[:, None], u.flatten(1), 0.0).view_as(u)


@method(
    "Li et al. 2024, Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance, arXiv:2406.15330",
    off=lambda: (gradient_mask_tuning(mask_ratio=0.0), adamw()),
    note="the paper reports that the ratio hardly matters and not whether it is of a tensor or of the model: a tensor",
)
def gradient_mask_tuning(
    lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01,
    mask_ratio: float = 0.5,
) -> Chain:  # fmt: skip
    """w ← adamw's step on g · 1[|g| among the largest 1 − ``mask_ratio`` of its tensor].

    For fine-tuning language models: only what the task asks to change. With accumulation the whole gradient is masked,
    once a step. Coordinates that are left out still move by what is remembered of them and by their decay.
    """
    beta1, beta2 = pair(betas)
    top = TopGradient(mask_ratio)
    return chain(top, Ema(beta1, debias=True), Rms(beta2, eps), Decay(weight_decay), Scale(lr))


@dataclass(frozen=True)
class CriticalMomenta(Part):
    """u + the mean of up to ``top_c`` past u, kept from the steps with the largest gradients; replaces the gradient.

    A step's priority is the sum of its tensors' gradient norms over the model, so all tensors keep the same steps; it
    fades by ``decay`` a step.
    """

    width: ClassVar[Width] = "model"
    per_member: ClassVar[bool] = True
    on_gradient: ClassVar[bool] = True
    top_c: int = 5
    decay: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_c < 1:
            raise ValueError(f"CriticalMomenta(top_c={self.top_c}): keeps at least one momentum")

    def init(self, w: Tensor) -> dict[str, Tensor]:
        ones = [1] * (w.ndim - 1)
        return {
            "momenta": w.new_zeros(w.shape[0], self.top_c, *w.shape[1:]),
            "priority": w.new_zeros(w.shape[0], self.top_c, *ones),
        }

    def clock(self, t: int) -> dict[str, float]:
        return {"kept": float(max(1, min(t - 1, self.top_c))), "free": float(t - 1 if t <= self.top_c else -1)}

    def partial(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return norm(g)

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        mixed = torch.add(u, s.momenta.sum(1) / c.kept)
        slot = torch.arange(self.top_c, device=w.device).view(1, -1, *[1] * (w.ndim - 1))
        total = torch.as_tensor(c.total).expand(len(w), *[1] * (w.ndim - 1)).unsqueeze(1)
        least = slot == s.priority.argmin(1, keepdim=True)
        free = torch.as_tensor(c.free, device=w.device)
        here = torch.where(free >= 0, slot == free, least & (s.priority < total))
        s.momenta.copy_(torch.where(here, u.unsqueeze(1), s.momenta))
        s.priority.copy_(torch.where(here, total, s.priority) * c.decay)
        return mixed


@method(
    "Malviya et al. 2023, Promoting Exploration in Memory-Augmented Adam using Critical Momenta, arXiv:2307.09638",
    note="the authors tune top_c in 5, 10, 20 and decay in 0.7, 0.99; lr as adam's or a tenth of it",
)
def adam_critical_momenta(
    lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, top_c: int = 5,
    decay: float = 0.7,
) -> Chain:  # fmt: skip
    """w ← w − lr (a / (1 − β₁ᵗ) / (√v̂ + ε) + λ w), a = m + mean of ``top_c`` kept momenta, v the average of a².

    Overshoots narrow minima and stays in flat ones. 2 + ``top_c`` buffers. As in the authors' code a is a sum and v is
    made of a; their first step, which moves nothing, is not repeated here.
    """
    beta1, beta2 = pair(betas)
    keep = CriticalMomenta(top_c, decay)
    return chain(Ema(beta1), keep, Debias(beta1), Rms(beta2, eps), Decay(weight_decay), Scale(lr))


@dataclass(frozen=True)
class Damp(Part):
    """u / (1 + (u · max|u|)²), the maximum over the tensor: the largest gradients count least."""

    width: ClassVar[Width] = "tensor"

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        top = u.abs().flatten(1).amax(1).view(-1, *[1] * (w.ndim - 1))
        return u / (1 + (u * top).square())


@dataclass(frozen=True)
class Fall(Part):
    """V ← b V + (1 − b) u with b = (β t + 1) / (t + 2) and V₀ normal with deviation α / lr."""

    reads: ClassVar[tuple[str, ...]] = ("noise",)
    lr: float = 0.1
    alpha: float = 0.01
    beta: float = 0.9

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "exp_avg")

    def clock(self, t: int) -> dict[str, float]:
        lr: Any = self.lr
        if isinstance(lr, Tensor):
            spread: Any = torch.where(lr > 0, self.alpha / lr, 0.0)
        else:
            spread = self.alpha / lr if lr else 0.0
        return {"keep": (self.beta * t + 1) / (t + 2), "spread": spread}

    def draws(self, t: int) -> bool:
        return t == 1

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        if "noise" in vars(c):
            s.exp_avg.copy_(c.noise * c.spread)
        return mix_(s.exp_avg, u, c.keep)


@method(
    "Bahrami & Pouriyan Zadeh 2021, Gravity Optimizer: a Kinematic Approach on Optimization in Deep Learning, "
    "arXiv:2101.09192",
    note="t counts from 1 as in the authors' torch code; from 0 in their Keras code",
)
def gravity(lr: float = 0.1, alpha: float = 0.01, beta: float = 0.9) -> Chain:
    """w ← w − lr V with V ← b V + (1 − b) ζ, ζ = g / (1 + (g max|g|)²), b = (β t + 1) / (t + 2), V₀ ~ N(0, (α / lr)²).

    The largest gradients are damped by their size, so the scale of the loss matters. One buffer. V₀ is drawn from the
    parameter's name.
    """
    return chain(Damp(), Fall(lr, alpha, beta), Scale(lr))
