"""What is remembered of past updates: momentum, averages, interpolations. u: [k, …]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etude.rules._rule import Context, Part, State, debias, mix_


@dataclass(frozen=True)
class Momentum(Part):
    """b ← μ b + u; gives b, or u + μ b with ``nesterov`` (Polyak's heavy ball in torch's form)."""

    momentum: float = 0.9
    nesterov: bool = False

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(w)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        b: Tensor = s.momentum_buffer.mul_(c.momentum).add_(u)
        return torch.add(u, b * c.momentum) if self.nesterov else b


@dataclass(frozen=True)
class Ema(Part):
    """m ← β m + (1 − β) u; gives m, m / (1 − βᵗ) with ``debias``, or (1 − β) u + β m with ``nesterov``."""

    beta: float = 0.9
    debias: bool = False
    nesterov: bool = False

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(w)}

    def clock(self, t: int) -> dict[str, float]:
        return {"debias": debias(self.beta, t)} if self.debias else {}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        m = mix_(s.exp_avg, u, c.beta)
        m = m * c.debias if self.debias else m
        return mix_(u.clone(), m, 1 - c.beta) if self.nesterov else m


@dataclass(frozen=True)
class Interpolate(Part):
    """Gives β₁ m + (1 − β₁) u, and only then m ← β₂ m + (1 − β₂) u."""

    beta1: float = 0.9
    beta2: float = 0.99

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(w)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        mixed = mix_(s.exp_avg.clone(), u, c.beta1)
        mix_(s.exp_avg, u, c.beta2)
        return mixed
