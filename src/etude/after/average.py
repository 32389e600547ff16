"""Averages of the weights along training, kept in at least float32; the trained weights themselves are not touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etude._method import method
from etude.after._after import After, Bound


class Average(After):
    """a ← a + r(t) (w − a), from a = w when bound."""

    moves = False

    def rate(self, t: int) -> float:
        """How far the average goes towards the weights at step t."""
        raise NotImplementedError(f"{type(self).__name__} is not an average yet: write rate(t)")

    def begin(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            n: w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True)
            for n, w in model.named_parameters()
            if w.is_floating_point() or w.is_complex()
        }

    def step(self, weights: dict[str, nn.Parameter], kept: dict[str, Tensor], t: int) -> None:
        if rate := self.rate(t):
            for n, a in kept.items():
                a.lerp_(weights[n].to(a.dtype), rate)

    def bind(self, model: nn.Module) -> Averaged:
        return Averaged(self, model)


class Averaged(Bound):
    """An average at work on one model."""

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Inside ``with``, the model holds the averages; then its weights and buffers are what they were, bit for bit.

        Buffers are not averaged. Where a BatchNorm counts, let ``torch.optim.swa_utils.update_bn`` refresh it inside.
        """
        trained = {n: w.detach().clone() for n, w in _tensors(self.model).items()}
        try:
            _write(self.model, self.kept)
            yield self.model
        finally:
            _write(self.model, trained)


@dataclass(frozen=True, repr=False)
class Ema(Average):
    """Old weights are forgotten at a constant rate."""

    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"weight_average needs 0 ≤ decay < 1, got {self.decay}; at 1 the average would never move")

    def rate(self, t: int) -> float:
        return 1 - self.decay


@dataclass(frozen=True, repr=False)
class Swa(Average):
    """All weights taken count the same; until ``start`` the average is the weights."""

    start: int
    cycle: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.cycle < 1:
            raise ValueError(f"swa needs start ≥ 0 and cycle ≥ 1 steps, got {self.start} and {self.cycle}")

    def rate(self, t: int) -> float:
        cycles, rest = divmod(max(t - self.start, 0), self.cycle)
        return 0.0 if rest else 1 / (cycles + 1)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _write(model: nn.Module, values: dict[str, Tensor]) -> None:
    held = _tensors(model)
    for n, value in values.items():
        held[n].copy_(value)


@method(
    "Morales-Brotons et al. 2024, Exponential Moving Average of Weights in Deep Learning: Dynamics and Benefits, "
    "arXiv:2411.18704"
)
def weight_average(decay: float = 0.999) -> Average:
    """a ← decay · a + (1 − decay) · w after each step, from a = w when bound; it spans some 1 / (1 − decay) steps."""
    return Ema(decay)


@method("Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, arXiv:1803.05407")
def swa(start: int = 0, cycle: int = 1) -> Average:
    """a ← (n a + w) / (n + 1) every ``cycle`` steps after step ``start``, n weights being in it: their plain mean.

    Against overfitting: finds wider optima, which generalise better, at almost no cost, says the paper.
    """
    return Swa(start, cycle)
