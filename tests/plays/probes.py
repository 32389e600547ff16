"""How the probes are made and played: what they read on a small net that is pushed about."""

import torch
from plays.after import PUSHES, net, push


def make(method, **knobs):
    return method.fn(**knobs)


def play(probe):
    model = net()
    bound = probe.bind(model)
    numbers = list(bound().values())
    for t in range(PUSHES):
        push(model, t)
        numbers += bound().values()
    return torch.tensor(numbers, dtype=torch.float64)
