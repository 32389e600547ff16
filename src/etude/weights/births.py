"""LoRA with other births: from the weight's own singular vectors, from a basis, or from one pass over the data.

A birth that takes B A out of W leaves the base its bits: the adapter subtracts what it took, so that disabling it gives
the pretrained model, and its file is read on the pretrained model. A rank is at most that of the weight.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from etude._method import method
from etude.weights._birth import Birth, Components, Gradient, Moment, Watch
from etude.weights._map import Adapter
from etude.weights.low_rank import Core, LoRA, lora


def _split(u: Tensor, s: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A and B with scale · B A = u diag(s) v, the singular values shared between them."""
    root = (s / scale).sqrt()
    return root[:, None] * v, u * root


def _singular(w: Tensor, r: int, scale: float, _: Watch | None, least: bool, niter: int) -> tuple[Tensor, Tensor]:
    """The r largest or least singular triples of W, the largest by ``niter`` subspace iterations if that is not 0."""
    r = min(r, *w.shape)
    if niter:
        u, s, v = torch.svd_lowrank(w, r, niter)
        return _split(u, s, v.mT, scale)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    part = slice(-r, None) if least else slice(r)
    return _split(u[:, part], s[part], v[part], scale)


def _qr(w: Tensor, r: int, _scale: float, _seen: Watch | None) -> tuple[Tensor, Tensor]:
    r = min(r, *w.shape)
    q, upper = torch.linalg.qr(w)
    return upper[:r], q[:, :r]


def _b_first(w: Tensor, r: int, _scale: float, _seen: Watch | None) -> tuple[Tensor, Tensor]:
    return w.new_zeros(r, w.shape[1]), nn.init.kaiming_uniform_(w.new_empty(w.shape[0], r), a=math.sqrt(5))


