"""Norms whose gain each token sets for itself: of its direction, of its length, or by a gate. x: [..., d]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.norms._kernels import rms
from etude.norms._token import TokenNorm


@method("Cai et al. 2025, SeeDNorm: Self-Rescaled Dynamic Normalization, arXiv:2510.22777")
def seed_norm(d: int, heads: int = 1, eps: float = 1e-6) -> TokenNorm:
    """x / √(mean x² + eps) · (weight + alpha · tanh⟨x, beta⟩), the product over each of ``heads`` slices of raw x."""
    if d % heads:
        raise ValueError(f"seed_norm: {d} features do not divide into {heads} heads")
    starts = {"weight": torch.ones(d), "alpha": torch.ones(d), "beta": torch.zeros(d)}
    return TokenNorm(_seed, d, starts, heads=heads, eps=eps)


def _seed(x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor, heads: int, eps: float) -> Tensor:
    t = (x * beta).reshape(*x.shape[:-1], heads, x.shape[-1] // heads).sum(-1, keepdim=True).tanh()
    gain: Tensor = weight + (t * alpha.view(heads, -1)).flatten(-2)
    return rms(x, torch.ones_like(weight), eps) * gain


_SINKS = (
    "Qiu et al. 2026, A Unified View of Attention and Residual Sinks: Outlier-Driven Rescaling is Essential for "
    "Transformer Training, arXiv:2601.22966"
)


@method(_SINKS)
def gated_norm(d: int, rank: int = 16, eps: float = 1e-6) -> TokenNorm:
    """y · σ(up · silu(down · y)), y = rms_norm(x): a gate per channel, near ½ at the start. down: [rank, d]."""
    down, up = nn.Linear(d, rank, bias=False), nn.Linear(rank, d, bias=False)
    starts = {"weight": torch.ones(d), "down": down.weight.detach(), "up": up.weight.detach()}
    return TokenNorm(_gated, d, starts, eps=eps)


def _gated(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, eps: float) -> Tensor:
    y = rms(x, weight, eps)
    inner = F.silu(F.linear(y, down.to(y.dtype)))
    return y * torch.sigmoid(F.linear(inner, up.to(inner.dtype)))


@method(_SINKS)
def pre_affine(d: int, eps: float = 1e-6) -> TokenNorm:
    """rms_norm(pre_weight · x): a learned scale before the statistics too, which takes up what outliers would do."""
    return TokenNorm(_pre_affine, d, {"pre_weight": torch.ones(d), "weight": torch.ones(d)}, eps=eps)


def _pre_affine(x: Tensor, pre_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms(x * pre_weight, weight, eps)


@method("Ma et al. 2025, Plain Transformers Can be Powerful Graph Learners, arXiv:2504.12588")
def ada_rms_norm(d: int, eps: float = 1e-6) -> TokenNorm:
    """x · √(mean (alpha x + beta)² + eps) / √(mean x² + eps): rms_norm at alpha 0, the start; alpha · x at beta 0."""
    return TokenNorm(_ada_rms, d, {"alpha": torch.zeros(d), "beta": torch.ones(d)}, eps=eps)


def _ada_rms(x: Tensor, alpha: Tensor, beta: Tensor, eps: float) -> Tensor:
    new = (alpha * x + beta).square().mean(-1, keepdim=True) + eps
    return x * (new / (x.square().mean(-1, keepdim=True) + eps)).sqrt()


@method(
    "Wei et al. 2024, Skywork-MoE: A Deep Dive into Training Techniques for Mixture-of-Experts Language Models, "
    "arXiv:2406.06563"
)
def gating_logit_norm(d: int, lam: float = 1.0, eps: float = 1e-5) -> TokenNorm:
    """lam · (z − mean) / √(var + eps) of a router's logits, before softmax: lam sets how sharp. z: [..., experts]."""
    return TokenNorm(_logits, d, {}, lam=lam, eps=eps)


def _logits(z: Tensor, lam: float, eps: float) -> Tensor:
    # The paper says neither which std nor what guards it: the biased one here, with eps inside the root.
    return lam * F.layer_norm(z, z.shape[-1:], eps=eps)
