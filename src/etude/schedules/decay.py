"""Schedules that end small: the last iterate is then as good as an average."""

from __future__ import annotations

import math
from dataclasses import dataclass

from etude._method import method
from etude.schedules._schedule import Line, Schedule, check_multipliers, check_steps


@dataclass(frozen=True, repr=False)
class CosineRestarts(Schedule):
    """Half a cosine from 1 to ``end``, again and again, each ``t_mult`` times as long as the one before."""

    steps: int
    t_mult: int
    end: float
    length = math.inf

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_multipliers(end=self.end)
        if not isinstance(self.t_mult, int) or self.t_mult < 1:
            raise ValueError(f"cosine_restarts needs a whole t_mult ≥ 1, got {self.t_mult!r}")

    def __call__(self, t: float) -> float:
        span = self.steps
        if self.t_mult == 1:
            t %= span
        while t >= span:
            t, span = t - span, span * self.t_mult
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * t / span)) / 2


@method(
    "Defazio et al. 2023, When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement, arXiv:2310.07831"
)
def linear_decay(steps: int, end: float = 0.0) -> Schedule:
    """c = 1 − t / steps, the best worst-case schedule of the last iterate (with ``end``: 1 − (1 − end) t / steps)."""
    return Line(steps, 1.0, end)


@method("Loshchilov & Hutter 2016, SGDR: Stochastic Gradient Descent with Warm Restarts, arXiv:1608.03983")
def cosine_restarts(steps: int, t_mult: int = 1, end: float = 0.0) -> Schedule:
    """c = end + (1 − end) (1 + cos(π t/T)) / 2, back to 1 after T = steps, then T ← t_mult · T; it never ends."""
    return CosineRestarts(steps, t_mult, end)
