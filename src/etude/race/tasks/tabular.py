"""Small tables (scikit-learn), by a residual MLP."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from etude.race.data import Data
from etude.race.models import residual_mlp
from etude.race.task import Task

Pairs = tuple[tuple[Tensor, Tensor], ...]


def task(seed: int) -> Task:
    """Breast cancer, 569 × 30: benign or malignant, judged by cross-entropy."""
    return _classify(seed, "breast_cancer", 2)


def wine(seed: int) -> Task:
    """Wines, 178 × 13: which of three growers, judged by cross-entropy."""
    return _classify(seed, "wine", 3)


def diabetes(seed: int) -> Task:
    """Diabetes, 442 × 10: its progress within a year, judged by the squared error in variances of the target."""
    train, valid, test = _table("diabetes", regression=True)
    torch.manual_seed(seed)
    model = residual_mlp(10, 1, dropout=0.1)
    return Task(model, train, valid, nn.functional.mse_loss, steps=300, test=test, name="squared error")


def _classify(seed: int, name: str, classes: int) -> Task:
    train, valid, test = _table(name)
    torch.manual_seed(seed)
    model = residual_mlp(train[0].shape[1], classes, dropout=0.1)
    return Task(model, train, valid, nn.functional.cross_entropy, steps=300, test=test)


@functools.cache
def _table(name: str, regression: bool = False) -> Pairs:
    from sklearn import datasets

    inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    y = torch.as_tensor(targets)
    y, classes = (y.float()[:, None], ()) if regression else (y.long(), tuple(map(str, sorted(set(y.tolist())))))
    return Data(torch.as_tensor(inputs).float(), y, classes).split()
