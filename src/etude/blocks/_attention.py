"""Attention, once: what its variants change are slots, for positions, for queries and keys, and for the heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.blocks._residual import ScaledParameter


class Attention(nn.Module):
    """out(softmax(q kᵀ) v) per head. x: [b, t, d], context (default x): [b, s, d]; the result: [b, t, d].

    ``position`` and then ``qk`` are maps (q, k) → (q̂, k̂), q: [b, heads, t, c], k: [b, kv_heads, s, c], c = d / heads.
    ``qk`` owns the scale of the logits; without it they are divided by √c. ``gate`` maps the heads' outputs,
    [b, heads, t, c], before out. Each of ``kv_heads`` (default heads) serves heads / kv_heads neighbouring queries.
    ``mask`` broadcasts to [b, heads, t, s]: True lets a query see a key; numbers are added to the logits.
    """

    def __init__(
        self,
        d: int,
        heads: int = 8,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        qk: nn.Module | None = None,
        *,
        kv_heads: int | None = None,
        position: nn.Module | None = None,
        gate: nn.Module | None = None,
    ):
        super().__init__()
        if d % heads:
            raise ValueError(f"attention of width {d} does not divide into {heads} heads")
        self.kv_heads = heads if kv_heads is None else kv_heads
        if not 1 <= self.kv_heads <= heads or heads % self.kv_heads:
            raise ValueError(f"{heads} heads do not divide into groups for {self.kv_heads} kv_heads")
        self.heads, self.dropout, self.causal = heads, dropout, causal
        shared = d // heads * self.kv_heads
        self.q, self.k, self.v = (nn.Linear(d, n, bias=bias) for n in (d, shared, shared))
        self.out = nn.Linear(d, d, bias=bias)
        self.position, self.qk, self.gate = position, qk, gate

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.causal and mask is not None:
            raise ValueError("causal attention makes its own mask; put both into mask, with causal=False")
        context = x if context is None else context
        q, k = split(self.q(x), self.heads), split(self.k(context), self.kv_heads)
        v = split(self.v(context), self.kv_heads)
        q, k = (q, k) if self.position is None else self.position(q, k)
        q, k = (q, k) if self.qk is None else self.qk(q, k)
        y: Tensor = self.attend(x, q, k, v, mask)
        y = y if self.gate is None else self.gate(y)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The heads' outputs [b, heads, t, d / heads]; x is what the queries were made of."""
        dropout = self.dropout if self.training else 0.0
        scale = None if self.qk is None else 1.0
        grouped = self.kv_heads < self.heads
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, self.causal, scale=scale, enable_gqa=grouped)

    def extra_repr(self) -> str:
        shared = f"kv_heads={self.kv_heads}, " if self.kv_heads < self.heads else ""
        return f"heads={self.heads}, {shared}dropout={self.dropout}, causal={self.causal}"


def split(x: Tensor, heads: int) -> Tensor:
    """[b, t, heads · c] → [b, heads, t, c]."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads).transpose(1, 2)


class UnitQK(nn.Module):
    """g q / ‖q‖ and k / ‖k‖ over each head's axis; g one learned scalar, so that logits are g times a cosine."""

    _role = "norm"

    def __init__(self, g: float):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(g))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (self.g * F.normalize(q, dim=-1)).to(q.dtype), F.normalize(k, dim=-1)


class SphereQK(nn.Module):
    """s ⊙ q / ‖q‖ · √c and s ⊙ k / ‖k‖ over each head's c entries; s: [heads · c] is shared by q and k."""

    _role = "norm"

    def __init__(self, d: int, s_qk: float):
        super().__init__()
        self.s = ScaledParameter(d, s_qk, d**-0.5)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        s = self.s().view(q.shape[1], 1, -1).to(q.dtype)
        return (s * q.shape[-1] ** 0.5) * F.normalize(q, dim=-1), s * F.normalize(k, dim=-1)


class DistanceQK(nn.Module):
    """[q, 1] / √c and [k, −‖k‖² / 2]: the logits are −‖q − k‖² / (2 √c) but for a term that all keys share."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        root = q.shape[-1] ** -0.5
        length = -0.5 * k.square().sum(-1, keepdim=True)
        return torch.cat([q, torch.ones_like(q[..., :1])], -1) * root, torch.cat([k, length], -1)


class Rotary(nn.Module):
    """Turns entries 2i and 2i + 1 of position t by the angle t / base^(2i / c); logits then tell t − s alone."""

    def __init__(self, base: float = 10000.0):
        super().__init__()
        self.base = base

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if q.shape[-1] % 2:
            raise ValueError(f"rotary positions turn pairs, but a head has {q.shape[-1]} entries; choose other heads")
        rates = self.base ** (-torch.arange(0, q.shape[-1], 2, device=q.device, dtype=_wide(q)) / q.shape[-1])
        longer = torch.arange(max(q.shape[-2], k.shape[-2]), device=q.device, dtype=_wide(q))
        angles = torch.outer(longer, rates)
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        return turn(q, cos, sin), turn(k, cos, sin)

    def extra_repr(self) -> str:
        return f"base={self.base:g}"


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x₀, x₁), (x₂, x₃), … of each position turned. x: [b, h, t, c]; cos and sin: [≥ t, c / 2]."""
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class HeadScale(nn.Module):
    """One learned number γ for each head, from 1. y: [b, heads, t, c]."""

    def __init__(self, heads: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads))

    def forward(self, y: Tensor) -> Tensor:
        return y * self.gamma[:, None, None].to(y.dtype)


class AffineScaled(Attention):
    """(α softmax(q kᵀ) + (ᾱ − α) / n) v over the n keys that a query sees; α = φ(W x), ᾱ its running mean."""

    alpha_ma: Tensor

    def __init__(self, d: int, heads: int, bias: bool, dropout: float, causal: bool, rho: float):
        super().__init__(d, heads, bias, dropout, causal)
        self.alpha = nn.Linear(d, heads, bias=False)
        self.rho = rho
        self.register_buffer("alpha_ma", torch.zeros(heads))

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        alpha: Tensor = (0.1 * self.alpha(x) + 0.5).clamp(0, 1)
        if self.training and alpha.numel():
            with torch.no_grad():
                self.alpha_ma.lerp_(alpha.mean((0, 1)).to(self.alpha_ma.dtype), 1 - self.rho)
        alpha = alpha.transpose(1, 2).unsqueeze(-1)
        beta = self.alpha_ma[:, None, None].to(alpha.dtype) - alpha
        return alpha * super().attend(x, q, k, v, mask) + beta * self._mean(v, q.shape[-2], mask)

    def _mean(self, v: Tensor, t: int, mask: Tensor | None) -> Tensor:
        """The mean of the values that each query sees, [b, heads, t or 1, c]."""
        if self.causal:
            seen = torch.arange(1, v.shape[-2] + 1, device=v.device, dtype=v.dtype)
            means = v.cumsum(-2) / seen[:, None]
            return means[..., torch.arange(t, device=v.device).clamp(max=v.shape[-2] - 1), :]
        if mask is None:
            return v.mean(-2, keepdim=True)
        share = (mask if mask.dtype == torch.bool else mask > -torch.inf).to(v.dtype)
        seen = share.sum(-1, keepdim=True).clamp(min=1)
        return (share @ v).div(seen)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rho={self.rho}"


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
