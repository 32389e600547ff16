"""Multilayer perceptrons: the plain one, and the residual one for tables."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

from torch import nn

from etude.blocks import Residual, pre_ln

MakeNorm = Callable[[int], nn.Module]
Place = Callable[..., Residual]
"""(d, f, …) → a norm, a function and the path around it put together: `blocks.pre_ln` and its like."""


def placed(place: Place, d: int, f: nn.Module, **known: Any) -> Residual:
    """``place(d, f)``, told what it asks for by name: what makes its ``norm``, its ``layer`` of how many ``layers``."""
    asked = inspect.signature(place).parameters
    return place(d, f, **{name: value for name, value in known.items() if name in asked})


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
        placed(
            place,
            width,
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)),
            norm=norm,
            layer=i + 1,
            layers=depth,
        )
        for i in range(depth)
    ]
    return nn.Sequential(nn.Linear(inputs, width), *blocks, norm(width), nn.ReLU(), nn.Linear(width, outputs))
