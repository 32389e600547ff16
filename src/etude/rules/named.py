"""The names of the literature: each a chain of parts. The update a chain ends with is subtracted from the weight."""

from __future__ import annotations

from etude._method import method
from etude.rules._rule import Chain, chain, pair
from etude.rules.gate import Decay, Scale, TrustRatio
from etude.rules.geometry import Adjust, Polar, Rms, Sign
from etude.rules.statistic import Ema, Interpolate, Momentum

Betas = tuple[float, float]


@method(
    "Robbins & Monro 1951, A Stochastic Approximation Method, doi:10.1214/aoms/1177729586",
    note="lr 0.1 is where He et al. 2015 (arXiv:1512.03385) start with momentum 0.9; torch's default is 1e-3",
)
def sgd(lr: float = 0.1, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False) -> Chain:
    """w ← w − lr b with b ← μ b + g + λ w, or lr (g + μ b) with ``nesterov``; torch's form of heavy-ball momentum.

    The least optimizer memory: one buffer, and none without momentum.
    """
    if nesterov and not momentum:
        raise ValueError("sgd(nesterov=True) needs a momentum > 0")
    remember = (Momentum(momentum, nesterov),) if momentum else ()  # without momentum there is nothing to store
    return chain(Decay(weight_decay), *remember, Scale(lr))


@method("Kingma & Ba 2014, Adam: A Method for Stochastic Optimization, arXiv:1412.6980")
def adam(lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8) -> Chain:
    """w ← w − lr m̂ / (√v̂ + ε): averages of the gradient and of its square, both free of start-up bias."""
    beta1, beta2 = pair(betas)
    return chain(Ema(beta1, debias=True), Rms(beta2, eps), Scale(lr))


@method(
    "Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization, arXiv:1711.05101",
    off=lambda: (adamw(weight_decay=0.0), adam()),
    note="the paper's own decay is not multiplied by lr: uncoupled=True; torch's is",
)
def adamw(
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    uncoupled: bool = False,
) -> Chain:
    """w ← w − lr (m̂ / (√v̂ + ε) + λ w); ``uncoupled``: w ← w − lr m̂ / (√v̂ + ε) − η λ w, η the schedule's multiplier.

    It generalises better than adam with an L2 penalty, says the paper. In bf16 small updates survive, as with every
    rule: see ``rounding`` of ``rules.optimizer``.
    """
    (beta1, beta2), decay, scale = pair(betas), Decay(weight_decay, uncoupled), Scale(lr)
    return chain(Ema(beta1, debias=True), Rms(beta2, eps), *((scale, decay) if uncoupled else (decay, scale)))


@method("Bernstein et al. 2018, signSGD: Compressed Optimisation for Non-Convex Problems, arXiv:1802.04434")
def signum(lr: float = 1e-4, momentum: float = 0.9, weight_decay: float = 0.0) -> Chain:
    """w ← w − lr (sign(m) + λ w) with m ← μ m + (1 − μ) g: one buffer, steps of one size.

    Half of adam's optimizer memory.
    """
    return chain(Ema(momentum), Sign(), Decay(weight_decay), Scale(lr))


@method(
    "Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675",
    off=lambda: (lion(betas=(0.9, 0.9)), signum(momentum=0.9)),
)
def lion(lr: float = 1e-4, betas: Betas = (0.9, 0.99), weight_decay: float = 0.0) -> Chain:
    """w ← w − lr (sign(β₁ m + (1 − β₁) g) + λ w), then m ← β₂ m + (1 − β₂) g: the sign of an interpolated momentum.

    One buffer: half of adam's optimizer memory.
    """
    return chain(Interpolate(*pair(betas)), Sign(), Decay(weight_decay), Scale(lr))


@method("You et al. 2019, Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, arXiv:1904.00962")
def lamb(lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.01) -> Chain:
    """w ← w − lr (‖w‖ / ‖r‖) r with r = m̂ / (√v̂ + ε) + λ w, the norms of each tensor.

    For large batches: the paper trains BERT with 32 868 examples at a time.
    """
    beta1, beta2 = pair(betas)
    return chain(Ema(beta1, debias=True), Rms(beta2, eps), Decay(weight_decay), TrustRatio(), Scale(lr))


@method(
    "Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks, https://kellerjordan.github.io/posts/muon/",
    note="with adjust='match_rms_adamw' (Liu et al. 2025, arXiv:2502.16982) lr is in AdamW units, else about 0.02",
)
def muon(
    lr: float = 1e-3, momentum: float = 0.95, nesterov: bool = True, ns_steps: int = 5, weight_decay: float = 0.1,
    adjust: Adjust = "match_rms_adamw",
) -> Chain:  # fmt: skip
    """w ← w − lr (c · NewtonSchulz(m) + λ w): momentum made orthogonal. For matrices; see ``route`` for the rest.

    One buffer: half of adam's optimizer memory for these matrices.
    """
    return chain(Ema(momentum, nesterov=nesterov), Polar(ns_steps, adjust), Decay(weight_decay), Scale(lr))
