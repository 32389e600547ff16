"""Activations that are learned series: polynomials, cosines, and maxima of lines. One set of coefficients per layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from etude._method import method


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(name: str, degree: int) -> None:
    if degree < 1:
        raise ValueError(f"{name} needs a degree of at least 1, got {degree}")


class Hermite(nn.Module):
    """Σₖ a[k] Heₖ(x) / k!; a: [n + 1]."""

    def __init__(self, degree: int):
        super().__init__()
        _check("hermite", degree)
        self.a = nn.Parameter(torch.full((degree + 1,), math.exp(-0.5)))
        with torch.no_grad():
            self.a[0] *= math.sqrt(1 - 1 / math.factorial(degree))

    def forward(self, x: Tensor) -> Tensor:
        v = _wide(x)
        a = self.a.to(v.dtype)
        now = later = torch.zeros_like(a[0])
        for k in reversed(range(len(a))):  # Clenshaw's sum for Heₖ₊₁ = x Heₖ − k Heₖ₋₁
            now, later = a[k] / math.factorial(k) + v * now - (k + 1) * later, now
        return now.to(x.dtype)


class Fourier(nn.Module):
    """a₀ + Σₖ a[k] cos(w[k] x − phi[k]) / k!, k from 1; a, w and phi: [n]."""

    def __init__(self, degree: int):
        super().__init__()
        _check("fourier", degree)
        scale = float(torch.special.i0(torch.tensor(2.0, dtype=torch.float64))) ** -0.5
        self.a0 = nn.Parameter(torch.tensor(scale * math.sqrt(1 - 1 / math.factorial(degree) ** 2)))
        self.a = nn.Parameter(torch.full((degree,), scale))
        self.w = nn.Parameter(torch.arange(1.0, degree + 1))
        self.phi = nn.Parameter(torch.full((degree,), math.pi / 4))

    def forward(self, x: Tensor) -> Tensor:
        v = _wide(x)
        a, w, phi = (p.to(v.dtype) for p in (self.a, self.w, self.phi))
        y = self.a0.to(v.dtype)
        for k in range(len(a)):
            y = y + a[k] / math.factorial(k + 1) * torch.cos(w[k] * v - phi[k])
        return y.to(x.dtype)


class Tropical(nn.Module):
    """(√2 / n) maxₖ (k x + a[k]), k = 0 … n; a: [n + 1]."""

    def __init__(self, degree: int):
        super().__init__()
        _check("tropical", degree)
        self.a = nn.Parameter(torch.ones(degree + 1))

    def forward(self, x: Tensor) -> Tensor:
        k = torch.arange(len(self.a), dtype=x.dtype, device=x.device)
        return _highest(x, k, self.a) * (math.sqrt(2) / (len(k) - 1))


class TropicalRational(nn.Module):
    """maxₖ (s[0, k] x + a[0, k]) − maxₖ (s[1, k] x + a[1, k]); slopes s and heights a: [2, n + 1]."""

    _role = "vector"

    def __init__(self, degree: int):
        super().__init__()
        _check("tropical_rational", degree)
        self.slopes = nn.Parameter(torch.randn(2, degree + 1))
        self.a = nn.Parameter(torch.randn(2, degree + 1))

    def forward(self, x: Tensor) -> Tensor:
        return _highest(x, self.slopes[0], self.a[0]) - _highest(x, self.slopes[1], self.a[1])


def _highest(x: Tensor, slopes: Tensor, a: Tensor) -> Tensor:
    return torch.addcmul(a.to(x.dtype), x[..., None], slopes.to(x.dtype)).amax(-1)


@method("Khalfaoui-Hassani & Kesselheim 2025, Polynomial, trigonometric, and tropical activations, arXiv:2502.01247")
def hermite(degree: int) -> Hermite:
    """Σₖ aₖ Heₖ(x) / k! up to k = degree, Heₖ the Hermite polynomials of probability. x: [...].

    aₖ starts at e^(−½), a₀ at e^(−½) √(1 − 1/degree!): for x ~ N(0, 1) then E F² = E F′² = e⁻¹ Σ_{j<degree} 1/j! → 1.
    Without a clamp, so that values grow with the degree for |x| ≫ 1.
    """
    return Hermite(degree)


@method("Khalfaoui-Hassani & Kesselheim 2025, Polynomial, trigonometric, and tropical activations, arXiv:2502.01247")
def fourier(degree: int) -> Fourier:
    """a₀ + Σₖ aₖ cos(wₖ x − φₖ) / k! up to k = degree, all four learned. x: [...].

    Starts at wₖ = k, φₖ = π/4, aₖ = I₀(2)^(−½), a₀ = I₀(2)^(−½) √(1 − 1/degree!²): for x ~ N(0, 1) then E F² ≈ 1.31 and
    E F′² ≈ 0.96 from degree 4 on, so that the variance is kept backward and not quite forward.
    """
    return Fourier(degree)


@method("Khalfaoui-Hassani & Kesselheim 2025, Polynomial, trigonometric, and tropical activations, arXiv:2502.01247")
def tropical(degree: int) -> Tropical:
    """(√2 / degree) maxₖ (k x + aₖ), k = 0 … degree, a from 1: convex, piecewise linear, E F′² = 1 at birth. x: [...].

    Where lines meet, the gradient is shared between them.
    """
    return Tropical(degree)


@method("Khalfaoui-Hassani & Kesselheim 2025, Polynomial, trigonometric, and tropical activations, arXiv:2502.01247")
def tropical_rational(degree: int) -> TropicalRational:
    """maxₖ (sₖ x + aₖ) − maxₖ (s′ₖ x + a′ₖ), k = 0 … degree: any piecewise linear function. x: [...].

    Slopes and heights are learned and born N(0, 1).
    """
    return TropicalRational(degree)
