"""Changes of a model that are taken back unless it goes on to compute what it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from etude._held import refuse_if_held
from etude.norms._stream import at_rest, run
from etude.norms._swap import _leave_fast_paths


@dataclass
class Trial:
    """Changes of a model that can be taken back."""

    undo: list[tuple[Any, str, Any]] = field(default_factory=list)
    news: set[int] = field(default_factory=set)

    def set(self, on: Any, key: str, value: Any) -> None:
        self.undo.append((on, key, getattr(on, key)))
        setattr(on, key, value)

    def put(self, model: nn.Module, name: str, new: nn.Module) -> None:
        """In the place of a module, wherever the model has it."""
        old = model.get_submodule(name)
        for parent in [*model.modules()]:
            for key in [key for key, child in parent._modules.items() if child is old]:
                self.set(parent, key, new)
        self.news.add(id(new))


@contextmanager
def tried(model: nn.Module, inputs: Any) -> Iterator[Trial]:
    """What is done to the model inside is taken back unless it then makes of the inputs what it made before."""
    trial = Trial()
    before = _outputs(model, inputs)
    try:
        yield trial
        _leave_fast_paths(model, trial.news)
        try:
            after = _outputs(model, inputs)
        except Exception as error:  # somebody else's model, which may count on the width of its stream
            why = str(error).partition("\n")[0]
            raise ValueError(f"{type(model).__name__} does not run any more when it is converted: {why}") from None
        if not all(map(_close, before, after)):
            raise ValueError(f"{type(model).__name__} would compute something else when it is converted")
    except BaseException:
        for on, key, value in reversed(trial.undo):
            setattr(on, key, value)
        raise


def refuse_optimizers(model: nn.Module, what: str) -> None:
    """Raise if an optimizer of ours trains the model, whose weights are about to be others."""
    try:
        refuse_if_held(model.parameters(), what)
    except ValueError:
        raise ValueError(f"an optimizer already trains this {type(model).__name__}: {what} comes before it") from None


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with at_rest(model):
        return [t for t in tree_leaves(run(model, inputs)) if isinstance(t, Tensor) and t.is_floating_point()]


def _close(a: Tensor, b: Tensor) -> bool:
    near = {torch.float64: 1e-9, torch.float32: 1e-3}.get(a.dtype, 0.05)
    size = float(a.abs().max()) if a.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=near, atol=near * size)
