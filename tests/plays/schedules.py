"""How the schedules are made and played: their multipliers over forty steps, alone and after one another."""

import torch

REQUIRED = {"steps": 6}


def make(method, **knobs):
    return method.fn(**REQUIRED, **knobs)


def play(schedule):
    return torch.tensor([schedule(t) for t in range(40)], dtype=torch.float64)
