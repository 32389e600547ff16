"""A task from parts: a model and a data file, with the loss that fits the target."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from etude.race._errors import InputError, one_line
from etude.race.data import Data, read
from etude.race.task import Factory, Task

STEPS = 600


def from_parts(name: str, model: Callable[..., Any], data: str, target: str) -> Factory:
    """The factory of a task that predicts the column ``target`` of the file ``data`` with ``model``.

    ``model`` makes an nn.Module: of nothing, or of the width of an input and of the output (the number of classes, or
    of numbers to regress). Classes are judged by cross-entropy, numbers, standardised, by the squared error.
    """

    def factory(seed: int) -> Task:
        train, valid, test = _split(data, target)
        held = read(data, target)
        torch.manual_seed(seed)
        made = _make(name, model, held)
        loss = nn.functional.cross_entropy if held.classes else nn.functional.mse_loss
        batch = min(32, len(train[1]))
        return Task(made, train, valid, loss, STEPS, batch, test, name="loss" if held.classes else "squared error")

    return factory


@functools.lru_cache(maxsize=2)
def _split(data: str, target: str) -> Any:
    return read(data, target).split()


def _make(name: str, model: Callable[..., Any], data: Data) -> nn.Module:
    wanted = [
        p.name
        for p in inspect.signature(model).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    several = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model).parameters.values())
    widths = (data.inputs.shape[1], len(data.classes) or data.targets.shape[1])
    if len(wanted) not in (0, 2):
        raise InputError(f"{name} needs {', '.join(wanted)}; a model is made of nothing, or of (inputs, outputs)")
    try:
        made = model(*widths) if wanted or several else model()
    except Exception as error:
        raise InputError(f"{name} is not made of {widths}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} makes a {type(made).__name__}; a model is a torch.nn.Module")
    return made
