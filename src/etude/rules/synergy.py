"""Centred gradients, momentum of both signs, a decay in step with the whole model, and Ranger21 made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from etude._method import method
from etude.rules._rule import Chain, Context, Part, State, Width, chain, debias, mix_, pair, scalars, total
from etude.rules.averaging import Lookahead
from etude.rules.gate import Decay, Scale
from etude.rules.geometry import Rms
from etude.rules.moments import Debias, zeros
from etude.rules.statistic import Momentum
from etude.rules.trust import ClipUnits, unit_norm

Betas = tuple[float, float]


@dataclass(frozen=True)
class Centralize(Part):
    """u less the mean of each row, what leads to one output; vectors stay. The gradient that is left.

    ``standardize``: then over 1e-8 plus the standard deviation of the whole tensor, if it has more than two elements.
    """

    width: ClassVar[Width] = "shape"
    on_gradient: ClassVar[bool] = True
    standardize: bool = False

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        if u.ndim > 2:
            u = u - u.mean(tuple(range(2, u.ndim)), keepdim=True)
        if self.standardize and u[0].numel() > 2:
            u = u / (u.std(tuple(range(1, u.ndim)), keepdim=True) + 1e-8)
        return u


@method(
    "Yong et al. 2020, Gradient Centralization: A New Optimization Technique for Deep Neural Networks, arXiv:2004.01461"
)
def gradient_centralization(
    lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 5e-4, nesterov: bool = False
) -> Chain:
    """w ← w − lr b, b ← μ b + d, d = g + λ w less the mean of each row, what leads to one output; sgd that is centred.

    For faster and smoother training of networks with many inputs a neuron, and better generalisation, says the paper:
    the sum of a neuron's weights stays as it was drawn. Biases and gains move as by sgd. As in the authors' code the
    decay is centred too. Before any other rule: ``chain(Centralize(), *adamw())``.
    """
    return chain(Decay(weight_decay), Centralize(), Momentum(momentum, nesterov), Scale(lr))


@dataclass(frozen=True)
class PositiveNegative(Part):
    """((1 + β₀) mₜ − β₀ mₜ₋₁) / √((1 + β₀)² + β₀²), mₜ ← β² mₜ₋₂ + (1 − β²) u: two averages in turn; β₀: ``excess``."""

    beta: float = 0.9
    excess: float = 1.0

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "exp_avg", "neg_exp_avg")

    def clock(self, t: int) -> dict[str, float]:
        return {"odd": float(t % 2), "size": ((1 + self.excess) ** 2 + self.excess**2) ** 0.5}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        odd = torch.as_tensor(c.odd, device=u.device) > 0
        last = torch.where(odd, s.neg_exp_avg, s.exp_avg)
        m = mix_(torch.where(odd, s.exp_avg, s.neg_exp_avg), u, c.beta * c.beta)
        s.exp_avg.copy_(torch.where(odd, m, s.exp_avg))
        s.neg_exp_avg.copy_(torch.where(odd, s.neg_exp_avg, m))
        return torch.sub(m * (1 + c.excess), last * c.excess).div_(c.size)


_PNM = (
    "Xie et al. 2021, Positive-Negative Momentum: Manipulating Stochastic Gradient Noise to Improve Generalization, "
    "arXiv:2103.17182"
)


@method(_PNM)
def pnm(lr: float = 0.1, momentum: float = 0.9, beta0: float = 1.0, weight_decay: float = 0.0) -> Chain:
    """w ← w − lr (((1 + β₀) mₜ − β₀ mₜ₋₁) / √((1 + β₀)² + β₀²) + λ w), mₜ ← μ² mₜ₋₂ + (1 − μ²) g.

    More of the gradient's own noise at the same batch and learning rate, which seeks flat minima, the more the larger
    ``beta0``. Averages of odd and of even steps, hardly dependent; two buffers.
    """
    return chain(PositiveNegative(momentum, beta0), Decay(weight_decay), Scale(lr))


@method(_PNM)
def adapnm(
    lr: float = 1e-3, betas: Betas = (0.9, 0.999), beta0: float = 1.0, eps: float = 1e-8, weight_decay: float = 0.0,
    amsgrad: bool = True,
) -> Chain:  # fmt: skip
    """w ← w − lr (p / ((1 − β₁ᵗ)(√v̂ + ε)) + λ w), p the positive-negative momentum of `pnm`: the adaptive one.

    ``amsgrad``: v̂ is of the largest v so far, as in the paper.
    """
    beta1, beta2 = pair(betas)
    remember = PositiveNegative(beta1, beta0), Debias(beta1)
    return chain(*remember, Rms(beta2, eps, amsgrad=amsgrad), Decay(weight_decay), Scale(lr))


@dataclass(frozen=True)
class MeanRms(Part):
    """u · √v̄, or with ``inverse`` u / √v̄, 0 where v̄ is: v̄ the debiased average of g²'s mean over the whole model."""

    width: ClassVar[Width] = "model"
    per_member: ClassVar[bool] = True
    beta: float = 0.999
    inverse: bool = False

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return {"mean_square": scalars(w)}

    def clock(self, t: int) -> dict[str, float]:
        return {"debias": debias(self.beta, t)}

    def partial(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> dict[str, Tensor]:
        return {"squares": total(g * g), "count": scalars(w) + w.numel() / max(len(w), 1)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        root = (mix_(s.mean_square, c.squares / c.count, c.beta) * c.debias).sqrt()
        return torch.where(root > 0, u / root, 0.0) if self.inverse else torch.mul(u, root)


@dataclass(frozen=True)
class NormLoss(Part):
    """u + λ (1 − 1/‖w‖) w, the norm of each row, what leads to one output: decay towards length 1, not towards 0."""

    width: ClassVar[Width] = "shape"
    weight_decay: float = 1e-4

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        size = unit_norm(w)
        return torch.add(u, w * torch.where(size > 0, c.weight_decay * (1 - 1 / size), 0.0))


@method(
    "Wright and Demeure 2021, Ranger21: a synergistic deep learning optimizer, arXiv:2106.13731",
    note="warm up linearly over 22 % of the steps (or 2 / (1 − β₂)) and cool down linearly over the last 28 %",
)
def ranger21(
    lr: float = 1e-3, betas: Betas = (0.9, 0.999), beta0: float = 0.9, eps: float = 1e-8, weight_decay: float = 1e-4,
    additions: bool = False,
) -> Chain:  # fmt: skip
    """w ← w − lr (p / ((1 − β₁ᵗ)(√v̂ + ε)) + λ/√v̄ (1 − 1/‖w‖) w), p of clipped, centred gradients as in `adapnm`.

    For training without tuning much, and where AdamW does not start, as without normalisation: adamw with adaptive
    gradient clipping (0.01), gradient centralization, positive-negative momentum, stable weight decay (v̄: the mean of
    v / (1 − β₂ᵗ) over the whole model) of the norm loss's kind, ‖w‖ of rows, and lookahead (5 steps, 0.5). Warm-up,
    flat phase and warm-down are a schedule, not part of the rule. The two decays are one as in the second author's own
    code; in the released one they are apart and reach the last tensor of a group only, β₀ is 1, p is divided by
    √((1 + β₂)² + β₂²) and v̂ has lost its maximum. ``additions``: what came after the paper, gradients over their
    standard deviation and softplus(√v̂ + ε).
    """
    beta1, beta2 = pair(betas)
    return chain(
        ClipUnits(0.01), Centralize(additions), PositiveNegative(beta1, beta0), Debias(beta1),
        Rms(beta2, eps, amsgrad=True, softplus=additions), MeanRms(beta2), NormLoss(weight_decay),
        MeanRms(beta2, inverse=True), Scale(lr), Lookahead(),
    )  # fmt: skip
