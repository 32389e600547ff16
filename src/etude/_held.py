"""Which of our optimizers are alive, so that no change of the model orphans a parameter that one of them trains."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

_LIVE: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def register(optimizer: torch.optim.Optimizer) -> None:
    """Remember the optimizer for as long as somebody else does."""
    _LIVE.add(optimizer)


def refuse_if_held(gone: Iterable[Tensor], what: str, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raise if a live optimizer other than ``optimizer`` trains a parameter that ``what`` takes out of the model."""
    ids = {id(p) for p in gone}
    for live in _LIVE:
        if live is not optimizer and any(id(p) in ids for g in live.param_groups for p in g["params"]):
            raise ValueError(
                f"{what} takes a parameter out of the model that an optimizer already trains: "
                "do it before you make the optimizer, or pass optimizer=…"
            )
