"""One residual block with named slots, and the parts that fill them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Slot = Callable[[Tensor], Tensor]


class Residual(nn.Module):
    """gate_sum(norm_sum(join(skip(x), gate_out(norm_out(f(scale_in · norm_in(x))))))). x: [..., d]; f keeps the shape.

    ``join`` is a module (x, y) → their sum, by default x + y; every other empty slot is the identity.
    """

    def __init__(
        self,
        f: nn.Module,
        norm_in: nn.Module | None = None,
        norm_out: nn.Module | None = None,
        norm_sum: nn.Module | None = None,
        *,
        scale_in: float = 1.0,
        gate_out: nn.Module | None = None,
        gate_sum: nn.Module | None = None,
        skip: nn.Module | None = None,
        join: nn.Module | None = None,
    ):
        super().__init__()
        self.f = f
        self.scale_in = scale_in
        self.norm_in: Slot = norm_in or _same  # a plain function: no line in repr, none in the state
        self.norm_out: Slot = norm_out or _same
        self.norm_sum: Slot = norm_sum or _same
        self.gate_out: Slot = gate_out or _same
        self.gate_sum: Slot = gate_sum or _same
        self.skip: Slot = skip or _same
        self.join: Callable[[Tensor, Tensor], Tensor] = join or torch.add

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Further arguments (a mask, a context) go to f."""
        h = self.norm_in(x)
        y = self.f(h if self.scale_in == 1.0 else self.scale_in * h, *args, **kwargs)
        if y.shape != x.shape:
            raise ValueError(f"a residual block adds f(x) to x, but f made {tuple(y.shape)} of {tuple(x.shape)}")
        y = self.gate_out(self.norm_out(y))
        return self.gate_sum(self.norm_sum(self.join(self.skip(x), y)))

    def extra_repr(self) -> str:
        return f"scale_in={self.scale_in:.4g}" if self.scale_in != 1.0 else ""


def _same(x: Tensor) -> Tensor:
    return x


class Gain(nn.Module):
    """x · weight, one learned number or one for each feature. x: [..., d]."""

    def __init__(self, start: float, d: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.full(() if d is None else (d,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.to(x.dtype)


class Damp(nn.Module):
    """x − SiLU(a) · stopgrad(x): scales x by 1 − SiLU(a), and the gradient that goes back to x by nothing."""

    def __init__(self, a: float = 0.0):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x: Tensor) -> Tensor:
        return x - F.silu(self.a).to(x.dtype) * x.detach()


class Weighted(nn.Module):
    """a x + b y, one of the two numbers being 1."""

    def __init__(self, a: float = 1.0, b: float = 1.0):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(y, x, alpha=self.a) if self.b == 1.0 else torch.add(x, y, alpha=self.b)

    def extra_repr(self) -> str:
        return f"a={self.a:.4g}" if self.b == 1.0 else f"b={self.b:.4g}"


class OrthogonalSum(nn.Module):
    """x + y − (⟨x, y⟩ / (‖x‖² + eps)) x, products over ``axis``, or over all axes but the first with axis=None."""

    def __init__(self, axis: int | None = -1, eps: float = 1e-6):
        super().__init__()
        self.axis, self.eps = axis, eps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        over = tuple(range(1, x.ndim)) if self.axis is None else (self.axis,)
        wide = torch.promote_types(x.dtype, torch.float32)
        u, v = x.to(wide), y.to(wide)
        share = (u * v).sum(over, keepdim=True) / (u.square().sum(over, keepdim=True) + self.eps)
        return x + (v - share * u).to(x.dtype)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, eps={self.eps}"


class ScaledParameter(nn.Module):
    """p · init / scale, p: [n] learned from ``scale``: it starts at init and its steps are init / scale times p's."""

    def __init__(self, n: int, init: float, scale: float):
        super().__init__()
        self.init, self.scale = init, scale
        self.p = nn.Parameter(torch.full((n,), scale))

    def forward(self) -> Tensor:
        return self.p * (self.init / self.scale)

    def extra_repr(self) -> str:
        return f"init={self.init:.4g}, scale={self.scale:.4g}"


class SphereStep(nn.Module):
    """N(N(x) + |a| · (N(y) − N(x))) with N(x) = x / ‖x‖ over the last axis; a: [d], learned from alpha."""

    def __init__(self, d: int, alpha: float):
        super().__init__()
        self.a = ScaledParameter(d, alpha, d**-0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.normalize(x, dim=-1)
        return F.normalize(h + self.a().abs().to(h.dtype) * (F.normalize(y, dim=-1) - h), dim=-1)


class Parallel(nn.Module):
    """attention(norm(x)) + mlp(norm(x)), each with a norm of its own or with none. x: [..., d]."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, norms: tuple[nn.Module, nn.Module] | None = None):
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.norm_attention: Slot
        self.norm_mlp: Slot
        self.norm_attention, self.norm_mlp = norms or (_same, _same)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Further arguments (a mask, a context) go to the attention."""
        y: Tensor = self.attention(self.norm_attention(x), *args, **kwargs)
        return y + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]
