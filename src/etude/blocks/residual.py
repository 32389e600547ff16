"""Placements of norms, gates and scales: each published one is a setting of the slots of one residual block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from etude._method import method
from etude.blocks._attention import Attention, HeadScale
from etude.blocks._residual import Damp as Damp
from etude.blocks._residual import Gain, OrthogonalSum, Parallel, SphereStep, Weighted
from etude.blocks._residual import Residual as Residual
from etude.blocks.mlp import Mlp

MakeNorm = Callable[[int], nn.Module]


class Layer(nn.Module):
    """mlp(attention(x)), two residual blocks in turn. x: [b, t, d]."""

    def __init__(self, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Further arguments (a mask, a context) go to the attention."""
        return self.mlp(self.attention(x, *args, **kwargs))  # type: ignore[no-any-return]


@method("Xiong et al. 2020, On Layer Normalization in the Transformer Architecture, arXiv:2002.04745")
def pre_ln(d: int, f: nn.Module, norm: MakeNorm = nn.LayerNorm) -> Residual:
    """x + f(norm(x)): the residual path is never normalised; a stack ends in one norm. x: [..., d].

    Needs no warm-up of the learning rate: without it pre_ln reaches what post_ln reaches with it, says the paper.
    Around an mlp with He-normal weights it is the block of SimBa (Lee et al. 2024, arXiv:2410.09754).
    """
    return Residual(f, norm_in=norm(d))


@method("Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762")
def post_ln(d: int, f: nn.Module, norm: MakeNorm = nn.LayerNorm) -> Residual:
    """norm(x + f(x)): the residual path itself is normalised after each block. x: [..., d]."""
    return Residual(f, norm_sum=norm(d))


@method(
    "Kim et al. 2025, Peri-LN: Revisiting Layer Normalization in the Transformer Architecture, arXiv:2502.02732",
    off=lambda: (peri_ln(8, nn.Tanh(), norm_out=nn.Identity), pre_ln(8, nn.Tanh())),
)
def peri_ln(d: int, f: nn.Module, norm: MakeNorm = nn.LayerNorm, norm_out: MakeNorm | None = None) -> Residual:
    """x + norm_out(f(norm(x))): what f adds has unit scale too. norm_out is norm unless given. x: [..., d].

    Against the massive activations of pre_ln and the vanishing gradients of post_ln: variance grows evenly with depth,
    and gradients stay steady, says the paper. Its authors put the loss spikes of OPT-175B down to pre_ln in float16
    (NAVER Cloud 2025, Stable training: Preventing divergence with Peri-LN). The Sandwich-LN of CogView (Ding et al.
    2021, arXiv:2105.13290) is this same placement.
    """
    return Residual(f, norm_in=norm(d), norm_out=(norm_out or norm)(d))


@method("Wang et al. 2022, DeepNet: Scaling Transformers to 1,000 Layers, arXiv:2203.00555")
def deep_norm(d: int, f: nn.Module, layers: int, norm: MakeNorm = nn.LayerNorm) -> Residual:
    """norm((2 layers)^¼ x + f(x)), and the matrices of f but queries' and keys' start (8 layers)^-¼ times smaller.

    x: [..., d]. ``layers``: the depth of an encoder alone or a decoder alone, where a layer is an attention and an MLP.
    The matrices that f holds now are scaled: draw them (Xavier in the paper) before.
    """
    if layers < 1:
        raise ValueError(f"deep_norm scales by the depth of the model, so layers must be at least 1; got {layers}")
    kept = {id(m.weight) for a in f.modules() if isinstance(a, Attention) for m in (a.q, a.k)}
    with torch.no_grad():
        for p in f.parameters():
            if p.ndim > 1 and id(p) not in kept:
                p.mul_((8 * layers) ** -0.25)
    return Residual(f, norm_sum=norm(d), join=Weighted((2 * layers) ** 0.25))


@method(
    "Sun et al. 2025, The Curse of Depth in Large Language Models, arXiv:2502.05795",
    off=lambda: (layernorm_scaling(8, nn.Tanh(), layer=1), pre_ln(8, nn.Tanh())),
)
def layernorm_scaling(d: int, f: nn.Module, layer: int, norm: MakeNorm = nn.LayerNorm) -> Residual:
    """x + f(norm(x) / √layer) in layer 1, 2, …: the variance of the residual path grows slowly with depth. x: [..., d].

    Both blocks of a layer, attention and MLP, have its number; the final norm is not scaled. Not to be combined with
    an init that shrinks with depth, say the authors.
    """
    if layer < 1:
        raise ValueError(f"layernorm_scaling counts layers from 1; got layer={layer}")
    return Residual(f, norm_in=norm(d), scale_in=1 / math.sqrt(layer))


@method(
    "Chen et al. 2025, GPAS: Accelerating Convergence of LLM Pretraining via Gradient-Preserving Activation Scaling, "
    "arXiv:2506.22049"
)
def gpas(d: int, f: nn.Module, norm: MakeNorm = nn.LayerNorm, gate: Damp | None = None) -> Residual:
    """z − SiLU(a) · stopgrad(z) with z = x + f(norm(x)): activations shrink by 1 − SiLU(a), gradients do not.

    x: [..., d]; a is one learned number from 0. A layer has one gate: ``mlp = gpas(d, g, gate=first.gate_sum)``. Other
    placements hold a ``Damp`` too: as ``gate_sum``, or, with a norm after the sum, as ``skip``.
    """
    return Residual(f, norm_in=norm(d), gate_sum=gate or Damp())


