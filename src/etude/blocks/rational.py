"""Rational activations, one function per group of channels, and the linear layer born to keep their variance."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from etude._method import method

Start = Literal["identity", "gelu", "swish"]

# a₀ … a₅ and b₁ … b₄, least squares on [−3, 3] with every b ≥ 0 (largest errors 2e-3 and 1e-6).
_STARTS: dict[Start, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "identity": ((0.0, 1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
    "gelu": ((-1.16387887e-3, 0.5, 0.407528404, 0.105777754, 8.28251054e-3, 0.0), (0.0, 0.211555507, 0.0, 0.0)),
    "swish": (
        (3.26276047e-7, 0.5, 0.249997361, 5.32651309e-2, 5.80254443e-3, 2.7513388e-4),
        (0.0, 0.106530262, 0.0, 5.50267763e-4),
    ),
}


class GroupRational(nn.Module):
    """P(x) / (1 + |Q(x)|) with one numerator [6] for the layer and a denominator per group [groups, 4]."""

    _role = "vector"

    def __init__(self, d: int, groups: int, start: Start):
        super().__init__()
        if groups < 1 or d % groups:
            raise ValueError(f"group_rational: {d} channels do not divide into {groups} groups")
        if start not in _STARTS:
            raise ValueError(f"group_rational: start={start!r} is none of {', '.join(map(repr, _STARTS))}")
        numerator, denominator = _STARTS[start]
        self.groups = groups
        self.numerator = nn.Parameter(torch.tensor(numerator))
        self.denominator = nn.Parameter(torch.tensor(denominator).repeat(groups, 1))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        v = wide.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        a, b = self.numerator.to(v.dtype), self.denominator.to(v.dtype)
        p, q = a[5], b[:, 3:]
        for k in (4, 3, 2, 1, 0):
            p = torch.addcmul(a[k], p, v)
        for k in (2, 1, 0):
            q = torch.addcmul(b[:, k, None], q, v)
        q = q * v
        # |q| by hand: at q = 0, where identity starts, torch's has no gradient and the denominator would never move.
        return (p / (1 + torch.where(q < 0, -q, q))).flatten(-2).to(x.dtype)

    def second_moment(self) -> float:
        """E F(x)² for x ~ N(0, 1), the mean over the groups, by quadrature."""
        x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        with torch.no_grad():
            y = self(x[:, None].expand(-1, self.groups)).square().mean(-1)
        return float(torch.trapezoid(y * density, x))

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


@method("Yang & Wang 2024, Kolmogorov-Arnold Transformer, arXiv:2409.10594")
def group_rational(d: int, groups: int = 8, start: Start = "swish") -> GroupRational:
    """(a₀ + a₁x + … + a₅x⁵) / (1 + |b₁x + … + b₄x⁴|), a shared by all channels, b by each group of them. x: [..., d].

    As the paper writes it; the authors' kernels compute 1 + Σ |bⱼ| |x|ʲ, and at each start given here both are one.
    ``start``: which function the coefficients are fitted to, on [−3, 3].
    """
    return GroupRational(d, groups, start)


@method("Yang & Wang 2024, Kolmogorov-Arnold Transformer, arXiv:2409.10594")
def gr_kan(d: int, out: int | None = None, groups: int = 8, start: Start = "swish") -> nn.Sequential:
    """W F(x) + b with F = group_rational and W ~ N(0, 1 / (d E F(z)²)), z ~ N(0, 1). [..., d] → [..., out].

    The paper's transformer has, for its MLP, gr_kan(d, 4 d, start="identity") and then gr_kan(4 d, d); its code
    draws the weights anew after that (std 0.02), this does not. ``out`` is d unless given.
    """
    rational, linear = GroupRational(d, groups, start), nn.Linear(d, out or d)
    nn.init.normal_(linear.weight, std=(d * rational.second_moment()) ** -0.5)
    return nn.Sequential(rational, linear)
