"""One optimizer step against torch's fused AdamW, in the two cases: many small tensors, and large ones."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytorch_optimizer as po
import torch
from torch import nn

from benchmarks._timing import medians
from etude import rules
from tests.peers import timm


def small() -> list[nn.Parameter]:
    """About 200 tensors and 2.6M numbers: a transformer of 16 layers, d = 128, without its embedding."""
    shapes = [
        (384, 128),
        (384,),
        (128, 128),
        (128,),
        (512, 128),
        (512,),
        (128, 512),
        (128,),
        (128,),
        (128,),
        (128,),
        (128,),
    ]
    return [nn.Parameter(torch.randn(s) * 0.02) for _ in range(13) for s in shapes] + [
        nn.Parameter(torch.randn(128)) for _ in range(44)
    ]


def large() -> list[nn.Parameter]:
    """50 tensors and 25.2M numbers: 48 of [512, 1024] and two vectors."""
    return [nn.Parameter(torch.randn(512, 1024) * 0.02) for _ in range(48)] + [
        nn.Parameter(torch.randn(512)) for _ in range(2)
    ]


def _matrices(ps: list[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in ps if p.ndim == 2]


def _step(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], case: Callable[[], list[nn.Parameter]]
) -> tuple[Callable[[], None], float]:
    torch.manual_seed(0)
    ps = case()
    for p in ps:
        p.grad = torch.randn_like(p) * 1e-2
    start = time.perf_counter()
    opt = make(ps)
    for _ in range(3):
        opt.step()
    return opt.step, time.perf_counter() - start


COORDINATE = {
    "torch AdamW fused": lambda ps: torch.optim.AdamW(ps, fused=True),
    "torch AdamW foreach": lambda ps: torch.optim.AdamW(ps, foreach=True),
    "timm Lion": lambda ps: timm("optim.lion").Lion(ps, 1e-4),
    "timm Lamb": lambda ps: timm("optim.lamb").Lamb(ps, 1e-3),
    "etude adamw eager": lambda ps: rules.optimizer(ps, rules.adamw()),
    "etude lion eager": lambda ps: rules.optimizer(ps, rules.lion()),
    "etude lamb eager": lambda ps: rules.optimizer(ps, rules.lamb()),
    "etude adamw compiled": lambda ps: rules.optimizer(ps, rules.adamw(), engine="compiled"),
    "etude adamw compiled, resident": lambda ps: rules.optimizer(ps, rules.adamw(), engine="compiled", resident=True),
    "etude lion compiled": lambda ps: rules.optimizer(ps, rules.lion(), engine="compiled"),
    "etude signum compiled": lambda ps: rules.optimizer(ps, rules.signum(), engine="compiled"),
    "etude sgd compiled": lambda ps: rules.optimizer(ps, rules.sgd(momentum=0.9), engine="compiled"),
    "etude lamb compiled": lambda ps: rules.optimizer(ps, rules.lamb(), engine="compiled"),
}

MATRIX = {
    "torch Muon": lambda ps: torch.optim.Muon(_matrices(ps), 1e-3),
    "pytorch_optimizer Muon": lambda ps: po.Muon([{"params": _matrices(ps), "use_muon": True}], lr=1e-3),
    "timm Muon": lambda ps: timm("optim.muon").Muon(_matrices(ps), 1e-3),
    "etude muon": lambda ps: rules.optimizer(_matrices(ps), rules.muon()),
}


def rows(rounds: int = 15) -> list[tuple[str, float, str]]:
    """(what, ratio, note): coordinate rules over torch fused AdamW, Muons over torch's; the build is three first steps."""
    found = []
    for label, case in (("200 small tensors", small), ("50 large tensors", large)):
        for variants, n in ((COORDINATE, rounds), (MATRIX, max(3, rounds // 5))):
            played = {name: _step(make, case) for name, make in variants.items()}
            took = medians({name: step for name, (step, _) in played.items()}, n, warm=1)
            base = took[next(iter(variants))]
            found += [
                (f"{label}: {name}", took[name] / base, f"build {build:.1f} s" if "compiled" in name else "")
                for name, (_, build) in played.items()
            ]
    return found


if __name__ == "__main__":
    for what, ratio, note in rows():
        print(f"{what:52s} {ratio:6.2f}  {note}")