def _bin(w: Tensor, r: int, _scale: float, _seen: Watch | None, concept: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows concept · r … of an orthonormal basis that depends on the width and the seed alone; B zero."""
    out, into = w.shape
    r = min(r, into)
    if (concept + 1) * r > into:
        raise ValueError(f"{into} inputs have room for {into // r} concepts of rank {r}; concept={concept} is beyond")
    draw = torch.Generator().manual_seed(seed)
    gauss = [torch.randn(r, into, generator=draw, dtype=torch.float64) for _ in range(concept + 1)]
    q = torch.linalg.qr(torch.cat(gauss).mT)[0].mT  # each bin is the same whichever come after it
    return q[-r:].to(w), w.new_zeros(out, r)


def _context(w: Tensor, r: int, scale: float, seen: Watch | None, mode: str) -> tuple[Tensor, Tensor]:
    r, c = min(r, *w.shape), cast(Moment, seen).value.to(w)
    eye, size, damp = torch.eye(len(c), dtype=c.dtype, device=c.device), c.diagonal().mean(), 0.01
    if not (size.isfinite() and size > 0):
        raise ValueError("its inputs are all zero, or not finite, so corda finds no context in them")
    while torch.dist((moment := c + damp * size * eye) @ (inverse := torch.linalg.inv(moment)), eye) > 0.05:
        damp *= 2
    u, s, v = torch.linalg.svd(w @ moment, full_matrices=False)
    part = slice(r) if mode == "ipm" else slice(-r, None)
    return _split(u[:, part], s[part], v[part] @ inverse, scale)


def _explained(w: Tensor, _r: int, _scale: float, seen: Watch | None, whiten: bool) -> tuple[Tensor, Tensor]:
    found = cast(Components, seen)
    axes = found.axes[: found.rank].to(w)
    if whiten:
        axes = axes / found.values[: found.rank, None].to(w).sqrt()
    return axes, w.new_zeros(len(w), len(axes))


def _update(w: Tensor, r: int, scale: float, seen: Watch | None, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    step = -lr * cast(Gradient, seen).sum.sign()
    r = min(r, *w.shape)
    u, s, v = torch.linalg.svd(step.to(w), full_matrices=False)
    return v[:r], u[:, :r], torch.diag(s[:r] / scale)


class Eva(LoRA):
    """LoRA whose ranks are shared out: of all layers' components, those that explain most of their inputs' variance."""

    def __init__(self, r: int, alpha: float, rho: float, tau: float, whiten: bool) -> None:
        super().__init__(r, alpha, Birth(partial(_explained, whiten=whiten), watch=lambda: Components(round(r * rho))))
        if round(r * rho) < 1:
            raise ValueError(f"eva: rho={rho!r} leaves no component; a layer looks for r · rho of them")
        self.tau = tau

    def enough(self, watches: list[Watch]) -> bool:
        self.allot(watches)
        found = [cast(Components, watch) for watch in watches]
        ranks = [f.rank or 0 for f in found]
        return all(len(f.cosine) >= n and bool((f.cosine[:n] >= self.tau).all()) for f, n in zip(found, ranks))

    def allot(self, watches: list[Watch]) -> None:
        parts = [cast(Components, watch).explained.cpu() for watch in watches]
        owner = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])
        best = torch.cat(parts).argsort(descending=True, stable=True)[: self.r * len(watches)]
        for watch, n in zip(watches, torch.bincount(owner[best], minlength=len(watches)).tolist()):
            watch.rank = n


class Silver(Core):
    changes = "it starts as the best rank-r part of the first step of full fine-tuning"


class Fixed(LoRA):
    fixed = True


@method(
    "Hayou et al. 2024, The Impact of Initialization on LoRA Finetuning Dynamics, arXiv:2406.08447",
    off=lambda: (lora_init(random="A"), lora()),
)
def lora_init(r: int = 8, alpha: float = 16.0, random: Literal["A", "B"] = "B") -> Adapter:
    """W + (alpha / r) B A with B random and A zero (Init[B]), or A random and B zero (Init[A], LoRA's own).

    The paper's finding is for Init[A]: it stands larger learning rates and learns more; Init[B] is stabler. The random
    factor is drawn as nn.Linear's default for its own fan-in.
    """
    return LoRA(r, alpha) if random == "A" else LoRA(r, alpha, Birth(_b_first))


@method(
    "Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models, "
    "arXiv:2404.02948"
)
def pissa(r: int = 8, alpha: float = 8.0, niter: int = 0) -> Adapter:
    """W − s B0 A0 + s B A, s = alpha / r, where s B0 A0 is W's best rank-r part and A, B start at A0, B0.

    So the principal part of W trains, and the rest is frozen. ``niter``: iterations of a randomised singular value
    decomposition, for large weights; 0 takes the full one.
    """
    return LoRA(r, alpha, Birth(partial(_singular, least=False, niter=niter), takes=True))


@method(
    "Wang et al. 2024, MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning, "
    "arXiv:2406.09044"
)
def milora(r: int = 8, alpha: float = 8.0) -> Adapter:
    """W − s B0 A0 + s B A, s = alpha / r, where s B0 A0 is W's part of the r least singular values."""
    return LoRA(r, alpha, Birth(partial(_singular, least=True, niter=0), takes=True))


@method("Büyükakyüz 2024, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, arXiv:2406.01775")
def olora(r: int = 8, alpha: float = 8.0) -> Adapter:
    """W − s B0 A0 + s B A, s = alpha / r, W = Q R, B0 the first r columns of Q, A0 the first r rows of R."""
    return LoRA(r, alpha, Birth(_qr, takes=True))


@method("Po et al. 2024, Orthogonal Adaptation for Modular Customization of Diffusion Models, arXiv:2312.02432")
def orthogonal_adaptation(r: int = 8, weight: float = 1.0, concept: int = 0, seed: int = 0) -> Adapter:
    """W + weight · B A with A: [r, in] fixed, a bin of an orthonormal basis that all concepts share, and B from zero.

    Concepts of different numbers (and the same r and seed) have A_i A_jᵀ = 0, so that they are merged by adding them up
    (``weights.put`` several, ``weights.merge``) and do not disturb one another. ``weight`` is the λ of the sum.
    """
    if concept < 0:
        raise ValueError(f"orthogonal_adaptation: concept={concept} must be 0 or more")
    return Fixed(r, weight * r, Birth(partial(_bin, concept=concept, seed=seed)))


@method("Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language Models, arXiv:2406.05223")
def corda(r: int = 8, alpha: float = 8.0, mode: Literal["ipm", "kpm"] = "ipm") -> Adapter:
    """W − s B0 A0 + s B A, s = alpha / r, where s B0 A0 = U_r S_r V_rᵀ C⁻¹ of W C = U S Vᵀ, C = mean of xᵀx over data.

    Put with ``batches=`` of the task (``ipm``, the r largest: learn it better) or of what must not be forgotten
    (``kpm``, the r least). As the authors do, each sample's inputs are divided by |max x|, and C is damped until its
    inverse is good.
    """
    if mode not in ("ipm", "kpm"):
        raise ValueError(f"corda: mode={mode!r}: choose ipm (adapt the largest) or kpm (adapt the least)")
    return LoRA(r, alpha, Birth(partial(_context, mode=mode), takes=True, watch=Moment))


@method(
    "Paischer et al. 2025, One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation, "
    "arXiv:2410.07170"
)
def eva(r: int = 8, alpha: float = 8.0, rho: float = 2.0, tau: float = 0.99, whiten: bool = False) -> Adapter:
    """W + (alpha / r) B A with A the leading principal components of the layer's inputs, and B zero.

    Put with ``batches=`` of the task, without padding. Each layer finds up to r · rho components; of all layers', the
    r · layers that explain most of their layer's variance are kept, and a layer that keeps none is left alone. The pass
    ends when successive components have a cosine of ``tau``. ``whiten`` divides by the root of the singular value.
    """
    return Eva(r, alpha, rho, tau, whiten)


@method(
    "Ponkshe et al. 2024, Initialization using Update Approximation is a Silver Bullet for Extremely Efficient "
    "Low-Rank Fine-Tuning, arXiv:2411.19557"
)
def lora_sb(r: int = 96, lr: float = 4e-6) -> Adapter:
    """W + B R A with only R: [r, r] trained, born as the best rank-r part of −lr sign(∇W), full training's first step.

    Put with ``batches=`` and ``loss=``, some 50 samples. ``lr`` is that of the first step of the warm-up, which is the
    authors' reading of the paper's η.
    """
    return Silver(r, float(r), Birth(partial(_update, lr=lr), watch=Gradient))
