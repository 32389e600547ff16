"""What every schedule is: a function from the step to the learning rate's multiplier, with a length and a "then"."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from etude._method import stamp


class Schedule:
    """t → c, t counted in steps from 0; once finished it stays at its last value. ``a >> b``: b starts where a ends."""

    length: float
    """Steps until it is finished; ``inf`` if never."""

    def __call__(self, t: float) -> float:
        raise NotImplementedError(f"{type(self).__name__} is not a schedule yet: write __call__(t)")

    def __rshift__(self, then: Schedule) -> Schedule:
        if not isinstance(then, Schedule):
            return NotImplemented
        if self.length == float("inf"):
            raise ValueError(f"{self} never ends, so nothing can follow it; put it last")
        return Then(self, then)

    def __repr__(self) -> str:
        return str(stamp(self) or object.__repr__(self))


@dataclass(frozen=True, repr=False)
class Then(Schedule):
    """The second counts its steps from where the first ends."""

    first: Schedule
    second: Schedule

    @property
    def length(self) -> float:  # type: ignore[override]
        return self.first.length + self.second.length

    def __call__(self, t: float) -> float:
        return self.first(t) if t < self.first.length else self.second(t - self.first.length)

    def __repr__(self) -> str:
        return f"{self.first} >> {self.second}"


@dataclass(frozen=True, repr=False)
class Line(Schedule):
    """From ``start`` at step 0 by equal increments to ``end`` at step ``length``."""

    length: int
    start: float
    end: float

    def __post_init__(self) -> None:
        check_steps(self.length)
        check_multipliers(start=self.start, end=self.end)

    def __call__(self, t: float) -> float:
        return self.end if t >= self.length else self.start + (self.end - self.start) * t / self.length


def check_steps(steps: int) -> None:
    """A length is a whole number of steps, at least one."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"a schedule lasts a whole number of steps ≥ 1, got {steps!r}")


def check_multipliers(**values: float) -> None:
    """A multiplier is a finite number, not below 0: a negative learning rate would climb."""
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"a schedule's {name} is a multiplier of lr, so a finite number ≥ 0, got {value!r}")


def attach(opt: torch.optim.Optimizer, schedule: Callable[[int], float]) -> LRScheduler:
    """lr = c(t) · lr₀ in every group of ``opt`` from now on; call ``step()`` of what comes back after ``opt.step()``.

    Any function from the step to a multiplier will do. The torch scheduler that comes back saves the step, not the
    schedule: to resume, attach the same schedule and load.
    """
    if not isinstance(opt, torch.optim.Optimizer):
        raise TypeError(f"attach needs the optimizer first, then the schedule, got {type(opt).__name__} first")
    made = stamp(schedule)
    if made and made.room == "schedules" and not isinstance(schedule, Schedule):
        raise TypeError(f"attach got {made.name} itself; call it, e.g. schedules.{made.name}(100)")
    if not callable(schedule):
        raise TypeError(f"attach needs a schedule, e.g. schedules.warmup(100), got {type(schedule).__name__}")
    if not all("lr" in group for group in opt.param_groups):
        raise ValueError("a schedule moves lr, which this optimizer's groups lack; end its chain with rules.Scale(lr)")
    # A function, since torch copies the fields of any other callable into the state_dict
    return LambdaLR(opt, lambda t: schedule(t))
