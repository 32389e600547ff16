"""A network from coordinates to values, with sines for activations."""

from __future__ import annotations

from torch import nn

from etude import blocks


def siren(inputs: int, outputs: int, width: int = 64, depth: int = 3, w0: float = 30.0) -> nn.Sequential:
    """``depth`` × `blocks.siren`, then a linear head with the weights of a hidden layer. x: [n, inputs], in [-1, 1]."""
    first = blocks.siren(inputs, width, w0, first=True)
    hidden = [blocks.siren(width, w0=w0) for _ in range(depth - 1)]
    return nn.Sequential(first, *hidden, blocks.siren(width, outputs, w0).linear)
