"""Layers whose every edge carries a learned function of one variable, a spline."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._held import refuse_if_held
from etude._method import method


def basis(x: Tensor, knots: Tensor, k: int) -> Tensor:
    """The B-splines of order k at x: [..., d] on knots: [d, m]  →  [..., d, m − k − 1]."""
    x = x[..., None]
    b = ((x >= knots[:, :-1]) & (x < knots[:, 1:])).to(x.dtype)
    for p in range(1, k + 1):
        left, right = knots[:, : -p - 1], knots[:, p + 1 :]
        up, down = knots[:, p:-1] - left, right - knots[:, 1:-p]
        up, down = torch.where(up > 0, up, 1.0), torch.where(down > 0, down, 1.0)  # of a double knot, b is 0
        b = (x - left) / up * b[..., :-1] + (right - x) / down * b[..., 1:]
    return b


def fit(x: Tensor, y: Tensor, knots: Tensor, k: int) -> Tensor:
    """The coefficients [out, d, m − k − 1] whose splines come nearest y: [n, out, d] at x: [n, d], least squares."""
    b = basis(x.double(), knots.double(), k).transpose(0, 1)  # [d, n, coefficients]
    c: Tensor = torch.linalg.pinv(b) @ y.double().permute(2, 0, 1)
    return c.permute(2, 0, 1).to(y.dtype)


class Kan(nn.Module):
    """yⱼ = Σᵢ base[j, i] silu(xᵢ) + scale[j, i] Σₘ c[j, i, m] Bₘ(xᵢ); knots: [d, grid + 2k + 1]."""

    _role = "vector"
    knots: Tensor

    def __init__(self, d: int, out: int, grid: int, k: int, noise_scale: float, grid_range: tuple[float, float]):
        super().__init__()
        if grid < 1 or k < 1 or not grid_range[0] < grid_range[1]:
            raise ValueError(f"kan needs grid ≥ 1, k ≥ 1 and a range that rises; got {grid}, {k} and {grid_range}")
        self.grid, self.k = grid, k
        inner = torch.linspace(*grid_range, grid + 1).expand(d, -1)
        self.register_buffer("knots", self._extended(inner))
        noise = (torch.rand(grid + 1, out, d) - 0.5) * noise_scale / grid
        self.c = nn.Parameter(fit(inner.T, noise, self.knots, k))
        self.base = nn.Parameter(torch.empty(out, d).uniform_(-1, 1) / math.sqrt(d))
        self.scale = nn.Parameter(torch.full((out, d), 1 / math.sqrt(d)))

    def forward(self, x: Tensor) -> Tensor:
        b = basis(x, self.knots.to(x.dtype), self.k).flatten(-2)
        return F.linear(F.silu(x), self.base) + F.linear(b, (self.scale[..., None] * self.c).flatten(1))

    def edges(self, x: Tensor) -> Tensor:
        """The function of each edge at x: [..., d]  →  [..., out, d]; the layer sums over d."""
        return self.base * F.silu(x)[..., None, :] + self.scale * self._splines(x)

    def complexity(self, x: Tensor) -> Tensor:
        """Σ |φ|₁ + entropy of |φ|₁ over the edges, |φ|₁ the mean of |φ(x)| over x: [n, d]; the paper's penalty."""
        size = self.edges(x).abs().mean(0)
        share = size / size.sum().clamp(min=torch.finfo(size.dtype).tiny)
        entropy: Tensor = torch.special.entr(share).sum()
        return size.sum() + entropy

    @torch.no_grad()
    def regrid(self, x: Tensor, grid: int | None = None, eps: float = 0.02) -> None:
        """New knots from samples x: [n, d], and coefficients that keep the splines there, by least squares.

        Knots stand at eps · even spacing + (1 − eps) · quantiles of x. ``grid``: another number of intervals, which
        makes c a new parameter, so before the optimizer.
        """
        if x.ndim != 2 or len(x) < 2 or (x.amax(0) <= x.amin(0)).any():
            raise ValueError(f"kan.regrid needs samples [n, d] that differ in each feature, got {list(x.shape)}")
        grid = grid or self.grid
        y = self._splines(x)
        even = torch.linspace(0, 1, grid + 1, dtype=x.dtype, device=x.device)
        low, high = x.amin(0)[:, None], x.amax(0)[:, None]
        spread = torch.quantile(x, even, dim=0).T
        knots = self._extended(eps * (low + (high - low) * even) + (1 - eps) * spread)
        c = fit(x, y, knots, self.k).to(self.c.dtype)
        if grid != self.grid:
            refuse_if_held([self.c], "kan.regrid")
            self.c = nn.Parameter(c)
        else:
            self.c.copy_(c)
        self.grid, self.knots = grid, knots.to(self.knots.dtype)

    def _splines(self, x: Tensor) -> Tensor:
        return torch.einsum("...im,oim->...oi", basis(x, self.knots.to(x.dtype), self.k), self.c)

    def _extended(self, inner: Tensor) -> Tensor:
        """The knots [d, grid + 1] with k more on each side, one mean interval apart."""
        h = (inner[:, -1:] - inner[:, :1]) / (inner.shape[1] - 1)
        steps = torch.arange(1, self.k + 1, dtype=inner.dtype, device=inner.device)
        return torch.cat([inner[:, :1] - h * steps.flip(0), inner, inner[:, -1:] + h * steps], 1)

    def extra_repr(self) -> str:
        return f"{self.c.shape[1]}, {self.c.shape[0]}, grid={self.grid}, k={self.k}"


@method("Liu et al. 2024, KAN: Kolmogorov-Arnold Networks, arXiv:2404.19756")
def kan(
    d: int,
    out: int | None = None,
    grid: int = 5,
    k: int = 3,
    noise_scale: float = 0.5,
    grid_range: tuple[float, float] = (-1.0, 1.0),
) -> Kan:
    """yⱼ = Σᵢ φⱼᵢ(xᵢ), φ = w silu(x) + s Σₘ cₘ Bₘ(x), Bₘ B-splines of order k. [..., d] → [..., out].

    ``grid``: the intervals between knots. Born as in the authors' code, not the text: w ~ U(±1/√d), s = 1/√d, splines
    of noise ``noise_scale`` / grid wide. Beyond the range, and the k knots that follow it, only w silu(x) acts:
    ``regrid`` moves the knots to the data, or refines them. ``complexity`` is the paper's penalty. There are
    out · d · (grid + k + 2) parameters; ``out`` is d unless given.
    """
    return Kan(d, out or d, grid, k, noise_scale, grid_range)
