"""A network from coordinates to values, with sines for activations (Sitzmann et al. 2020, arXiv:2006.09661)."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn


class Sine(nn.Module):
    """sin(omega x)."""

    def __init__(self, omega: float):
        super().__init__()
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * x)

    def extra_repr(self) -> str:
        return f"omega={self.omega:g}"


def siren(inputs: int, outputs: int, width: int = 64, depth: int = 3, omega: float = 30.0) -> nn.Sequential:
    """Linear → sin(omega ·) for each of ``depth`` layers, then a linear head. x: [n, inputs], in [-1, 1].

    Weights as in the paper: uniform within 1 / inputs in the first layer, within √(6 / width) / omega in the others.
    """
    widths = [inputs, *[width] * depth]
    hidden = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), Sine(omega))]
    model = nn.Sequential(*hidden, nn.Linear(width, outputs))
    for i, layer in enumerate(m for m in model if isinstance(m, nn.Linear)):
        bound = math.sqrt(6 / layer.in_features) / omega if i else 1 / inputs
        nn.init.uniform_(layer.weight, -bound, bound)
    return model
