"""In which norm the step is steepest: sign (ℓ∞), diagonal root mean square, spectral. u: [k, …]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from etude._linalg import polar
from etude.rules._rule import Context, Part, State, Width, mix_square_

Adjust = Literal["match_rms_adamw", "original"]


@dataclass(frozen=True)
class Sign(Part):
    """sign(u): every coordinate moves by the same amount."""

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return u.sign()


@dataclass(frozen=True)
class Rms(Part):
    """u / (√(v / (1 − βᵗ)) + ε) with v ← β v + (1 − β) g²; g is the raw gradient."""

    beta: float = 0.999
    eps: float = 1e-8

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {"exp_avg_sq": torch.zeros_like(w)}

    def clock(self, t: int) -> dict[str, float]:
        return {"bias": 1 - self.beta**t}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        v = mix_square_(s.exp_avg_sq, g, c.beta)
        return torch.div(u, (v / c.bias).sqrt_().add_(c.eps))


@dataclass(frozen=True)
class Polar(Part):
    """The orthogonal factor of each matrix of u, about U Vᵀ, by Newton–Schulz.  u: [k, m, n…], trailing axes joined.

    ``adjust`` sizes the step: ``original`` by √max(1, m/n), ``match_rms_adamw`` by 0.2 √max(m, n), so that an AdamW
    learning rate serves.
    """

    width: ClassVar[Width] = "matrix"
    ns_steps: int = 5
    adjust: Adjust = "match_rms_adamw"

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        x = u.flatten(2)
        m, n = x.shape[-2:]
        size = math.sqrt(max(1, m / n)) if self.adjust == "original" else 0.2 * math.sqrt(max(m, n))
        return polar(x, self.ns_steps).to(u.dtype).mul_(size).view(u.shape)
