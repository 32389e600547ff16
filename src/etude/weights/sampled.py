"""Adapters that train a few numbers at places drawn once: entries of W, or of its spectrum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etude._method import method
from etude.weights._factored import check_finite, check_rank
from etude.weights._map import Adapter


class Sampled(Adapter):
    """W + what a subclass makes of θ: [n], placed at ``at``: n entries of a matrix [out, in], without repeats."""

    additive = True
    remade = ("at",)
    at: Tensor
    theta: nn.Parameter

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def _count(self, out: int, into: int) -> int:
        raise NotImplementedError

    def born(self, w: Tensor) -> None:
        m = self.matrix(w)
        n = min(self._count(*m.shape), m.numel())
        drawn = torch.randperm(m.numel(), generator=torch.Generator("cpu").manual_seed(self.seed), device="cpu")[:n]
        self.register_buffer("at", drawn.sort().values.to(w.device))
        self.theta = nn.Parameter(w.new_zeros(n))


class Shira(Sampled):
    def __init__(self, r: int, seed: int) -> None:
        super().__init__(seed)
        check_rank("shira", r=r)
        self.r = r

    def _count(self, out: int, into: int) -> int:
        return self.r * (out + into)

    def forward(self, w: Tensor) -> Tensor:
        m = self.matrix(w)
        return self.stored(m.flatten().index_add(0, self.at, self.theta).view_as(m), w)


class FourierFT(Sampled):
    def __init__(self, n_frequency: int, scaling: float, seed: int) -> None:
        super().__init__(seed)
        check_rank("fourierft", n_frequency=n_frequency)
        check_finite("fourierft", scaling=scaling)
        self.n, self.scaling = n_frequency, scaling

    def _count(self, out: int, into: int) -> int:
        return self.n

    def forward(self, w: Tensor) -> Tensor:
        m = self.matrix(w)
        theta = self.theta if m.dtype == torch.float64 else self.theta.float()  # there is no transform in bfloat16
        spectrum = theta.new_zeros(m.numel()).index_put((self.at,), theta).view(m.shape)
        return self.stored(m + self.scaling * torch.fft.ifft2(spectrum).real.to(m.dtype), w)


@method("Bhardwaj et al. 2024, Sparse High Rank Adapters, arXiv:2406.13175")
def shira(r: int = 32, seed: int = 0) -> Adapter:
    """W + θ at r (out + in) random entries, as many numbers as LoRA of rank r has, but of high rank; θ from zero.

    Files hold θ, since the seed gives the places.
    """
    return Shira(r, seed)


@method("Gao et al. 2024, Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv:2405.03003")
def fourierft(n_frequency: int = 1000, scaling: float = 150.0, seed: int = 777) -> Adapter:
    """W + scaling · Re IDFT₂(F), F zero but for ``n_frequency`` trained coefficients at random frequencies.

    They start at zero, so that nothing changes; the paper draws them from N(0, 1). Files hold the coefficients alone.
    """
    return FourierFT(n_frequency, scaling, seed)
