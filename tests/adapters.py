"""An adapter of ours against peft's with the same θ."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from etude import weights


def against_peft(map, config, theta, frozen=(), base=None, tol=1e-9):
    """Outputs, gradients of θ and of the input, and merged weights agree.

    ``theta``: our name of a parameter → theirs, "^" before it where it is transposed; ``frozen``: the same of buffers,
    for which ours take their values.
    """
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = (base or nn.Linear(12, 8)).double()
    ours = weights.put(nn.Sequential(copy.deepcopy(base)), map, on="0")
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).double().eval()
    module, mine = theirs.base_model.model[0], ours[0].parametrizations.weight[0]

    def find(name):
        held, _, rest = name.removeprefix("^").partition(".")
        value = getattr(module, held)["default"]
        return value.get_parameter(rest) if rest else value

    pairs = [(mine.get_parameter(name), find(other), other[0] == "^") for name, other in dict(theta).items()]
    assert {id(p) for p, _, _ in pairs} == {id(p) for p in mine.parameters()}
    with torch.no_grad():
        for name, other in dict(frozen).items():
            mine.get_buffer(name).copy_(find(other).reshape(mine.get_buffer(name).shape))
        for p, other, flip in pairs:
            p.add_(0.3 * torch.randn_like(p))
            other.copy_((p.mT if flip else p).reshape(other.shape))
    shape = (2, base.weight.shape[1], 7, 7) if isinstance(base, nn.Conv2d) else (2, 3, base.weight.shape[1])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, z = ours(x), theirs(x)
    close = {"rtol": tol, "atol": tol}
    torch.testing.assert_close(y, z, **close)
    one = torch.autograd.grad(y.pow(3).mean(), [x, *(p for p, _, _ in pairs)])
    two = torch.autograd.grad(z.pow(3).mean(), [x, *(p for _, p, _ in pairs)])
    for g, h, flip in zip(one, two, [False, *(f for _, _, f in pairs)], strict=True):
        torch.testing.assert_close((g.mT if flip else g).reshape(h.shape), h, **close)
    torch.testing.assert_close(weights.merge(ours)[0].weight, theirs.merge_and_unload()[0].weight, **close)


def on(layer, map):
    """The layer, in float64, with the map on its weight, the map, and the weight before."""
    layer = layer.double()
    w = layer.weight.detach().clone()
    weights.put(layer, map, on="weight")
    return layer, layer.parametrizations.weight[0], w


def count(map):
    return sum(p.numel() for p in map.parameters())
