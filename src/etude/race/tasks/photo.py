"""A photograph (scikit-learn's two) as a function of the place: the network is the image."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from etude.race._errors import InputError
from etude.race.models import siren
from etude.race.task import Task

_SIZE = (72, 108)
"""Rows and columns after the mean over squares of pixels."""


def task(seed: int) -> Task:
    """A temple in China by a network with sines, judged by PSNR (in dB) at pixels it was not trained on."""
    return _task("china.jpg", seed)


def flower(seed: int) -> Task:
    """A dahlia by a network with sines, judged by PSNR (in dB) at pixels it was not trained on."""
    return _task("flower.jpg", seed)


def _task(photo: str, seed: int) -> Task:
    train, valid, test = _pixels(photo)
    torch.manual_seed(seed)
    model = siren(2, 3, width=64, depth=3)
    loss = nn.functional.mse_loss
    return Task(
        model, train, valid, loss, steps=600, batch=512, test=test, metric=_psnr, name="PSNR [dB]", minimize=False
    )


def _psnr(color: Tensor, truth: Tensor) -> Tensor:
    """−10 log₁₀ of the mean squared error, colors in [-1, 1], so that the peak is 2."""
    return -10 * torch.log10(nn.functional.mse_loss(color, truth) / 4)


@functools.cache
def _pixels(photo: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """(place in [-1, 1]², color) pairs: half of the pixels train, as on a chessboard; a quarter each validate, test."""
    from sklearn.datasets import load_sample_image

    try:
        image = torch.tensor(load_sample_image(photo)).permute(2, 0, 1)
    except ImportError:
        raise InputError("the photographs need the package pillow: pip install 'etude[race]'") from None
    small = nn.functional.adaptive_avg_pool2d(image.float() / 127.5 - 1, _SIZE).flatten(1).T.contiguous()
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in _SIZE), indexing="ij")
    places = torch.stack([y, x], -1).view(-1, 2)
    row, column = torch.meshgrid(*(torch.arange(n) for n in _SIZE), indexing="ij")
    color = (row + column) % 2 * (1 + row % 2)  # of the chessboard: 0 trains, 1 validates in even rows, 2 tests in odd
    return tuple((places[color.flatten() == part], small[color.flatten() == part]) for part in range(3))
