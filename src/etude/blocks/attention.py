"""Attention, once: the variants fill its slot for what happens to queries and keys before they meet."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method


class Attention(nn.Module):
    """out(softmax(q kᵀ) v) per head. x: [b, t, d], context (default x): [b, s, d]; the result: [b, t, d].

    ``qk`` is a module (q, k) → (q̂, k̂), both [b, heads, t, d / heads], that owns the scale of the logits; without it
    they are divided by √(d / heads). ``mask`` broadcasts to [b, heads, t, s]: True, or 0, lets a query see a key.
    """

    def __init__(
        self,
        d: int,
        heads: int = 8,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        qk: nn.Module | None = None,
    ):
        super().__init__()
        if d % heads:
            raise ValueError(f"attention of width {d} does not divide into {heads} heads")
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.q, self.k, self.v, self.out = (nn.Linear(d, d, bias=bias) for _ in range(4))
        self.qk = qk

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self._split(self.q(x)), self._split(self.k(context)), self._split(self.v(context))
        if self.causal and mask is not None:
            raise ValueError("causal attention makes its own mask; put both into mask, with causal=False")
        scale = None
        if self.qk is not None:
            (q, k), scale = self.qk(q, k), 1.0
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, self.causal, scale=scale)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}, causal={self.causal}"


class UnitQK(nn.Module):
    """g q / ‖q‖ and k / ‖k‖ over each head's axis; g one learned scalar, so that logits are g times a cosine."""

    _role = "norm"

    def __init__(self, g: float):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(g))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (self.g * F.normalize(q, dim=-1)).to(q.dtype), F.normalize(k, dim=-1)


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
