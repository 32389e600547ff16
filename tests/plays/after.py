"""How the values of `after` are made and played: on a small net that is pushed about, weights and averages seen."""

import torch
from torch import nn

PUSHES = 7


def make(method, **knobs):
    return method.fn(**knobs)


def net(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(dtype)


@torch.no_grad()
def push(model, t):
    """A step that an optimizer might take: every entry moves, and differently at every step."""
    for i, w in enumerate(model.parameters()):
        w += 0.1 * torch.sin(torch.arange(w.numel(), dtype=torch.float64) * (t + 1) + i).view_as(w).to(w.dtype)


def play(value):
    model = net()
    bound = value.bind(model)
    seen = []
    for t in range(PUSHES):
        push(model, t)
        bound()
        seen += [w.detach().clone().flatten() for w in model.parameters()]
    seen += [k.flatten() for k in bound.kept.values()]
    return torch.cat(seen)
