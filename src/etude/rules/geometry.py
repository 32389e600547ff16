"""In which norm the step is steepest: sign (ℓ∞), diagonal root mean square, spectral. u: [k, …]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from etude._linalg import polar
from etude.rules._rule import Context, Part, State, Width, debias, mix_square_

Adjust = Literal["match_rms_adamw", "original"]
Size = Literal["match_rms_adamw", "original", "spectral", "none"]


@dataclass(frozen=True)
class Sign(Part):
    """sign(u): every coordinate moves by the same amount."""

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return u.sign()


@dataclass(frozen=True)
class Rms(Part):
    """u / (√(v / (1 − βᵗ)) + ε) with v ← β v + (1 − β) g²; g is the raw gradient. Without ``debias`` √v as it is;
    with ``amsgrad`` the largest v so far; ``softplus``: log(1 + e^(50 x)) / 50 of that denominator x."""

    beta: float = 0.999
    eps: float = 1e-8
    debias: bool = True
    amsgrad: bool = False
    softplus: bool = False

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {k: torch.zeros_like(w) for k in ("exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))}

    def clock(self, t: int) -> dict[str, float]:
        return {"debias": debias(self.beta, t)} if self.debias else {}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        v = mix_square_(s.exp_avg_sq, g, c.beta)
        if self.amsgrad:
            v = s.max_exp_avg_sq.copy_(torch.maximum(s.max_exp_avg_sq, v))
        root = (v * c.debias).sqrt_() if self.debias else v.sqrt()
        root = root.add_(c.eps)
        return torch.div(u, softplus(root, 50) if self.softplus else root)


@dataclass(frozen=True)
class Polar(Part):
    """The orthogonal factor of each matrix of u, about U Vᵀ, by Newton–Schulz.  u: [k, m, n…], trailing axes joined.

    ``adjust`` sizes the step: ``original`` by √max(1, m/n), ``match_rms_adamw`` by 0.2 √max(m, n), so that an AdamW
    learning rate serves; ``spectral`` by √(m/n), under which what a step does to the features does not depend on the
    width (the spectral condition of µP); ``none`` leaves every singular value at about 1.
    """

    width: ClassVar[Width] = "matrix"
    ns_steps: int = 5
    adjust: Size = "match_rms_adamw"

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        x = u.flatten(2)
        m, n = x.shape[-2:]
        return polar(x, self.ns_steps).to(u.dtype).mul_(sized(m, n, self.adjust)).view(u.shape)


def sized(m: int, n: int, adjust: Size) -> float:
    """What an m × n matrix of singular values 1 is multiplied by."""
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    return {"original": math.sqrt(max(1, m / n)), "spectral": math.sqrt(m / n), "none": 1.0}[adjust]
