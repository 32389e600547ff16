"""Norms, forward and backward on one thread, over torch's LayerNorm; eager and compiled."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import nn

from benchmarks._timing import medians
from etude import norms

SHAPES = ((4096, 512), (1024, 4096))


def _keep_freed_memory() -> None:
    """Ask glibc not to hand big blocks back to the system: page faults would be most of what is measured."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for threshold in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        if mallopt is not None:
            mallopt(threshold, 2**31 - 1)


def _play(norm: nn.Module, n: int, d: int) -> Callable[[], None]:
    x, g = torch.randn(n, d, requires_grad=True), torch.randn(n, d)

    def play() -> None:
        x.grad = None
        for p in norm.parameters():
            p.grad = None
        norm(x).backward(g)

    return play


def _norms(d: int, compiled: bool) -> dict[str, nn.Module]:
    found = {"torch LayerNorm": nn.LayerNorm(d), "torch RMSNorm": nn.RMSNorm(d, eps=1e-5)}
    found |= {"rms_norm": norms.rms_norm(d), "dyt": norms.dyt(d), "layer_norm": norms.layer_norm(d)}
    if compiled:
        for name in list(found):
            found[f"{name}, compiled"] = torch.compile(found[name], fullgraph=True, dynamic=False)
    return found


def rows(rounds: int = 31, compiled: bool = True) -> list[tuple[str, float, str]]:
    """(what, ratio to torch LayerNorm in eager mode, milliseconds): medians of process time, the norms taking turns."""
    _keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = []
        for n, d in SHAPES:
            torch.compiler.reset()
            took = medians({name: _play(norm, n, d) for name, norm in _norms(d, compiled).items()}, rounds)
            first = took["torch LayerNorm"]
            found += [(f"{n}×{d} {name}", t / first, f"{1e3 * t:.2f} ms") for name, t in took.items()]
        return found
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for what, ratio, note in rows():
        print(f"{what:40s} {ratio:6.2f}  {note}")
