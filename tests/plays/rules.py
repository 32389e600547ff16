"""How a rule is played for the nets: fifteen steps of three matrices on gradients that depend on the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from etude import rules
from etude._method import Method


def make(method: Method, **knobs: Any) -> Any:
    if method.knobs.get("momentum") == 0.0:
        knobs.setdefault("momentum", 0.9)  # nesterov means nothing without it
    return method.fn(**knobs)


def matrices(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    seeded = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=seeded, dtype=dtype)) for s in ((4, 3), (4, 3), (3, 5))]


def play(value: Any, steps: int = 15, **options: Any) -> Tensor:
    ps = matrices()
    opt = rules.optimizer(ps, value, **options)
    seeded = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in ps:
            p.grad = 0.3 * p.detach() + torch.randn(p.shape, generator=seeded, dtype=p.dtype)
        opt.step()
    return torch.cat([p.detach().flatten() for p in ps])
