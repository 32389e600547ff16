"""The scales and biases of weight-normalised layers from one batch."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from etude._roles import _is_transposed_linear
from etude.weights._map import chain_at
from etude.weights.direction import WeightNorm


@torch.no_grad()
def weight_norm_init(model: nn.Module, *inputs: Any) -> nn.Module:
    """g ← 1 / std(t) and b ← −mean(t) / std(t) with t = v x / ‖v‖, layer after layer in one pass of ``model(*inputs)``.

    So that what each linear or convolutional layer makes of this batch (large, and typical) has mean 0 and variance 1
    per channel; of a layer without a bias, variance 1. The paper draws v from N(0, 0.05²). Returns the model.
    """
    left = {m for m in model.modules() if _carries_weight_norm(m)}
    if not left:
        raise ValueError("weight_norm_init found no linear or convolutional layer that carries weight_norm alone")
    name_of = {m: n for n, m in model.named_modules()}

    def set_once(m: nn.Module, _: Any, y: Tensor) -> Tensor | None:
        if m not in left:
            return None
        left.remove(m)
        layer: Any = m
        g, b = cast(Tensor, layer.parametrizations["weight"].original0), cast("Tensor | None", layer.bias)
        at = y.ndim + 1 - g.ndim  # the channels': the last axis, or before the places of a convolution
        wide = [-1] + [1] * (y.ndim - 1 - at)
        t = (y if b is None else y - b.view(wide)) / g.view(wide)
        var, mean = torch.var_mean(t, [i for i in range(y.ndim) if i != at], correction=0)
        if not (var > 0).all():
            raise ValueError(f"{name_of[m]}: a channel makes the same of all of this batch, so no scale fits it")
        g.copy_(var.rsqrt().view_as(g))
        if b is None:
            return t * var.rsqrt().view(wide)
        b.copy_(-mean * var.rsqrt())
        return t * var.rsqrt().view(wide) + b.view(wide)

    hooks = [m.register_forward_hook(set_once) for m in left]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if left:
        raise ValueError(f"{', '.join(sorted(name_of[m] for m in left))}: not called by the model on this batch")
    return model


def _carries_weight_norm(m: nn.Module) -> bool:
    if not (isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) or _is_transposed_linear(m)):
        return False
    chain = chain_at((m, "weight"))
    shared = isinstance(m, nn.modules.conv._ConvTransposeNd) and m.groups > 1  # one g for several channels
    return chain is not None and len(chain) == 1 and isinstance(chain[0], WeightNorm) and not shared
