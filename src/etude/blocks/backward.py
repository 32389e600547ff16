"""Linear layers that keep less for the backward pass than it needs to be exact."""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method

Sketch = Literal["gaussian", "rademacher", "dct", "dft"]


def project(x: Tensor, k: int, sketch: Sketch, seed: int) -> Tensor:
    """P x with a random P: [k, n], E[Pᵀ P] = I, the same for the same seed. x: [n, d] → [k, d]."""
    n, random = len(x), torch.Generator(x.device).manual_seed(seed)
    if sketch == "gaussian":
        p = torch.randn(k, n, generator=random, device=x.device, dtype=x.dtype)
        return (p @ x).mul_(k**-0.5)
    if sketch == "rademacher":
        p = torch.randint(2, (k, n), generator=random, device=x.device).to(x.dtype).mul_(2).sub_(1)
        return (p @ x).mul_(k**-0.5)
    rows = torch.randint(n, (k,), generator=random, device=x.device)
    wide = x if x.dtype == torch.float64 else x.float()
    y = torch.fft.fft(wide, dim=0, norm="ortho") if sketch == "dft" else _dct(wide)
    y = y[rows].mul_(math.sqrt(n / k))
    return y if sketch == "dft" else y.to(x.dtype)


def _dct(x: Tensor) -> Tensor:
    """The orthonormal discrete cosine transform (II) along the first axis."""
    n = len(x)
    spectrum = torch.fft.fft(torch.cat([x[::2], x[1::2].flip(0)]), dim=0)
    angle = torch.arange(n, device=x.device, dtype=x.dtype)[:, None] * (-math.pi / (2 * n))
    y = (spectrum.real * angle.cos() - spectrum.imag * angle.sin()) * math.sqrt(2 / n)
    return torch.cat([y[:1] * math.sqrt(0.5), y[1:]])


class Sketched(torch.autograd.Function):
    """x Wᵀ + b, for whose dW only P x and a seed are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, k: int, sketch: Sketch, seed: int) -> Tensor:
        ctx.save_for_backward(project(x.reshape(-1, x.shape[-1]), k, sketch, seed), w)
        ctx.how = k, sketch, seed
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        px, w = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        dx = g @ w.to(g.dtype) if ctx.needs_input_grad[0] else None
        pg = project(rows, *ctx.how)
        dw = (pg.mH @ px.to(pg.dtype)).real.to(w.dtype) if pg.is_complex() else (pg.mT @ px.to(pg.dtype)).to(w.dtype)
        db = rows.sum(0).to(w.dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None, None


class RandomizedLinear(nn.Linear):
    """nn.Linear whose weight gradient in training is a sketch of it."""

    def __init__(self, d: int, out: int, bias: bool, ratio: float, sketch: Sketch):
        super().__init__(d, out, bias)
        if not 0 < ratio <= 1:
            raise ValueError(f"randomized_linear keeps a share of the rows, so ratio={ratio} must be in (0, 1]")
        if sketch not in get_args(Sketch):
            raise ValueError(f"randomized_linear: sketch={sketch!r} is none of {', '.join(get_args(Sketch))}")
        self.ratio, self.sketch = ratio, sketch

    def forward(self, x: Tensor) -> Tensor:
        n = x.numel() // self.in_features
        if not (n and self.training and self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        seed = int(torch.randint(2**62, ()))  # on the CPU, so that nothing waits for a GPU
        k = max(1, int(self.ratio * n))
        y = Sketched.apply(x, self.weight, self.bias, k, self.sketch, seed)  # type: ignore[no-untyped-call]
        return cast(Tensor, y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio}, sketch={self.sketch!r}"


@method(
    "Bershatsky et al. 2022, Memory-Efficient Backpropagation through Large Linear Layers, arXiv:2201.13195",
    note="the authors fine-tune with ratios of 0.5, 0.2 and 0.1",
)
def randomized_linear(
    d: int, out: int | None = None, bias: bool = True, ratio: float = 0.5, sketch: Sketch = "gaussian"
) -> RandomizedLinear:
    """x Wᵀ + b, exact, but for dW = (P dY)ᵀ (P X) with a random P: [ratio · n, n], E[Pᵀ P] = I, drawn at each use.

    For memory: of the n rows of X only P X is kept. dX and db are exact, and dW is right on average. ``dct``, ``dft``:
    k sampled rows of the transform, scaled by n / k as they must be (the authors' code has n · k). In eval mode, and
    where nothing is to be learned, an ordinary linear layer. [..., d] → [..., out].
    """
    return RandomizedLinear(d, out or d, bias, ratio, sketch)
