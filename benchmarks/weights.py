"""LoRA on both routes, forward and backward, against the same Linear frozen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks._timing import medians
from etude import weights


def _play(layer: nn.Module, rows: int) -> Callable[[], None]:
    """Forward and backward as inside a network: the input wants its gradient too."""
    x = torch.randn(rows, 1024, requires_grad=True)
    g = torch.randn(rows, 1024)

    def play() -> None:
        x.grad = None
        for p in layer.parameters():
            p.grad = None
        layer(x).backward(g)

    return play


def _layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        name: nn.Linear(1024, 1024).requires_grad_(name == "trained")
        for name in ("frozen", "lora(r=16) by apply", "lora(r=16) by weight", "trained")
    }
    for route in ("apply", "weight"):
        weights.put(layers[f"lora(r=16) by {route}"], weights.lora(r=16), on="weight", route=route)
    return layers


def rows(rounds: int = 21) -> list[tuple[str, float, str]]:
    """(what, ratio, note): forward + backward of Linear(1024, 1024) over the frozen one; process time, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = []
        for n in (256, 2048):
            took = medians({name: _play(layer, n) for name, layer in _layers().items()}, rounds)
            found += [
                (f"Linear(1024) {n} rows: {name}", t / took["frozen"], f"{1e3 * t:.1f} ms") for name, t in took.items()
            ]
        return found
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for what, ratio, note in rows():
        print(f"{what:48s} {ratio:6.2f}  {note}")
