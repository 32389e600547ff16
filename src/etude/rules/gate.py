"""What lets an update through, and how far: decay, learning rate, trust ratio, clipping, caution. u: [k, …]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from etude.rules._rule import Context, Part, State, Width, mean, norm


@dataclass(frozen=True)
class Decay(Part):
    """u + λ w. Before ``Scale`` the decay is lr · λ, as torch has it; ``uncoupled``, after ``Scale``, it is λ times the
    schedule's multiplier alone, as the paper has it. First in a chain it is ℓ2 regularisation."""

    reads: ClassVar[tuple[str, ...]] = ("multiplier",)
    weight_decay: float = 0.01
    uncoupled: bool = False

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        rate = c.weight_decay * c.multiplier if self.uncoupled else c.weight_decay
        if isinstance(rate, Tensor):
            return u + rate * w
        return torch.add(u, w, alpha=rate) if rate else u


@dataclass(frozen=True)
class Scale(Part):
    """lr · u."""

    lr: float = 1e-3

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return torch.mul(u, c.lr)


@dataclass(frozen=True)
class TrustRatio(Part):
    """u · ‖w‖ / ‖u‖ for each tensor; 1 where either norm is 0."""

    width: ClassVar[Width] = "tensor"

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        size, step = norm(w), norm(u)
        return u * torch.where((size > 0) & (step > 0), size / step, 1.0)


@dataclass(frozen=True)
class ClipNorm(Part):
    """g · min(1, max_norm / ‖g‖), one norm over a model's parameters that this chain serves (Pascanu et al. 2013)."""

    width: ClassVar[Width] = "model"
    on_gradient: ClassVar[bool] = True
    max_norm: float = 1.0

    def partial(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return u * u

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return torch.mul(u, (c.max_norm / (c.total.sqrt() + 1e-6)).clamp(max=1.0))


@dataclass(frozen=True)
class Cautious(Part):
    """u where it agrees in sign with g, else 0, divided by the share that agrees (Liang et al. 2024)."""

    width: ClassVar[Width] = "tensor"

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        agree = (u * g > 0).to(u.dtype)
        return u * agree / mean(agree).clamp(min=1e-3)
