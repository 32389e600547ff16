"""Copies the values of an initialisation into the weights of a model, chosen by role or by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from etude._method import stamp
from etude._roles import select


def apply(model: nn.Module, f: Callable[[Tensor], Tensor], where: str | Iterable[str] = "hidden") -> nn.Module:
    """w ← f(w) for every weight of ``model`` that ``where`` selects; returns the model.

    ``f`` gets a copy of the weight, so it may also write in place, as ``torch.nn.init.xavier_normal_`` does.
    ``where``: a role ("hidden", "conv", "head", …), a pattern of names ("*.attn.*"), or several of them. Only weights
    of two and more axes are written: biases and gains keep their values, even where the paper sets them to zero.
    Raises ValueError where nothing matches and where nothing changes.
    """
    if not isinstance(model, nn.Module) or not callable(f):
        raise TypeError(f"init.apply needs a model and a function, got {type(model).__name__} and {type(f).__name__}")
    made = stamp(f)
    name = str(made) if made else getattr(f, "__name__", repr(f))
    weights = {n: w for n, w in select(model, where).items() if w.ndim >= 2}
    if not weights:
        raise ValueError(f"init.apply: {where!r} selects only vectors and scalars; {name} writes weights of ≥ 2 axes")
    changed = False
    with torch.no_grad():
        for n, w in weights.items():
            v = f(w.clone())
            if not isinstance(v, Tensor):
                raise TypeError(f"init.apply: {name} must return the values of {n}, got {type(v).__name__}")
            v = v.to(w)
            if v.shape != w.shape:
                raise ValueError(f"init.apply: {name} gave {list(v.shape)} for {n} of shape {list(w.shape)}")
            changed = changed or not torch.equal(v, w)
            w.copy_(v)
    if not changed:
        raise ValueError(f"init.apply: {name} changes nothing; {', '.join(weights)} held these values already")
    return model
