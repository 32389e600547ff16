"""What every value of the room is: bound to a model, it runs after each optimizer step and keeps tensors by name."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from etude._method import stamp


class After:
    """θ → θ. A method says what it keeps (``begin``) and what it does at step t from 1 (``step``); the rest is here."""

    moves: ClassVar[bool] = True
    """Whether it changes the weights; what only remembers them runs after all that do."""

    def begin(self, model: nn.Module) -> dict[str, Tensor]:
        """What is kept, read from the model when it is bound."""
        raise NotImplementedError(f"{type(self).__name__} is not a value of this room yet: write begin and step")

    def step(self, weights: dict[str, nn.Parameter], kept: dict[str, Tensor], t: int) -> None:
        """Changes the weights, or what is kept of them, in place."""
        raise NotImplementedError(f"{type(self).__name__} is not a value of this room yet: write begin and step")

    def bind(self, model: nn.Module) -> Bound:
        """The value at work on this model."""
        return Bound(self, model)

    def __repr__(self) -> str:
        return str(stamp(self) or object.__repr__(self))


class Bound:
    """A value at work on one model: call it after each optimizer step."""

    def __init__(self, value: After, model: nn.Module) -> None:
        self.value, self.model, self.t = value, model, 0
        self.kept = value.begin(model)
        self._shapes = {n: w.shape for n, w in model.named_parameters()}
        if not self.kept:
            raise ValueError(f"{value} found nothing to do: {type(model).__name__} has no weight that it concerns")
        self._hook: Any = None

    @torch.no_grad()
    def __call__(self) -> None:
        weights = dict(self.model.named_parameters())
        if {n: w.shape for n, w in weights.items()} != self._shapes:
            raise ValueError(f"the weights changed since {self.value} was bound to the model; bind it again")
        self.t += 1
        self.value.step(weights, self.kept, self.t)

    def state_dict(self) -> dict[str, Any]:
        """The step and what is kept, in plain tensors that ``torch.load(weights_only=True)`` reads."""
        return {"t": self.t, "kept": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if odd := state["kept"].keys() ^ self.kept.keys():
            raise ValueError(f"this state belongs to another model: {', '.join(sorted(odd))} stand on one side only")
        self.t = state["t"]
        for name, kept in self.kept.items():
            kept.copy_(state["kept"][name])

    def remove(self) -> None:
        """Takes it off the optimizer it was attached to."""
        if self._hook is None:
            raise ValueError(f"{self.value} is not attached to an optimizer")
        self._hook.remove()
        self._hook = None

    def __repr__(self) -> str:
        return f"{self.value} on {type(self.model).__name__}, after {self.t} steps"


def attach(opt: torch.optim.Optimizer, model: nn.Module, value: After) -> Bound:
    """Runs ``value`` on ``model`` after every step of ``opt``; returns it bound, with ``remove()``."""
    if not isinstance(opt, torch.optim.Optimizer) or not isinstance(model, nn.Module):
        raise TypeError(f"attach takes optimizer, model, value; got {type(opt).__name__}, {type(model).__name__} first")
    if not isinstance(value, After):
        raise TypeError(f"attach needs a value such as after.weight_average(), got {type(value).__name__}")
    trained = {id(p) for group in opt.param_groups for p in group["params"]}
    if trained.isdisjoint(map(id, model.parameters())):
        raise ValueError(f"the optimizer trains no parameter of this {type(model).__name__}; give the model it trains")
    bound = value.bind(model)
    bound._hook = opt.register_step_post_hook(lambda *_: bound())
    return bound
