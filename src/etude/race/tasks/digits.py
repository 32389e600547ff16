"""Handwritten digits, 8 × 8 pixels (scikit-learn), by three kinds of network."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from etude.race.models import ConvNet, ViT, mlp
from etude.race.task import Task


def task(seed: int) -> Task:
    """An MLP 64-64-64-10 with LayerNorm, judged by cross-entropy."""
    train, valid, test = _digits()
    torch.manual_seed(seed)
    return Task(mlp(64, 64, 64, 10), train, valid, nn.functional.cross_entropy, steps=600, test=test)


def conv(seed: int) -> Task:
    """A small residual convolutional network with BatchNorm."""
    train, valid, test = ((x.view(-1, 1, 8, 8), y) for x, y in _digits())
    torch.manual_seed(seed)
    return Task(ConvNet(1, 10), train, valid, nn.functional.cross_entropy, steps=400, test=test)


def vit(seed: int) -> Task:
    """A small vision transformer on patches of 2 × 2 pixels."""
    train, valid, test = ((x.view(-1, 1, 8, 8), y) for x, y in _digits())
    torch.manual_seed(seed)
    return Task(ViT(8, 2, 1, 10), train, valid, nn.functional.cross_entropy, steps=400, test=test)


@functools.cache
def _digits() -> tuple[tuple[Tensor, Tensor], ...]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    inputs, targets = load_digits(return_X_y=True)
    rest_x, test_x, rest_y, test_y = train_test_split(inputs, targets, test_size=360, stratify=targets, random_state=0)
    train_x, valid_x, train_y, valid_y = train_test_split(
        rest_x, rest_y, test_size=360, stratify=rest_y, random_state=0
    )
    pairs = ((train_x, train_y), (valid_x, valid_y), (test_x, test_y))
    return tuple((torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)) for x, y in pairs)
