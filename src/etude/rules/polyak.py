"""Polyak's step: how far to go, told by how far the loss is from its lowest. u: [k, …]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from etude._method import method
from etude.rules._rule import Chain, Context, Part, State, Width, chain, debias, mix_square_, norm, total
from etude.rules.gate import Scale
from etude.rules.statistic import Momentum


@dataclass(frozen=True)
class Polyak(Part):
    """η (u + λ w) with η = min(lr, (loss − lb) / (c ‖u‖²)), one norm over the model, and η ≥ 0."""

    width: ClassVar[Width] = "model"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    lr: float = 0.1
    lb: float = 0.0
    c: float = 1.0
    weight_decay: float = 0.0

    def partial(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return norm(u) ** 2

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        eta = ((c.loss - c.lb) / (c.c * c.total)).nan_to_num(0.0).clamp(min=0.0).clamp(max=c.lr)
        return torch.mul(u + c.weight_decay * w, eta)


@dataclass(frozen=True)
class HeavyBallPolyak(Part):
    """lr η u − β D with D = w − w_before and η = (loss − lb + β <u, D>) / ‖u‖² over the model, and η ≥ 0."""

    width: ClassVar[Width] = "model"
    reads: ClassVar[tuple[str, ...]] = ("loss",)
    lr: float = 1.0
    beta: float = 0.9
    lb: float = 0.0

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {"moved": torch.zeros_like(w)}

    def partial(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> dict[str, Tensor]:
        return {"along": total(u * s.moved), "squares": norm(u) ** 2}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        eta = ((c.loss - c.lb + c.beta * c.along) / c.squares).clamp(min=0.0)
        eta = torch.where(c.squares > 0, c.lr * eta, 0.0)
        return torch.neg(s.moved.mul_(c.beta).sub_(eta * u))


_ALR = "Wang et al. 2023, Generalized Polyak Step Size for First Order Optimization with Momentum, arXiv:2305.12939"


@method(_ALR, note="lr caps the step; c is commonly tuned between 0.1 and 10")
def alr_smag(lr: float = 0.1, beta: float = 0.9, lb: float = 0.0, c: float = 1.0, weight_decay: float = 0.0) -> Chain:
    """w ← w − η (d + λ w), d ← β d + g, η = min(lr, (ℓ − lb) / (c ‖d‖²)): Polyak's step for momentum, on batches.

    Less sensitive to the learning rate and the momentum. It reads the loss: ``opt.step(closure)``.
    """
    return chain(Momentum(beta), Polyak(lr, lb, c, weight_decay))


@method(_ALR)
def alr_hb(lr: float = 1.0, beta: float = 0.9, lb: float = 0.0) -> Chain:
    """w ← w − lr η g + β D, D = w − w_before, η = (ℓ − lb + β <g, D>) / ‖g‖²: Polyak's step for the heavy ball.

    For whole-data gradients and a known minimum ``lb``; lr is 1 in the paper. It reads the loss: ``opt.step(closure)``.
    """
    return chain(HeavyBallPolyak(lr, beta, lb))


Sums = Literal["adam", "adagrad"]


@dataclass(frozen=True)
class Squares(Part):
    """u / (B + ε) with no root: B is adam's v̂ = v / (1 − βᵗ), v ← β v + (1 − β) g², or adagrad's sum of all g²."""

    beta: float = 0.999
    eps: float = 1e-8
    sums: Sums = "adam"

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {"exp_avg_sq": torch.zeros_like(w)}

    def clock(self, t: int) -> dict[str, float]:
        return {"debias": debias(self.beta, t)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        if self.sums == "adagrad":
            return torch.div(u, s.exp_avg_sq.addcmul_(g, g) + c.eps)
        return torch.div(u, mix_square_(s.exp_avg_sq, g, c.beta) * c.debias + c.eps)


@dataclass(frozen=True)
class Sania(Part):
    """u · (1 − √(1 − 2 loss / q)), q = <g, u> over the model, and u itself where 2 loss ≥ q."""

    width: ClassVar[Width] = "model"
    reads: ClassVar[tuple[str, ...]] = ("loss",)

    def partial(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return total(g * u)

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        ratio = (2 * c.loss / c.total).nan_to_num(1.0).clamp(0.0, 1.0)
        return torch.mul(u, ratio / (1 + (1 - ratio).sqrt()))  # 1 − √(1 − ratio), to the last digit


@method(
    "Abdukhakimov et al. 2023, SANIA: Polyak-type Optimization Framework Leads to Scale Invariant Stochastic "
    "Algorithms, arXiv:2312.17369",
)
def sania(lr: float = 1.0, beta: float = 0.999, eps: float = 1e-8, sums: Sums = "adam") -> Chain:
    """w ← w − lr (1 − √(1 − 2 ℓ / q)) s, s = g / B, q = <g, s>, B an average of g² (Adam-SQR) or its sum (AdaGrad-SQR).

    No learning rate to tune, and badly scaled features make no difference, as B has no root. It takes the lowest loss
    to be 0, and reads the loss: ``opt.step(closure)``. ε is the paper's; the authors' torch code floors B at 0.1
    instead, which breaks the invariance.
    """
    return chain(Squares(beta, eps, sums), Sania(), Scale(lr))
