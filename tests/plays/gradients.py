"""Ways to a gradient on one batch of a small network: the loss and the gradients."""

import torch
from torch import nn


def make(method, **knobs):
    return method.fn(**knobs)


def play(gradient):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 2)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(2, (7,))
    loss, grads = gradient(lambda: nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([loss[None], *(g.flatten() for g in grads)])
