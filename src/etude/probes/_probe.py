"""What every probe of weights is: bound to a model, it returns one number per weight whenever it is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from etude._method import stamp


class Probe:
    """step → number for each kernel, a weight of two and more axes."""

    def keep(self, w: Tensor) -> Tensor:
        """What is remembered of a weight, at least in float32, when bound."""
        raise NotImplementedError(f"{type(self).__name__} is not a probe yet: write keep and read")

    def read(self, w: Tensor, kept: Tensor) -> Tensor:
        """The number of a weight (a scalar); may update what is kept, in place."""
        raise NotImplementedError(f"{type(self).__name__} is not a probe yet: write keep and read")

    def bind(self, model: nn.Module) -> Bound:
        """The probe at work on this model, from the weights it has now."""
        return Bound(self, model)

    def __repr__(self) -> str:
        return str(stamp(self) or object.__repr__(self))


class Bound:
    """A probe at work on one model: call it after a step, and it returns a number per weight by name."""

    def __init__(self, probe: Probe, model: nn.Module) -> None:
        self.probe, self.model = probe, model
        self.kept = {n: probe.keep(w) for n, w in self._kernels()}
        self._shapes = {n: w.shape for n, w in self._kernels()}
        if not self.kept:
            raise ValueError(f"{probe} found nothing to read: {type(model).__name__} has no weight of two or more axes")

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        kernels = self._kernels()
        if {n: w.shape for n, w in kernels} != self._shapes:
            raise ValueError(f"the weights changed since {self.probe} was bound to the model; bind it again")
        numbers = [self.probe.read(w, self.kept[n]) for n, w in kernels]
        return dict(zip(self.kept, torch.stack([x.float() for x in numbers]).tolist()))  # the one wait for the device

    def state_dict(self) -> dict[str, Any]:
        """What is kept, in plain tensors."""
        return dict(self.kept)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if odd := state.keys() ^ self.kept.keys():
            raise ValueError(f"this state belongs to another model: {', '.join(sorted(odd))} stand on one side only")
        for name, kept in self.kept.items():
            kept.copy_(state[name])

    def __repr__(self) -> str:
        return f"{self.probe} on {type(self.model).__name__}"

    def _kernels(self) -> list[tuple[str, Tensor]]:
        return [(n, _wide(w.detach())) for n, w in self.model.named_parameters() if w.ndim >= 2]


def _wide(w: Tensor) -> Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))
