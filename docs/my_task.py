"""A task of your own, raced by: etude race docs/my_task.py adamw "sgd(lr=0.1, momentum=0.9)"."""

import torch
from torch import nn

from etude.race import Task


def task(seed: int) -> Task:
    data = torch.Generator().manual_seed(0)  # the same data whatever the seed
    x = 4 * torch.rand(1500, 2, generator=data) - 2
    y = torch.sin(3 * x[:, :1]) * x[:, 1:] + 0.1 * torch.randn(1500, 1, generator=data)
    torch.manual_seed(seed)  # it is the weights that differ
    model = nn.Sequential(nn.Linear(2, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    train, valid, test = ((x[part], y[part]) for part in (slice(900), slice(900, 1200), slice(1200, 1500)))
    return Task(model, train, valid, nn.functional.mse_loss, steps=400, test=test, name="squared error")
