"""Norms, forward and backward, over torch's LayerNorm: of torch, timm, etude and written naively; eager and compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks._timing import medians
from etude import norms
from tests.peers import timm

SHAPES = ((4096, 512), (1024, 4096))
COMPILED = ("torch LayerNorm", "torch RMSNorm", "naive RMSNorm", "naive DyT", "layer_norm", "rms_norm", "dyt", "derf")


class Naive(nn.Module):
    """A formula of x and three parameters, as a paper's few lines have it."""

    def __init__(self, d: int, formula: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.formula = formula
        self.alpha, self.weight, self.bias = (
            nn.Parameter(t) for t in (torch.tensor(0.5), torch.ones(d), torch.zeros(d))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.alpha, self.weight, self.bias)


def naive(d: int) -> dict[str, nn.Module]:
    """What one writes first."""
    return {
        "naive RMSNorm": Naive(d, lambda x, _, w, b: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w),
        "naive DyT": Naive(d, lambda x, a, w, b: w * torch.tanh(a * x) + b),
        "naive Derf": Naive(d, lambda x, a, w, b: w * torch.erf(a * x) + b),
    }


def keep_freed_memory() -> None:
    """Ask glibc not to hand big blocks back to the system: page faults would be most of what is measured."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for threshold in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        if mallopt is not None:
            mallopt(threshold, 2**31 - 1)


def step(norm: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    """One forward and backward pass, gradients of x and of all parameters."""
    x, g = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def play() -> None:
        x.grad = None
        for p in norm.parameters():
            p.grad = None
        norm(x).backward(g)

    return play


def _norms(d: int) -> dict[str, nn.Module]:
    found = {"torch LayerNorm": nn.LayerNorm(d), "torch RMSNorm": nn.RMSNorm(d, eps=1e-5), **naive(d)}
    found["timm RmsNorm"] = timm("layers.norm").RmsNorm(d)
    ours = (
        norms.layer_norm, norms.rms_norm, norms.dyt, norms.derf, norms.elementwise_layer_norm, norms.scale_norm,
        norms.partial_rms_norm, norms.seed_norm, norms.gated_norm, norms.power_norm, norms.unified_norm,
    )  # fmt: skip
    return found | {factory.__name__: factory(d) for factory in ours}


def rows(rounds: int = 31, compiled: bool = True) -> list[tuple[str, float, str]]:
    """(what, ratio to torch LayerNorm in eager mode, milliseconds): medians, the norms taking turns."""
    keep_freed_memory()
    found = []
    for shape in SHAPES:
        torch.compiler.reset()
        modules = _norms(shape[-1])
        for name in COMPILED if compiled else ():
            modules[f"{name}, compiled"] = torch.compile(modules[name], fullgraph=True, dynamic=False)
        took = medians({name: step(norm, shape) for name, norm in modules.items()}, rounds)
        first = took["torch LayerNorm"]
        found += [(f"{shape[0]}×{shape[1]} {name}", t / first, f"{1e3 * t:.2f} ms") for name, t in took.items()]
    return found


if __name__ == "__main__":
    for what, ratio, note in rows():
        print(f"{what:40s} {ratio:6.2f}  {note}")
