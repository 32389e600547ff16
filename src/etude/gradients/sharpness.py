"""Gradients taken at a worse point nearby, so that descent prefers flat minima."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from etude._method import method
from etude._roles import roles
from etude.gradients._gradient import Grads, along, bound, joint, length, over
from etude.gradients._nearby import Nearby, Pairs
from etude.gradients.plain import plain


@dataclass(frozen=True, repr=False)
class Sam(Nearby):
    """ε = rho·g/‖g‖₂, one norm over all weights that move."""

    def away(self, moved: Pairs, lead: int) -> Iterator[Tensor]:
        scale = over(self.rho, joint((g for _, g in moved), lead))
        yield from (g * along(scale, g) for _, g in moved)


@dataclass(frozen=True, repr=False)
class Asam(Nearby):
    """ε = rho·T²g/‖T g‖₂ with T = |w| + eta for each weight."""

    eta: float

    def away(self, moved: Pairs, lead: int) -> Iterator[Tensor]:
        scale = over(self.rho, joint((g * (w.abs() + self.eta) for w, g in moved), lead))
        yield from (g * (w.abs() + self.eta).square() * along(scale, g) for w, g in moved)


@dataclass(frozen=True, repr=False)
class Gsam(Sam):
    """SAM's gradient, less ``alpha`` times the part of ∇ℓ(w) orthogonal to it."""

    alpha: float

    def meet(self, here: Grads, there: Grads, lead: int) -> Grads:
        both = [(a, b) for a, b in zip(here, there) if a is not None and b is not None]
        wide = [torch.promote_types(b.dtype, torch.float32) for _, b in both]
        inner = torch.stack(
            [
                (a.to(t) * b.to(t)).reshape(*b.shape[:lead], -1).sum(-1).to(both[0][0].device)
                for (a, b), t in zip(both, wide)
            ]
        ).sum(0)
        share = over(inner, joint((b for _, b in both), lead).square())  # ∇ℓ(w) along SAM's gradient
        return [
            b if a is None or b is None else b - self.alpha * (a - along(share, b) * b) for a, b in zip(here, there)
        ]


@dataclass(frozen=True, repr=False)
class SamOn(Sam):
    """SAM that moves the parameters of normalisation layers only."""

    on: tuple[Tensor, ...] | None = field(default=None, compare=False)

    def bind(self, model: nn.Module) -> SamOn:
        named = dict(model.named_parameters())
        found = tuple(named[name] for name, role in roles(model).items() if role == "norm")
        if not found:
            raise ValueError(f"{self}: {type(model).__name__} has no normalisation layer with parameters to move")
        return bound(self, on=found)

    def chosen(self, pairs: Pairs, lead: int) -> Pairs:
        if lead:
            raise NotImplementedError(f"{self} is not written for several models at once")
        if self.on is None:
            raise ValueError(f"{self} does not know the normalisation layers yet: gradients.{self}.bind(model)")
        own = {id(p) for p in self.on}
        found = [(w, g) for w, g in pairs if id(w) in own]
        if not found:
            raise ValueError(f"{self}: the loss reaches none of the {len(own)} norm parameters it was bound to")
        return found


@dataclass(frozen=True, repr=False)
class Awp(Nearby):
    """ε = gamma·‖w‖ g/‖g‖, the norms of each matrix; vectors stay."""

    def chosen(self, pairs: Pairs, lead: int) -> Pairs:
        found = [(w, g) for w, g in pairs if w.ndim - lead > 1]
        if not found:
            raise ValueError(f"{self} moves matrices, and the loss reaches none")
        return found

    def away(self, moved: Pairs, lead: int) -> Iterator[Tensor]:
        for w, g in moved:
            yield g * along(over(self.rho * length(w, lead), length(g, lead)), g)


def _radius(of: str, rho: float, name: str = "rho") -> float:
    if not isinstance(rho, (int, float)) or not 0 <= rho < math.inf:
        raise ValueError(f"{of}: {name} is the radius of a ball, so finite and ≥ 0; got {rho!r}")
    return rho


@method(
    "Foret et al. 2020, Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv:2010.01412",
    off=lambda: (sam(rho=0.0), plain()),
    note="rho 0.05 on CIFAR from scratch; the authors fine-tune EfficientNet with 0.1",
)
def sam(rho: float = 0.05) -> Sam:
    """g = ∇ℓ(w + rho·∇ℓ(w)/‖∇ℓ(w)‖₂), one norm over all parameters; two passes over the same batch.

    Against overfitting: flat minima generalise better, also after fine-tuning and with label noise, says the paper.
    As in the authors' code the second pass sees the dropout masks of the first, and ``buffers`` (BatchNorm's running
    statistics) keep what the first pass made of them. Where the gradient is zero so is the step.
    """
    return Sam(_radius("sam", rho))


