"""What the norms that remember share: a backward by rule, recurrences along a batch, means over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Pull = Callable[[Tensor, Tensor, Tensor], Tensor]


class Ruled(torch.autograd.Function):
    """z = (x − center) · inverse, whose gradient is what ``pull`` makes of (g, z, inverse)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, center: Tensor | None, inverse: Tensor, pull: Pull) -> Tensor:
        z = x * inverse if center is None else (x - center).mul_(inverse)
        ctx.save_for_backward(z, inverse)
        ctx.pull = pull
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.pull(g, *ctx.saved_tensors), None, None, None


def recur(a: Tensor | float, b: Tensor, start: Tensor) -> Tensor:
    """s_t = a_t s_{t−1} + b_t for all t in log₂ t passes, each doubling the span of a step. b: [t, d] → [t + 1, d]."""
    start = start.to(b.dtype)
    a, n = torch.as_tensor(a, dtype=b.dtype, device=b.device).expand_as(b), 1
    while n < len(b):
        b = torch.cat([b[:n], torch.addcmul(b[n:], a[n:], b[:-n])])
        a = torch.cat([a[:n], a[n:] * a[:-n]])
        n *= 2
    return torch.cat([start[None], torch.addcmul(b, a, start)])


def token_mean(t: Tensor) -> Tensor:
    return t.flatten(0, -2).mean(0)


def geometric(t: Tensor) -> Tensor:
    return t.log().mean(0).exp()


def mean_square(v: Tensor, padding: Tensor | None) -> Tensor:
    """Mean x² of each channel over batch and tokens that are no padding, [d]."""
    if padding is None:
        return token_mean(v.square())
    kept = ~padding
    return torch.where(kept[..., None], v.square(), 0.0).flatten(0, -2).sum(0) / kept.sum().clamp(min=1)
