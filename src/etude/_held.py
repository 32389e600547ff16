"""Which of our optimizers are alive, so that no change of the model silently orphans what one of them trains."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_LIVE: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_ORPHANS: weakref.WeakKeyDictionary[torch.optim.Optimizer, dict[int, str]] = weakref.WeakKeyDictionary()
"""For each optimizer the parameters (by id) that were taken out of the model while it trains them, and by what."""


def register(optimizer: torch.optim.Optimizer) -> None:
    """Remember the optimizer for as long as somebody else does."""
    _LIVE.add(optimizer)


def refuse_if_held(gone: Iterable[Tensor], what: str, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raise if a live optimizer other than ``optimizer`` trains a parameter that ``what`` would take out or freeze."""
    for _ in _holders(gone, optimizer):
        raise ValueError(
            f"{what} takes a parameter out of the model, or freezes it, that an optimizer already trains: "
            "do it before you make the optimizer, or pass optimizer=…"
        )


def orphan(gone: Iterable[Tensor], what: str, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Note what leaves the model: an optimizer other than ``optimizer`` that trains it will refuse its next step."""
    for live, ids in _holders(gone, optimizer):
        _ORPHANS.setdefault(live, {}).update(dict.fromkeys(ids, what))


def returned(back: Iterable[Tensor]) -> None:
    """Note that parameters are part of the model again."""
    ids = {id(p) for p in back}
    for orphans in _ORPHANS.values():
        for i in ids & orphans.keys():
            del orphans[i]


def refuse_orphans(optimizer: torch.optim.Optimizer) -> None:
    """Raise if the optimizer trains what is no longer part of the model."""
    if what := next(iter(_ORPHANS.get(optimizer, {}).values()), None):
        raise RuntimeError(
            f"{what} took a parameter out of the model that this optimizer trains: make the optimizer anew, "
            f"or give {what} optimizer=…"
        )


def _holders(
    gone: Iterable[Tensor], but: torch.optim.Optimizer | None
) -> Iterator[tuple[torch.optim.Optimizer, set[int]]]:
    ids = {id(p) for p in gone}
    for live in list(_LIVE):
        mine = ids & {id(p) for g in live.param_groups for p in g["params"]}
        if mine and live is not but:
            yield live, mine
