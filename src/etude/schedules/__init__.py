"""t → c: the multiplier of the learning rate at each step, as a value to join by ``>>`` and attach to an optimizer."""

from etude.schedules._schedule import Schedule as Schedule
from etude.schedules._schedule import attach as attach
from etude.schedules.decay import cosine_restarts as cosine_restarts
from etude.schedules.decay import linear_decay as linear_decay
from etude.schedules.warmup import warmup as warmup

__all__ = ["Schedule", "attach", "cosine_restarts", "linear_decay", "warmup"]
