"""Risks over three batches, one of which lacks a group: the risk, its gradient and the state."""

import torch

REQUIRED = {"group_counts": [40, 10, 3]}
GROUPS = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 0, 0, 1, 1, 0], [2, 2, 1, 0, 0, 0]])


def make(method, **knobs):
    needed = {k: v for k, v in REQUIRED.items() if k in method.fn.__annotations__ and k not in method.knobs}
    return method.fn(**needed, **knobs)


def play(risk):
    draw = torch.Generator().manual_seed(3)
    seen = []
    for group in GROUPS:
        losses = torch.rand(6, generator=draw, dtype=torch.float64).requires_grad_()
        loss = risk(losses, group)
        seen += [loss.detach()[None], torch.autograd.grad(loss, losses)[0]]
    return torch.cat([*seen, *(b.double().flatten() for b in risk.buffers())])