@method(
    "Oh et al. 2025, Revisiting Residual Connections: Orthogonal Updates for Stable and Efficient Deep Networks, "
    "arXiv:2505.11881"
)
def orthogonal_residual(
    d: int,
    f: nn.Module,
    norm: MakeNorm = nn.LayerNorm,
    over: Literal["feature", "global"] = "feature",
    axis: int = -1,
    eps: float = 1e-6,
) -> Residual:
    """x + y − (⟨x, y⟩ / (‖x‖² + eps)) x with y = f(norm(x)): only what is orthogonal to x is added. x: [..., d].

    ``over="feature"``: products over ``axis``, for each token or pixel; ``"global"``: over all axes but the batch.
    """
    if over not in ("feature", "global"):
        raise ValueError(f'orthogonal_residual takes products over "feature" or "global", not {over!r}')
    return Residual(f, norm_in=norm(d), join=OrthogonalSum(axis if over == "feature" else None, eps))


@method("Bachlechner et al. 2020, ReZero is All You Need: Fast Convergence at Large Depth, arXiv:2003.04887")
def rezero(d: int, f: nn.Module, alpha: float = 0.0) -> Residual:  # noqa: ARG001 (d as in every placement)
    """x + α f(x) with one learned α from 0, and no norm: each block starts as the identity. x: [..., d].

    SkipInit (De & Smith 2020, arXiv:2002.10444) is this same scalar; there it may also start at 1 / √blocks.
    """
    return Residual(f, gate_out=Gain(alpha))


@method(
    "Brock et al. 2021, Characterizing signal propagation to close the performance gap in unnormalized ResNets, "
    "arXiv:2101.08692"
)
def nf_residual(d: int, f: nn.Module, alpha: float = 0.2, beta: float = 1.0) -> Residual:  # noqa: ARG001
    """x + α f(x / β), β the standard deviation that x has by design: f sees unit variance without a norm. x: [..., d].

    If f keeps variance 1 (by scaled weight standardisation), block i = 0, 1, … of a stage has β = √(1 + i α²). The
    first block of the next stage has the β that would follow; there the shortcut takes x / β too, and i starts anew
    after it.
    """
    if beta <= 0:
        raise ValueError(f"nf_residual divides by beta, a standard deviation, so beta={beta} must be above 0")
    return Residual(f, scale_in=1 / beta, join=Weighted(b=alpha))


@method("Touvron et al. 2021, Going deeper with Image Transformers, arXiv:2103.17239")
def layer_scale(d: int, f: nn.Module, lam: float = 1e-5, norm: MakeNorm = nn.LayerNorm) -> Residual:
    """x + λ ⊙ f(norm(x)), λ: [d] learned from ``lam``. x: [..., d].

    The paper starts at 0.1 up to 18 layers, at 1e-5 up to 24, at 1e-6 beyond.
    """
    return Residual(f, norm_in=norm(d), gate_out=Gain(lam, d))


@method("Zhong et al. 2022, A Neural ODE Interpretation of Transformer Layers, arXiv:2212.06011")
def parallel_transformer_block(
    d: int, attention: nn.Module, mlp: nn.Module, norm: MakeNorm = nn.LayerNorm, shared: bool = True
) -> Residual:
    """x + attention(norm(x)) + mlp(norm(x)): both see the same x, one Euler step of dx/dt. x: [b, t, d].

    One norm serves both, as in GPT-J and ViT-22B; ``shared=False`` gives each its own.
    """
    if shared:
        return Residual(Parallel(attention, mlp), norm_in=norm(d))
    return Residual(Parallel(attention, mlp, norms=(norm(d), norm(d))))


@method("Shleifer et al. 2021, NormFormer: Improved Transformer Pretraining with Extra Normalization, arXiv:2110.09456")
def normformer(
    d: int,
    heads: int = 8,
    hidden: int | None = None,
    activation: Callable[[], nn.Module] = nn.GELU,
    res_scale: bool = False,
    causal: bool = False,
) -> Layer:
    """A pre_ln layer with a norm after the attention, one scale per head, and a norm inside the MLP. x: [b, t, d].

    h = x + LN(out([γᵢ headᵢ])) of LN(x), then λ ⊙ h + W₂ LN(φ(W₁ LN(h))); γ from 1. λ: [d] is learned from 1
    with ``res_scale`` (for small models), else 1. The authors' code has γ after ``out``; here, as in the paper, before.
    """
    attention = Attention(d, heads, causal=causal, gate=HeadScale(heads))
    mlp = Mlp(d, hidden, activation, norm=nn.LayerNorm)
    return Layer(
        Residual(attention, norm_in=nn.LayerNorm(d), norm_out=nn.LayerNorm(d)),
        Residual(mlp, norm_in=nn.LayerNorm(d), skip=Gain(1.0, d) if res_scale else None),
    )


@method(
    "Loshchilov et al. 2024, nGPT: Normalized Transformer with Representation Learning on the Hypersphere, "
    "arXiv:2410.01131"
)
def normalized_residual(d: int, f: nn.Module, alpha: float = 0.05) -> Residual:
    """N(N(x) + |a| ⊙ (N(f(x)) − N(x))), N(x) = x / ‖x‖: a step on the sphere towards f(x). x: [..., d].

    a: [d] is learned from ``alpha``, stored as p · alpha √d with p from 1 / √d, so its steps are alpha √d times the
    optimizer's. f has no norm before it, since x has length 1.
    """
    return Residual(f, join=SphereStep(d, alpha))
