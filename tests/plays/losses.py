"""Losses on fixed logits, with their gradient."""

import functools

import torch


def make(method, **knobs):
    return functools.partial(method.fn, **knobs)


def play(f):
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 4, generator=draw, dtype=torch.float64).requires_grad_()
    target = torch.randint(4, (6,), generator=draw)
    losses = f(logits, target)
    (grad,) = torch.autograd.grad((losses * torch.arange(1.0, 7.0)).sum(), logits)
    return torch.cat([losses.detach(), grad.flatten()])
