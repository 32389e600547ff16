"""Penalties on the weights of a small network: value and gradients."""

import functools

import torch
from torch import nn


def make(method, **knobs):
    return functools.partial(method.fn, **knobs)


def play(f):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(6, 4)).double()
    value = f(model)
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return torch.cat([value.detach()[None], *(g.flatten() for g in grads if g is not None)])
