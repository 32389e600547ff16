"""A map played on one layer of fixed weights: the weight, the output, and the gradient of the input."""

import torch
from torch import nn

from etude import weights


def make(method, **knobs):
    return method.fn(**knobs)


def play(map):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(6, 5, dtype=torch.float64)
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        weights.put(layer, map, on="weight")
        for p in layer.parametrizations.weight[0].parameters():
            nn.init.normal_(p)
    y = layer(x)  # in training mode, so that a map that moves with use has moved
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    return torch.cat([layer.weight.detach().flatten(), y.detach().flatten(), dx.flatten()])
