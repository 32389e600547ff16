"""Schedules that begin small, so that the first steps at a large learning rate do not destroy the initialisation."""

from __future__ import annotations

from etude._method import method
from etude.schedules._schedule import Line, Schedule


@method(
    "Goyal et al. 2017, Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, arXiv:1706.02677",
    note="start = 1/k where the batch is k times that of lr/k; the paper's run goes from 0.1 to 3.2, k = 32",
)
def warmup(steps: int, start: float = 1 / 32) -> Schedule:
    """c = start + (1 − start) t / steps, then 1: a gradual warm-up by a constant increment each step."""
    return Line(steps, start, 1.0)
