"""Initialisations on a wide, a square, a tall and a convolutional weight."""

import functools

import torch

SHAPES = [(3, 5), (4, 4), (7, 3), (5, 2, 3), (2, 3, 3, 2)]


def make(method, **knobs):
    return functools.partial(method.fn, **knobs)


def play(f):
    torch.manual_seed(3)
    return torch.cat([f(torch.randn(shape, dtype=torch.float64)).flatten() for shape in SHAPES])
