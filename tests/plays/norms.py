"""How a norm is played: two training steps and one in eval, with gradients, on small numbers so that eps matters."""

import copy
import inspect

import torch


def make(method, **knobs):
    required = {"d": 1056 if method.name == "group_norm" else 6}  # 1056 divides into 32 groups and into 33
    names = inspect.signature(method.fn).parameters
    return method.fn(**{k: v for k, v in required.items() if k in names} | knobs)


def play(value):
    norm = copy.deepcopy(value).double()
    d = norm.features
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(torch.rand(p.shape, generator=rng, dtype=torch.float64))
    seen = []
    for training in (True, True, False):
        x = 0.05 * torch.randn((3, d, 4) if norm.axis == 1 else (3, 4, d), generator=rng, dtype=torch.float64)
        x.requires_grad_()
        y = norm.train(training)(x + 0.02)
        grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [x, *norm.parameters()])
        seen += [y.detach(), *grads]
    return torch.cat([t.flatten() for t in seen])