@method(
    "Kwon et al. 2021, ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural "
    "Networks, arXiv:2102.11600",
    off=lambda: (asam(rho=0.0), plain()),
)
def asam(rho: float = 0.5, eta: float = 0.01) -> Asam:
    """g = ∇ℓ(w + rho·T²∇ℓ(w)/‖T∇ℓ(w)‖₂) with T = |w| + eta: the ball of sam, measured in units of each weight.

    Against overfitting, where the scale of the weights means nothing (before a norm, between two ReLU layers): what
    rescaling cannot change, ``rho`` does not depend on either. As in the paper T is that of every parameter; the
    authors' code leaves biases as they are (T = 1).
    """
    if not isinstance(eta, (int, float)) or not 0 <= eta < math.inf:
        raise ValueError(f"asam: eta is added to |w|, so finite and ≥ 0; got {eta!r}")
    return Asam(_radius("asam", rho), eta)


@method(
    "Zhuang et al. 2022, Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv:2203.08065",
    off=lambda: (gsam(rho=0.05, alpha=0.0), sam(rho=0.05)),
    note="the authors let rho follow the learning rate from 0.04 to 0.02, alpha 0.4, for a ResNet-50",
)
def gsam(rho: float = 0.05, alpha: float = 0.4) -> Gsam:
    """g = ĝ − alpha·∇ℓ(w)_⊥, ĝ that of sam and ∇ℓ(w)_⊥ the part of ∇ℓ(w) orthogonal to ĝ.

    Against overfitting: besides the loss at the worst point nearby it lowers the gap to it, which is sharpness; the
    orthogonal part does not change the former to first order. Two passes, as for sam.
    """
    if not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
        raise ValueError(f"gsam: alpha is finite and ≥ 0; got {alpha!r}")
    return Gsam(_radius("gsam", rho), alpha)


@method(
    "Mueller et al. 2023, Normalization Layers Are All That Sharpness-Aware Minimization Needs, arXiv:2306.04226",
    off=lambda: (sam_on(rho=0.0), plain()),
    note="rho must be far larger than sam's 0.05, as few weights move: the authors search up to 10",
)
def sam_on(rho: float = 0.5) -> SamOn:
    """g = ∇ℓ(w + ε), ε = rho·∇ℓ(w)/‖∇ℓ(w)‖₂ on the gains and shifts of norm layers, 0 elsewhere; the norm is theirs.

    Against overfitting: better than moving all weights, for BatchNorm and LayerNorm, says the paper; and only those
    few parameters are kept for the way back. ``sam_on().bind(model)`` first: it finds the layers by type, not by name.
    """
    return SamOn(_radius("sam_on", rho))


@method(
    "Rangwani et al. 2022, Escaping Saddle Points for Effective Generalization on Class-Imbalanced Data, "
    "arXiv:2212.13827",
    off=lambda: (sam_long_tail(rho=0.05), sam(rho=0.05)),
    note="rho 0.8 for CIFAR-10-LT, or in steps: 0.05 for 5 epochs, 0.1 to 160, 0.5 to 180, then 0.6 to 200",
)
def sam_long_tail(rho: float = 0.8) -> Sam:
    """g = ∇ℓ(w + rho·∇ℓ(w)/‖∇ℓ(w)‖₂), sam with a wide radius on a loss that weights rare classes higher.

    For class imbalance and long tails: re-weighting alone leaves the tail classes at saddle points, and a wide radius
    leaves those, says the paper. Both passes are over the weighted loss; there the weight of a class of n examples
    turns from 1 to (1 − β)/(1 − βⁿ), β = 0.9999, scaled to sum to the number of classes, at epoch 160 of 200.
    """
    return Sam(_radius("sam_long_tail", rho))


@method(
    "Wu et al. 2020, Adversarial Weight Perturbation Helps Robust Generalization, arXiv:2004.05884",
    off=lambda: (awp(gamma=0.0), plain()),
    note="gamma 0.01 for adversarial training; 0.005 and only after 10 epochs for TRADES",
)
def awp(gamma: float = 0.01) -> Awp:
    """g = ∇ℓ(w + v), v = gamma·‖w‖ ∇ℓ(w)/‖∇ℓ(w)‖ with the norms of each matrix; norm gains and biases stay.

    Against robust overfitting: in adversarial training ``loss_fn`` is the loss on adversarial inputs, made at w
    before. The weights are back before the optimizer steps, where the authors' code steps first, so that weight decay
    sees w, not w + v.
    """
    return Awp(_radius("awp", gamma, "gamma"))
