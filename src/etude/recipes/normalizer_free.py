"""Recipes that do without norms: by activation, or by initialisation and a few scalars."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from etude import blocks
from etude._method import method
from etude._roles import select
from etude.recipes._change import Change, replace, without_norms

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Hardswish, nn.Tanh,
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class SelfNormalizing(Change):
    """Norms out, SELU in, LeCun-normal weights, alpha dropout."""

    p: float

    def __call__(self, model: nn.Module) -> nn.Module:
        activations = [m for m in model.modules() if isinstance(m, _ACTIVATIONS)]
        if not activations:
            raise ValueError(f"self_normalizing looks for activation layers; {type(model).__name__} has none")
        without_norms(model)
        for old in activations:
            new = nn.SELU() if not self.p else nn.Sequential(nn.SELU(), nn.AlphaDropout(self.p))
            replace(model, old, new.train(old.training))
        for m in [*model.modules()]:
            if isinstance(m, nn.Dropout):
                replace(model, m, nn.AlphaDropout(m.p).train(m.training))
            elif isinstance(m, _WEIGHTED):
                nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
                _zero(m.bias)
        return model


@method(
    "Klambauer et al. 2017, Self-Normalizing Neural Networks, arXiv:1706.02515",
    note="the paper finds rates of 0.05 and 0.10 to serve",
)
def self_normalizing(p: float = 0.0) -> SelfNormalizing:
    """No norms, SELU for every activation, W ~ N(0, 1 / fan-in), b = 0, and dropout by `alpha_dropout`.

    ``p`` > 0 adds alpha dropout after each activation; dropout that is there becomes alpha dropout at its own rate. For
    feed-forward networks: what the paper proves does not hold along residual paths.
    """
    if not 0 <= p < 1:
        raise ValueError(f"self_normalizing: p, the share of values dropped, must be in [0, 1), got {p}")
    return SelfNormalizing(p)


class Shift(nn.Module):
    """x + b, b one learned number from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.to(x.dtype)


@dataclass(frozen=True, repr=False)
class Fixup(Change):
    """Residual blocks without norms: branches scaled by depth, their ends zero, and scalars for scale and biases."""

    def __call__(self, model: nn.Module) -> nn.Module:
        found = [m for m in model.modules() if isinstance(m, blocks.Residual)]
        if not found:
            raise ValueError(f"fixup looks for residual blocks, blocks.Residual; {type(model).__name__} has none")
        branches = [_branch(block) for block in found]
        inside = {id(m) for m in chain(*branches)}
        without_norms(model)
        for m in model.modules():
            if isinstance(m, _WEIGHTED) and id(m) not in inside:
                _he(m)
        for block, branch in zip(found, branches, strict=True):
            _fix(block, branch, len(found))
        for weight in select(model, "head").values():
            head = next(m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is weight)
            _zero(head.weight, head.bias)
            replace(model, head, nn.Sequential(Shift(), head))
        return model


def _branch(block: blocks.Residual) -> list[nn.Module]:
    """The layers of a block one after another."""
    f = block.f
    layers = [*f.children()]
    if not isinstance(f, (nn.Sequential, blocks.Mlp)) or any([*m.children()] for m in layers):
        raise ValueError(
            "fixup counts weight layers that follow one another: a branch is an nn.Sequential of layers or blocks.mlp, "
            f"not {type(f).__name__}"
        )
    if isinstance(block.gate_out, nn.Module):
        raise ValueError(f"fixup puts a scale of its own at the end of a branch, where this block has {block.gate_out}")
    if not any(isinstance(m, _WEIGHTED) for m in layers):
        raise ValueError("fixup found a branch without a linear layer or a convolution")
    return [m for m in layers if not isinstance(m, nn.Identity)]


def _fix(block: blocks.Residual, branch: list[nn.Module], depth: int) -> None:
    weighted = [m for m in branch if isinstance(m, _WEIGHTED)]
    for m in weighted[:-1]:
        _he(m, depth ** (-1 / (2 * len(weighted) - 2)))
    _zero(weighted[-1].weight)
    pieces: list[nn.Module] = []
    for m in weighted:
        m.bias = None  # the scalar before the next layer takes its place
    for piece in branch:
        pieces += [Shift(), piece] if isinstance(piece, (*_WEIGHTED, *_ACTIVATIONS)) else [piece]
    block.f = nn.Sequential(*pieces)
    block.gate_out = nn.Sequential(blocks.Gain(1.0), Shift())


def _he(m: nn.Module, scale: float = 1.0) -> None:
    with torch.no_grad():
        nn.init.kaiming_normal_(m.get_parameter("weight"), mode="fan_out", nonlinearity="relu").mul_(scale)


def _zero(*parameters: Tensor | None) -> None:
    for p in parameters:
        if p is not None:
            nn.init.zeros_(p)


@method("Zhang et al. 2019, Fixup Initialization: Residual Learning Without Normalization, arXiv:1901.09321")
def fixup() -> Fixup:
    """No norms; W ~ He · L^(−1/(2m − 2)) in each of L branches of m weight layers, the last of them and the head 0.

    A branch ends in one learned scale, from 1, and one bias; one bias, from 0, stands before each weight layer and
    activation in the place of the layers' own. He is by fan-out, as in the authors' code, which also trains scales and
    biases at a tenth of the learning rate. Blocks are blocks.Residual around an mlp or a sequence of layers.
    """
    return Fixup()
