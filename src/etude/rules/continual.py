"""Rules for learning that never ends: what is of use is spared, what is not is perturbed. u: [k, …]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from etude._method import method
from etude.rules._rule import Chain, Context, Part, State, Width, chain, debias, mix_, pair
from etude.rules.gate import Decay, Scale
from etude.rules.geometry import Rms
from etude.rules.named import Betas
from etude.rules.statistic import Ema


@dataclass(frozen=True)
class Utility(Part):
    """(u + σ ξ) (1 − φ), φ = sigmoid(Û / max Û) over the model, U ← β U + (1 − β) (−g w): what losing a weight costs.

    ξ standard normal, Û free of start-up bias. φ is ½ where no weight was of use or harm yet.
    """

    width: ClassVar[Width] = "model"
    gather: ClassVar[Literal["sum", "amax"]] = "amax"
    reads: ClassVar[tuple[str, ...]] = ("noise",)
    beta_utility: float = 0.999
    sigma: float = 1e-3

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {"utility": torch.zeros_like(w)}

    def clock(self, t: int) -> dict[str, float]:
        return {"debias": debias(self.beta_utility, t)}

    def cost(self, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        """About how much the loss would grow with w at 0."""
        return -g * w

    def partial(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return torch.mul(mix_(s.utility, self.cost(g, w, s, c), c.beta_utility), c.debias)

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        share = torch.where(c.total == 0, 0.0, s.utility * c.debias / c.total)
        return torch.mul(u + c.noise * c.sigma, torch.sigmoid(-share))


@dataclass(frozen=True)
class CurvedUtility(Utility):
    """The same with U ← β U + (1 − β) (½ h w² − g w), h the last estimate of the Hessian's diagonal."""

    reads: ClassVar[tuple[str, ...]] = ("noise", "hessian")

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {**super().init(w), "curvature": torch.zeros_like(w)}

    def cost(self, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        if "hessian" in vars(c):
            s.curvature.copy_(c.hessian)
        return torch.sub(0.5 * s.curvature * w * w, g * w)


@method(
    "Elsayed & Mahmood 2024, Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning, "
    "arXiv:2404.00781",
    note="the authors search lr in 1e-2 … 1e-5, sigma in 1e-3 … 1, weight_decay in 0 … 0.1",
)
def upgd(lr: float = 1e-2, beta_utility: float = 0.999, sigma: float = 1e-3, weight_decay: float = 1e-3) -> Chain:
    """w ← w − lr ((g + σ ξ) (1 − φ) + λ w), φ = sigmoid(Û / max Û), U an average of −g w, the maximum over the model.

    For tasks that change without end: useful weights are spared, so that little is forgotten, useless ones are
    perturbed, so that the network stays able to learn. As in the paper Û is free of start-up bias in both places;
    the authors' code divides by a maximum that is not, and its README doubles lr.
    """
    return chain(Utility(beta_utility, sigma), Decay(weight_decay), Scale(lr))


@method(
    "Elsayed & Mahmood 2024, Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning, "
    "arXiv:2404.00781",
    note="the authors' choice for reinforcement learning with PPO",
)
def adaupgd(
    lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-5, beta_utility: float = 0.999,
    sigma: float = 1e-3, weight_decay: float = 1e-3,
) -> Chain:  # fmt: skip
    """w ← w − lr (2 (m̂ / (√v̂ + ε) + σ ξ) (1 − φ) + λ w): upgd with adam's step for the gradient.

    For learning without end, e.g. by reinforcement. A weight of no use, φ = ½, takes adam's step.
    """
    beta1, beta2 = pair(betas)
    gate = Utility(beta_utility, sigma)
    return chain(Ema(beta1, debias=True), Rms(beta2, eps), gate, Decay(0.5 * weight_decay), Scale(2 * lr))


@method(
    "Elsayed & Mahmood 2023, Utility-based Perturbed Gradient Descent: An Optimizer for Continual Learning, "
    "arXiv:2302.03281",
    note="the authors take the Hessian's diagonal by HesScale",
)
def upgd_second_order(
    lr: float = 1e-2, beta_utility: float = 0.999, sigma: float = 1e-3, weight_decay: float = 1e-3
) -> Chain:
    """w ← w − lr ((g + σ ξ) (1 − φ) + λ w), φ = sigmoid(Û / max Û), U an average of ½ h w² − g w: upgd with curvature.

    For tasks that change without end. h: the Hessian's diagonal, from ``p.hessian``, which a curvature estimate among
    the gradients sets; on a quadratic whose Hessian is diagonal U is exactly what losing the weight costs.
    """
    return chain(CurvedUtility(beta_utility, sigma), Decay(weight_decay), Scale(lr))
