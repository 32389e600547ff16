"""What the additive adapters share: W + scale · B A on both routes, and the checks of their knobs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.weights._map import Adapter


class Factored(Adapter):
    """W + scale · B A, where a subclass makes A: [r, in] and B: [out, r] of its θ."""

    additive = True
    scale = 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, in the order in which x meets them."""
        raise NotImplementedError

    def forward(self, w: Tensor) -> Tensor:
        a, b = self.factors()
        return self.stored(torch.addmm(self.matrix(w), b, a, alpha=self.scale), w)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        a, b = self.factors()
        y, h = base(x), F.linear(x, a)
        rows = y.reshape(-1, y.shape[-1]), h.reshape(-1, len(a))
        return torch.addmm(*rows, b.mT, alpha=self.scale).view_as(y)  # one pass over y, not three


def check_rank(method: str, **knobs: int) -> None:
    """Whole numbers of at least 1, or one line that says which is not."""
    for name, value in knobs.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{method}: {name}={value!r} must be at least 1, and a whole number")


def check_finite(method: str, **knobs: float) -> None:
    """Finite numbers, or one line that says which is not."""
    for name, value in knobs.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{method}: {name}={value!r} must be a finite number")


def uniform(w: Tensor, *shape: int) -> Tensor:
    """As nn.Linear starts: uniform within ±1/√fan_in, of w's dtype and device."""
    return nn.init.kaiming_uniform_(w.new_empty(shape), a=math.sqrt(5))


def singular(w: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triples of w: [out, in] in its dtype: U: [out, r], S: [r], V: [r, in]."""
    u, s, v = torch.linalg.svd(w if w.dtype == torch.float64 else w.float(), full_matrices=False)
    u, s, v = u[:, :r].to(w.dtype), s[:r].to(w.dtype), v[:r].to(w.dtype)
    return u.contiguous(), s.clone(), v.contiguous()
