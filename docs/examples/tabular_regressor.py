"""A regressor for a table in a file: etude race docs/examples/tabular_regressor.py adamw lion lamb."""

from pathlib import Path

import torch
from torch import nn

from etude.race import Task, data

HERE = Path(__file__).parent


def task(seed: int) -> Task:
    train, valid, test = data.read(
        HERE / "diabetes.csv", target="progress"
    ).split()  # standardised by its training part
    torch.manual_seed(seed)
    width = train[0].shape[1]
    model = nn.Sequential(nn.Linear(width, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 1))
    return Task(model, train, valid, nn.functional.mse_loss, steps=200, test=test, name="squared error")
