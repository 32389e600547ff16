"""Replaces the norms of a model by others, structurally: by what a layer is, not by what it is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import nn

from etude.norms._norm import Modulation, Norm
from etude.norms.elementwise import DyT

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORMS = (nn.LayerNorm, nn.RMSNorm, *_BATCH, *_INSTANCE, nn.GroupNorm, Norm, DyT)
_CARRIED = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def swap(model: nn.Module, factory: Callable[[int], nn.Module], where: str | None = None) -> list[str]:
    """Put ``factory(features)`` in the place of every norm layer of torch or etude; returns the names replaced.

    Weight, bias and running statistics are carried over where both layers have them, the parameters as the same
    objects; dtype, device and train mode are kept. ``where`` is an fnmatch pattern of module names. Nothing matched,
    and nothing changed, are errors.
    """
    if isinstance(model, _NORMS):
        raise ValueError(f"swap replaces norms inside a model, but the model is itself a {type(model).__name__}")
    named = dict(model.named_modules(remove_duplicate=False))
    norms = {name: m for name, m in named.items() if isinstance(m, _NORMS)}
    found = {name: m for name, m in norms.items() if where is None or fnmatchcase(name, where)}
    if not found:
        asked = "norm layers of torch or etude" if where is None else f'norm layers named "{where}"'
        there = f"norms {', '.join(list(norms)[:8])}" if norms else f"module types {_types(model)}"
        raise ValueError(f"swap looked for {asked} and found none; the model has {there}")
    home = next(model.parameters(), torch.empty(0))
    made = {id(m): _made(name, m, factory, home) for name, m in found.items()}  # a shared layer stays shared
    changed = {name: made[id(m)] for name, m in found.items() if repr(made[id(m)]) != repr(_twin(m))}
    if not changed:
        raise ValueError(f"swap would change nothing: all {len(found)} norms already are {next(iter(made.values()))}")
    for name, new in changed.items():
        _carry(found[name], new)
        parent, _, child = name.rpartition(".")
        setattr(named[parent], child, new)
    _leave_fast_paths(model, {id(new) for new in changed.values()})
    return list(changed)


def _made(name: str, old: nn.Module, factory: Callable[[int], nn.Module], home: torch.Tensor) -> nn.Module:
    new = factory(_features(name, old))
    if not isinstance(new, nn.Module):
        raise TypeError(f"swap needs a factory features → module, but {factory} made a {type(new).__name__}")
    if _channels_first(old) and _features_last(new):
        raise ValueError(
            f"{name} is a {type(old).__name__} with its channels on axis 1, but {new} has its features last; pass a "
            'channels-first factory: partial(dyt, channels_last=False), or lambda d: Norm("b c ... -> b ...", d)'
        )
    like = next(old.parameters(), next(old.buffers(), home))
    return new.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None).train(old.training)


def _features(name: str, m: nn.Module) -> int:
    if isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
        if len(m.normalized_shape) != 1:
            raise ValueError(f"{name} normalises over {len(m.normalized_shape)} axes at once; swap knows only one")
        return m.normalized_shape[0]
    width: int = next(getattr(m, a) for a in ("num_features", "num_channels", "features") if hasattr(m, a))
    return width


def _channels_first(m: nn.Module) -> bool:
    """Whether the features surely lie on axis 1, as in the LayerNorm2d that libraries derive from LayerNorm."""
    if isinstance(m, (Norm, DyT)):
        return m.axis == 1 and getattr(m, "pattern", "") != "b c ... -> c"
    if isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
        return "2d" in type(m).__name__.lower()
    return not isinstance(m, nn.BatchNorm1d)


def _features_last(m: nn.Module) -> bool:
    return isinstance(m, (nn.LayerNorm, nn.RMSNorm)) or (isinstance(m, (Norm, DyT)) and m.axis != 1)


def _twin(m: nn.Module) -> nn.Module:
    """The etude norm that computes what a layer of torch computes, to see whether a swap would change anything."""
    affine: Modulation = "none" if getattr(m, "weight", None) is None else "scale and shift"
    if isinstance(m, nn.LayerNorm) and not _channels_first(m):
        learned: Modulation = "scale" if affine != "none" and m.bias is None else affine
        return Norm("... d -> ...", m.normalized_shape[0], eps=m.eps, modulation=learned)
    if isinstance(m, nn.RMSNorm) and m.eps is not None and not _channels_first(m):
        learned = "none" if affine == "none" else "scale"
        return Norm("... d -> ...", m.normalized_shape[0], center=False, eps=m.eps, modulation=learned)
    if isinstance(m, nn.GroupNorm):
        return Norm("b (g c) ... -> b g", m.num_channels, eps=m.eps, modulation=affine, g=m.num_groups)
    if isinstance(m, _BATCH) and m.track_running_stats and m.momentum is not None:
        return Norm("b c ... -> c", m.num_features, eps=m.eps, modulation=affine, momentum=m.momentum)
    if isinstance(m, _INSTANCE) and not m.track_running_stats:
        return Norm("b c ... -> b c", m.num_features, eps=m.eps, modulation=affine)
    return m


def _carry(old: nn.Module, new: nn.Module) -> None:
    for name in _CARRIED:
        was, now = getattr(old, name, None), getattr(new, name, None)
        if was is not None and now is not None and was.shape == now.shape:
            setattr(new, name, was)


def _leave_fast_paths(model: nn.Module, news: set[int]) -> None:
    """In eval torch's encoder layers compute LayerNorm from norm1.weight in one kernel and never call norm1."""
    for m in model.modules():
        if isinstance(m, nn.TransformerEncoderLayer) and news & {id(m.norm1), id(m.norm2)}:
            m.activation_relu_or_gelu = 0
    for m in model.modules():
        if isinstance(m, nn.TransformerEncoder) and any(not getattr(x, "activation_relu_or_gelu", 1) for x in m.layers):
            m.use_nested_tensor = False


def _types(model: nn.Module) -> str:
    return ", ".join(
        f"{name} × {n}" for name, n in Counter(type(m).__name__ for m in [*model.modules()][1:]).most_common(8)
    )
