"""Attentions without softmax, linear in the number of tokens: keys meet values first, q (kᵀ v)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.blocks._attention import split, turn


class HeadNorm(nn.Module):
    """Layer norm of each head's entries, with weight and bias of its own: [heads, 1, c]. x: [b, heads, t, c]."""

    _role = "norm"

    def __init__(self, heads: int, c: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(heads, 1, c)), nn.Parameter(torch.zeros(heads, 1, c))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias, y, self.weight).to(x.dtype)


class IntegralAttention(nn.Module):
    """q (k̂ᵀ v̂) / n ("galerkin") or (q̂ k̂ᵀ) v / (n √c) ("fourier"), a hat for a layer norm per head. x: [b, n, d].

    ``coordinates``: their number p; then forward takes them, [b, n, p], puts them in front of q, k and v of each head,
    and one more matrix leads back to d. Without them there is no matrix after the heads.
    """

    def __init__(
        self,
        d: int,
        heads: int,
        kind: Literal["galerkin", "fourier"],
        dropout: float = 0.0,
        coordinates: int = 0,
        gain: float = 1e-2,
        diagonal: float = 1e-2,
        eps: float = 1e-5,
    ):
        super().__init__()
        if d % heads:
            raise ValueError(f"attention of width {d} does not divide into {heads} heads")
        self.heads, self.kind, self.dropout, self.coordinates = heads, kind, dropout, coordinates
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        with torch.no_grad():
            for linear in (self.q, self.k, self.v):
                nn.init.xavier_uniform_(linear.weight, gain)
                linear.weight.diagonal().add_(diagonal)
                nn.init.zeros_(linear.bias)
        self.norm_k = HeadNorm(heads, d // heads, eps)
        self.norm_other = HeadNorm(heads, d // heads, eps)  # of v (galerkin), of q (fourier)
        self.out = nn.Linear(d + heads * coordinates, d) if coordinates else None

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        given = 0 if at is None else at.shape[-1]
        if given != self.coordinates:
            raise ValueError(f"{self.kind} attention was made for {self.coordinates} coordinates a token, got {given}")
        q, k, v = (split(linear(x), self.heads) for linear in (self.q, self.k, self.v))
        k = self.norm_k(k)
        q, v = (self.norm_other(q), v) if self.kind == "fourier" else (q, self.norm_other(v))
        if at is not None:
            lead = at.to(x.dtype).unsqueeze(1).expand(-1, self.heads, -1, -1)
            q, k, v = (torch.cat([lead, t], -1) for t in (q, k, v))
        y = self._integrate(q, k, v).transpose(1, 2).flatten(2)
        return y if self.out is None else self.out(y)

    def _integrate(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, drop = max(q.shape[-2], 1), self.dropout if self.training else 0.0
        if self.kind == "galerkin":
            return q @ F.dropout(k.mT @ v / n, drop)
        q = q * (q.shape[-1] ** -0.5 / n)
        return F.dropout(q @ k.mT, drop) @ v if drop else q @ (k.mT @ v)

    def extra_repr(self) -> str:
        return f'heads={self.heads}, kind="{self.kind}", dropout={self.dropout}, coordinates={self.coordinates}'


class NormAwareAttention(nn.Module):
    """out(LN(attention + 5×5 convolution of v) ⊙ SiLU(g)) on an image. x: [b, h, w, d]; the formula is the method's."""

    def __init__(self, d: int, heads: int, power: float, base: float, eps: float = 1e-6):
        super().__init__()
        if d % (4 * heads):
            raise ValueError(
                f"norm-aware attention turns pairs for rows and pairs for columns, so a head needs a multiple of 4 "
                f"entries; width {d} has {d / heads:g} for each of {heads} heads"
            )
        self.heads, self.power, self.base, self.eps = heads, power, base, eps
        self.q, self.k, self.v, self.g, self.out = (nn.Linear(d, d) for _ in range(5))
        self.local = nn.Conv2d(d, d, 5, padding=2, groups=d)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, d = x.shape
        values = self.v(x)
        q, k, v = (split(t.flatten(1, 2), self.heads) for t in (self.q(x), self.k(x), values))
        y = self.attend(q, k, v, (h, w)).transpose(1, 2).reshape(b, h, w, d)
        y = y + self.local(values.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.out(self.norm(y) * F.silu(self.g(x)))  # type: ignore[no-any-return]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """The heads' outputs; q, k, v: [b, heads, h · w, c]. In float32 or wider."""
        wide, n = torch.promote_types(q.dtype, torch.float32), max(q.shape[-2], 1)
        p, r = self.features(q.to(wide), k.to(wide))
        z = 1 / (p @ r.mean(-2, keepdim=True).mT + self.eps)
        cos, sin = self._angles(size, q.shape[-1], wide, q.device)
        p, r = turn(p, cos, sin), turn(r, cos, sin)
        return (p @ (r.mT @ v.to(wide) / n) * z).to(v.dtype)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Positive and negative parts side by side, [b, heads, n, 2 c], raised to their powers."""
        length = q.norm(dim=-1, keepdim=True)
        q, power = F.normalize(q, dim=-1), self.power * (0.5 + length.tanh())
        return (
            torch.cat([q.relu() ** power, (-q).relu() ** power], -1),
            torch.cat([k.relu() ** self.power, (-k).relu() ** self.power], -1),
        )

    def _angles(self, size: tuple[int, int], c: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first half of a head's pairs turns with the row, the second with the column; for both parts alike."""
        rates = self.base ** -torch.linspace(0, 1, c // 4, dtype=dtype, device=device)
        rows, columns = (torch.arange(s, dtype=dtype, device=device)[:, None] * rates for s in size)
        shape = (*size, c // 4)
        angles = torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], -1).flatten(0, 1).repeat(1, 2)
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        return f"heads={self.heads}, power={self.power}, base={self.base:g}"


@method("Cao 2021, Choose a Transformer: Fourier or Galerkin, arXiv:2105.14995")
def galerkin_attention(d: int, heads: int = 4, dropout: float = 0.0) -> IntegralAttention:
    """Q (LN(K)ᵀ LN(V)) / n, no softmax, no matrix after the heads: a Petrov–Galerkin projection. x: [b, n, d].

    n is the number of tokens, so that sums are integrals and finer grids change little. The three matrices start as
    Xavier uniform with gain 0.01, plus 0.01 I. The paper's dropout is 0.1. Coordinates in front of each head, as the
    paper's models have them, are ``IntegralAttention(..., coordinates=p)``.
    """
    return IntegralAttention(d, heads, "galerkin", dropout)


@method("Cao 2021, Choose a Transformer: Fourier or Galerkin, arXiv:2105.14995")
def fourier_attention(d: int, heads: int = 4, dropout: float = 0.0) -> IntegralAttention:
    """(LN(Q) LN(K)ᵀ) V / (n √c), c = d / heads, no softmax, no matrix after the heads. x: [b, n, d].

    A kernel integral over the n tokens; the rest is as in ``galerkin_attention``. Dropout falls on the n × n scores.
    """
    return IntegralAttention(d, heads, "fourier", dropout)


@method("Meng et al. 2025, NaLaFormer: Norm-Aware Linear Attention for Transformer Models, arXiv:2506.21137")
def norm_aware_linear_attention(
    d: int, heads: int = 3, power: float = 3.0, base: float = 10000.0
) -> NormAwareAttention:
    """Turn(p) (Turn(r)ᵀ v) / (p · Σ r) with p = [(±q̂)₊^(power (½ + tanh‖q‖))], r = [(±k)₊^power]. x: [b, h, w, d].

    q̂ = q / ‖q‖, so a longer query attends more sharply; Turn is a rotary position by row and column, in the numerator
    alone. Then + a 5 × 5 convolution of v, layer norm, ⊙ SiLU(W x), and one more matrix. This is the authors' code; the
    paper has a cosine and a sine of the direction where the code splits signs.
    """
    return NormAwareAttention(d, heads, power, base)
