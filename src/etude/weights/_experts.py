"""One map per expert of a stacked weight [e, out, in]: θ has the experts in front."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from etude.weights._map import Adapter, Map


class Experts(Map):
    """``one`` map, played on every expert with that expert's θ."""

    def __init__(self, one: Map) -> None:
        super().__init__()
        self._one = (one,)  # in a tuple, so that its own θ is not ours
        self._stamp = getattr(one, "_stamp", None)
        same = {key: getattr(one, key) for key in ("changes", "additive", "remade") if hasattr(one, key)}
        self.__dict__.update(same)

    def born(self, w: Tensor) -> None:
        self._stack(w, [{}] * len(w))

    def blank(self, w: Tensor, state: Mapping[str, Tensor]) -> None:
        self._stack(w, [{k: t[i] for k, t in state.items()} for i in range(len(w))])

    def _stack(self, w: Tensor, states: list[dict[str, Tensor]]) -> None:
        self._one[0].axis = self.axis
        ones = []
        for v, state in zip(w, states):
            one = copy.deepcopy(self._one[0])
            one.blank(v, state) if state else one.born(v)
            ones.append(one)
        for name, p in ones[0].named_parameters():
            every = torch.stack([one.get_parameter(name).detach() for one in ones])
            self.register_parameter(name, nn.Parameter(every, p.requires_grad))
        for name, _ in ones[0].named_buffers():
            self.register_buffer(name, torch.stack([one.get_buffer(name) for one in ones]))
        self._one = (ones[0].to("meta"),)

    def forward(self, *args: Tensor) -> Tensor:
        one, theta = self._one[0].train(self.training), self._theta()

        def play(theta: dict[str, Tensor], *args: Tensor) -> Tensor:
            with _reparametrize_module(one, theta):
                return one.forward(*args)  # type: ignore[no-any-return]

        w: Tensor = torch.func.vmap(play, randomness="different")(theta, *args)
        return w

    def right_inverse(self, w: Tensor) -> Tensor | tuple[Tensor, ...]:
        one, theta, found = self._one[0], self._theta(), []
        for i, v in enumerate(w):  # not a vmap, because a map may branch on what it finds
            with _reparametrize_module(one, {k: t[i] for k, t in theta.items()}):
                found.append(one.right_inverse(v))
        if isinstance(found[0], Tensor):
            return torch.stack(cast("list[Tensor]", found))
        return tuple(torch.stack(parts) for parts in zip(*found))

    def _theta(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


class ExpertAdapters(Experts, Adapter):
    """The same of an adapter."""

    def right_inverse(self, w: Tensor) -> Tensor:
        return Adapter.right_inverse(self, w)


def per_expert(pattern: Map) -> Map:
    """The pattern for a stack of matrices [e, out, in]."""
    one = copy.deepcopy(pattern)
    return ExpertAdapters(one) if isinstance(pattern, Adapter) else Experts(one)
