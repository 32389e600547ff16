"""Adapters that multiply W by a low-rank change of the identity, on the side of its outputs or of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.weights._factored import check_finite, check_rank, uniform
from etude.weights._map import Adapter

Mode = Literal["pre", "post"]


class Lorma(Adapter):
    """M W or W M with M of low rank, or of its inflation; A: [r, n], B: [n, r], n = out or in."""

    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, method: str, r: int, alpha: float, mode: Mode) -> None:
        super().__init__()
        check_rank(method, r=r)
        check_finite(method, alpha=alpha)
        if mode not in get_args(Mode):
            raise ValueError(f"{method}: mode={mode!r}: choose one of {', '.join(get_args(Mode))}")
        self.r, self.scale, self.pre = r, alpha / r, mode == "pre"

    def born(self, w: Tensor) -> None:
        n = self.matrix(w).shape[0 if self.pre else 1]
        self.A, self.B = nn.Parameter(uniform(w, self.r, n)), nn.Parameter(w.new_zeros(n, self.r))

    def forward(self, w: Tensor) -> Tensor:
        m = self.matrix(w)
        change = (self.B, self.A @ m) if self.pre else (m @ self.B, self.A)
        return self.stored(torch.addmm(m, *change, alpha=self.scale), w)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre:
            x = base(x)
        x = torch.add(x, F.linear(F.linear(x, self.A), self.B), alpha=self.scale)
        return x if self.pre else base(x)


class LormaPi(Lorma):
    """M = (alpha / r) shift(B A), where shift turns row i of a square matrix right by i: the identity at birth."""

    def born(self, w: Tensor) -> None:
        if self.scale <= 0:
            raise ValueError(f"lorma_pi: alpha={self.scale * self.r!r} must be positive")
        n = self.matrix(w).shape[0 if self.pre else 1]
        a, b = w.new_zeros(self.r, n), uniform(w, n, self.r)
        a[0, 0], b[:, 0] = 1, 1
        self.A, self.B = nn.Parameter(a / self.scale**0.5), nn.Parameter(b / self.scale**0.5)

    def _square(self) -> Tensor:
        i = torch.arange(len(self.B), device=self.B.device)
        return self.scale * (self.B @ self.A).gather(1, (i - i[:, None]) % len(i))

    def forward(self, w: Tensor) -> Tensor:
        m = self.matrix(w)
        return self.stored(self._square() @ m if self.pre else m @ self._square(), w)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return F.linear(base(x), self._square()) if self.pre else base(F.linear(x, self._square()))


@method("Bihany et al. 2025, LoRMA: Low-Rank Multiplicative Adaptation for LLMs, arXiv:2506.07621")
def lorma_plus(r: int = 8, alpha: float = 8.0, mode: Mode = "pre") -> Adapter:
    """(I + (alpha / r) B A) W, or W (I + (alpha / r) B A) in mode ``post``; A random, B zero: LoRA with A tied to W.

    The paper's form without the identity in front starts as a projection, which loses what W has learned; it is left
    out here.
    """
    return Lorma("lorma_plus", r, alpha, mode)


@method("Bihany et al. 2025, LoRMA: Low-Rank Multiplicative Adaptation for LLMs, arXiv:2506.07621")
def lorma_pi(r: int = 8, alpha: float = 8.0, mode: Mode = "pre") -> Adapter:
    """(alpha / r) shift(B A) W, or W times it in mode ``post``: shift turns row i right by i, which gives full rank.

    The first columns of B and Aᵀ start as ones and as the first unit vector, so that shift(B A) is the identity.
    """
    return LormaPi("lorma_pi", r, alpha, mode)
