"""The attentions of the literature: each fills slots of `Attention`."""

from __future__ import annotations

import math

from etude._method import method
from etude.blocks._attention import (
    AffineScaled,
    Attention,
    DistanceQK,
    Rotary,
    SphereQK,
    UnitQK,
)


@method("Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762")
def attention(d: int, heads: int = 8, bias: bool = True, dropout: float = 0.0, causal: bool = False) -> Attention:
    """softmax(q kᵀ / √(d / heads)) v for each head, joined by one more matrix. x: [b, t, d]."""
    return Attention(d, heads, bias, dropout, causal)


@method("Henry et al. 2020, Query-Key Normalization for Transformers, arXiv:2010.04245")
def qk_norm(
    d: int, heads: int = 8, length: int = 75, bias: bool = True, dropout: float = 0.0, causal: bool = False
) -> Attention:
    """softmax(g q̂ k̂ᵀ) v with q̂, k̂ of unit length and g learned from log₂(length² − length). x: [b, t, d].

    Against saturation of the softmax: logits stay within ±g. Attention logits that grow make training unstable at high
    learning rates, and a norm of q and k is the cure (Wortsman et al. 2023, arXiv:2309.14322; theirs is a layer norm).
    ``length``: the sequence length, in tokens, that 97.5 % of the training sequences do not exceed.
    """
    if length < 2:
        raise ValueError(f"qk_norm starts at log₂(length² − length), so length must be at least 2; got {length}")
    return Attention(d, heads, bias, dropout, causal, qk=UnitQK(math.log2(length**2 - length)))


@method(
    "Ainslie et al. 2023, GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints, "
    "arXiv:2305.13245",
    off=lambda: (grouped_query_attention(16, 4, kv_heads=4, bias=False), attention(16, 4, bias=False)),
)
def grouped_query_attention(
    d: int, heads: int = 8, kv_heads: int = 2, bias: bool = True, dropout: float = 0.0, causal: bool = False
) -> Attention:
    """Attention in which heads / kv_heads neighbouring queries share one key and value head. x: [b, t, d].

    The cache of keys and values shrinks by heads / kv_heads; kv_heads=1 is multi-query attention.
    """
    return Attention(d, heads, bias, dropout, causal, kv_heads=kv_heads)


@method("Su et al. 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864")
def rotary_attention(
    d: int, heads: int = 8, base: float = 10000.0, bias: bool = True, dropout: float = 0.0, causal: bool = False
) -> Attention:
    """Attention whose q and k are turned by t / base^(2i / c) in each pair (2i, 2i + 1) of a head's c entries.

    x: [b, t, d]; logits depend on positions by their difference alone. Pairs are neighbours, as in the paper; Llama's
    weights pair entry i with i + c / 2.
    """
    return Attention(d, heads, bias, dropout, causal, position=Rotary(base))


@method("Ma et al. 2025, Plain Transformers Can be Powerful Graph Learners, arXiv:2504.12588")
def sl2_attention(d: int, heads: int = 8, bias: bool = True, dropout: float = 0.0, causal: bool = False) -> Attention:
    """softmax(−‖q − k‖² / (2 √c)) v with c = d / heads: keys count by closeness, not by length. x: [b, t, d].

    Computed as softmax((q kᵀ − ‖k‖² / 2) / √c). A bias for pairs of tokens, [b, heads, t, s], goes into ``mask``. The
    authors' code divides ‖k‖² / 2 by √c but not q kᵀ; this is the paper's formula.
    """
    return Attention(d, heads, bias, dropout, causal, qk=DistanceQK())


@method(
    "Bae et al. 2026, Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention, arXiv:2602.23057",
    note="ρ is 0.9 at all sizes of the paper (0.5B to 3B)",
)
def affine_scaled_attention(
    d: int, heads: int = 8, rho: float = 0.9, bias: bool = True, dropout: float = 0.0, causal: bool = False
) -> AffineScaled:
    """[α softmax(q kᵀ / √c) + (ᾱ − α) / n] v, α = clip(0.1 W x + 0.5, 0, 1) for each query and head. x: [b, t, d].

    n is the number of keys the query sees, so a row sums to ᾱ ← rho ᾱ + (1 − rho) mean α, from 0. The paper leaves open
    what the mean runs over: here each head has its ᾱ, over batch and positions, without gradient, at rest in eval.
    """
    return AffineScaled(d, heads, bias, dropout, causal, rho)


@method(
    "Loshchilov et al. 2024, nGPT: Normalized Transformer with Representation Learning on the Hypersphere, "
    "arXiv:2410.01131"
)
def normalized_attention(
    d: int, heads: int = 8, s_qk: float = 1.0, base: float = 10000.0, causal: bool = False
) -> Attention:
    """softmax(√c (s ⊙ q̂)(s ⊙ k̂)ᵀ) v, q̂ and k̂ turned by rotary positions and of length 1. x: [b, t, d].

    s: [d], a slice for each head, is shared by q and k; it starts at ``s_qk``, stored as p · s_qk √d, p from
    1 / √d. No biases. The matrices are to be kept at unit length along d.
    """
    return Attention(d, heads, False, 0.0, causal, qk=SphereQK(d, s_qk), position=Rotary(base))
