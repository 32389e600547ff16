"""Multilayer perceptrons: the plain one, and the residual one for tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import nn

from etude.blocks import Residual, pre_ln

MakeNorm = Callable[[int], nn.Module]
Place = Callable[[int, nn.Module, MakeNorm], Residual]
"""How a norm, a function and the path around it are put together: `blocks.pre_ln` and its like."""


def mlp(*widths: int, norm: MakeNorm = nn.LayerNorm, act: Callable[[], nn.Module] = nn.GELU) -> nn.Sequential:
    """Linear → norm → activation for each width but the last: ``mlp(64, 64, 64, 10)``. x: [..., widths[0]]."""
    if len(widths) < 2:
        raise ValueError(f"an MLP has at least its input's and its output's width; got {widths}")
    hidden = [m for a, b in itertools.pairwise(widths[:-1]) for m in (nn.Linear(a, b), norm(b), act())]
    return nn.Sequential(*hidden, nn.Linear(widths[-2], widths[-1]))


def residual_mlp(
    inputs: int,
    outputs: int,
    width: int = 64,
    depth: int = 2,
    dropout: float = 0.0,
    norm: MakeNorm = nn.LayerNorm,
    place: Place = pre_ln,
) -> nn.Sequential:
    """The residual network for tables (Gorishniy et al. 2021): ``depth`` × (two linear layers, ReLU, dropout), placed.

    x: [n, inputs], standardised columns; the result: [n, outputs].
    """
    blocks = [
        place(
            width,
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)),
            norm,
        )
        for _ in range(depth)
    ]
    return nn.Sequential(nn.Linear(inputs, width), *blocks, norm(width), nn.ReLU(), nn.Linear(width, outputs))
