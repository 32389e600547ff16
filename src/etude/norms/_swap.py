"""Replaces the norms of a model by others, structurally: by what a layer is, not by what it is called."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.func import functional_call

from etude._held import hand_over, refuse_if_held, refuse_routes
from etude.norms._calibrate import Calibrated
from etude.norms._norm import Modulation, Norm

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_TORCHS = (nn.LayerNorm, nn.RMSNorm, *_BATCH, *_INSTANCE, nn.GroupNorm)
_AFFINE = ("weight", "bias")
_AVERAGES = ("running_mean", "running_var", "num_batches_tracked")


def swap(
    model: nn.Module,
    factory: Callable[[int], nn.Module],
    where: str | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[str]:
    """Put ``factory(features)`` in the place of every norm layer; returns the names replaced.

    Norms are those of torch and of etude, and the layers of other libraries that are called …Norm and compute what
    RMSNorm or LayerNorm computes. Weight, bias and running statistics are carried over where both layers have them, the
    parameters as the same objects; dtype, device and train mode are kept. ``where`` is an fnmatch pattern of module
    names. Nothing matched, nothing changed, a weight or bias that has learned something and finds no place, and a norm
    that needs more than x, are errors. Swap before the optimizer is made; the groups of an ``optimizer`` made earlier
    are brought up to date, and one of etude that trains what goes, and is not handed in, is an error.
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(f"swap takes a factory features → module, such as norms.rms_norm; got {factory!r}")
    if _is_norm(model):
        raise ValueError(f"swap replaces norms inside a model, but the model is itself a {type(model).__name__}")
    norms = layers(model)
    found = {name: m for name, m in norms.items() if where is None or fnmatchcase(name, where)}
    if not found:
        asked = "norm layers" if where is None else f'norm layers named "{where}"'
        there = f"norms {', '.join(list(norms)[:8])}" if norms else f"module types {_types(model)}"
        raise ValueError(f"swap looked for {asked} and found none; the model has {there}")
    home = next(model.parameters(), torch.empty(0))
    made = {id(m): _made(name, m, factory, home) for name, m in found.items()}  # a shared layer stays shared
    changed = {name: made[id(m)] for name, m in found.items() if repr(made[id(m)]) != repr(_twin(m))}
    if not changed:
        raise ValueError(
            f"swap would change nothing: all {len(found)} norms already are {_short(next(iter(made.values())))}"
        )
    pairs = [(found[name], new) for name, new in changed.items()]
    for old, new in pairs:
        _carry(old, new)
    _refuse_held(pairs, optimizer)
    for name, new in changed.items():
        _refuse_loss(name, found[name], new)
    for name, new in changed.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    _leave_fast_paths(model, {id(new) for new in changed.values()})
    if optimizer is not None:
        hand_over(
            optimizer, model, [[*old.parameters()] for old, _ in pairs], [[*new.parameters()] for _, new in pairs]
        )
    return list(changed)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The norm layers of a model by name, a shared one under each; the parts of a norm are none."""
    named = dict(model.named_modules(remove_duplicate=False))
    whole = [f"{name}." for name, m in named.items() if getattr(m, "_role", None) == "norm"]
    return {name: m for name, m in named.items() if _is_norm(m) and not name.startswith(tuple(whole))}


def _made(name: str, old: nn.Module, factory: Callable[[int], nn.Module], home: torch.Tensor) -> nn.Module:
    new = factory(_features(name, old))
    if not isinstance(new, nn.Module):
        raise TypeError(f"swap needs a factory features → module, but {factory} made a {type(new).__name__}")
    if isinstance(old, Calibrated):
        raise ValueError(f"{name} takes its statistics from a source; norms.restore(model) first")
    if (needed := _needed(new)) != 1:
        raise ValueError(f"{_short(new)} is called with {needed} arguments, but the model gives it x alone")
    if _channels_first(old) and _features_last(new):
        raise ValueError(
            f"{name} is a {type(old).__name__} with its channels on axis 1, but {_short(new)} has its features last; "
            'pass a channels-first factory: partial(dyt, channels_last=False), or lambda d: Norm("b c ... -> b ...", d)'
        )
    like = next(old.parameters(), next(old.buffers(), home))
    return new.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None).train(old.training)


def _features(name: str, m: nn.Module) -> int:
    if isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
        if len(m.normalized_shape) != 1:
            raise ValueError(f"{name} normalises over {len(m.normalized_shape)} axes at once; swap knows only one")
        return m.normalized_shape[0]
    if isinstance(m, _TORCHS) or _ours(m):
        width: int = next(getattr(m, a) for a in ("num_features", "num_channels", "features") if hasattr(m, a))
        return width
    return m.get_parameter("weight").numel()


def _channels_first(m: nn.Module) -> bool:
    """Whether the features surely lie on axis 1, as in the LayerNorm2d that libraries derive from LayerNorm."""
    if _ours(m):
        return bool(m.axis == 1) and getattr(m, "pattern", "") != "b c ... -> c"
    if isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
        return "2d" in type(m).__name__.lower()
    return isinstance(m, _TORCHS) and not isinstance(m, nn.BatchNorm1d)


def _features_last(m: nn.Module) -> bool:
    return isinstance(m, (nn.LayerNorm, nn.RMSNorm)) or (_ours(m) and bool(m.axis != 1))


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
    return m if isinstance(m, _TORCHS) or _ours(m) else _by_behaviour(m) or m


def _is_norm(m: nn.Module) -> bool:
    """Whether swap may replace it. A subclass of torch's with a forward of its own may compute something else."""
    if _ours(m):
        return _needed(m) == 1
    if not isinstance(m, _TORCHS):
        return _by_behaviour(m) is not None
    own = isinstance(m, (nn.LayerNorm, nn.RMSNorm)) and len(m.normalized_shape) == 1 and not _channels_first(m)
    return not own or type(m).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) or _by_behaviour(m) is not None


@torch.no_grad()
def _by_behaviour(m: nn.Module) -> Norm | None:
    """The RMSNorm or LayerNorm that a layer of another library computes, on a probe with weights of ours; else None.

    Gemma's ``x̂ (1 + weight)`` is neither: its weight, carried over, would mean something else.
    """
    has, eps = dict(m.named_parameters()), getattr(m, "variance_epsilon", getattr(m, "eps", None))
    weight, named = has.get("weight"), type(m).__name__.endswith("Norm") or isinstance(m, _TORCHS)
    if not named or weight is None or weight.ndim != 1 or not has.keys() <= {"weight", "bias"}:
        return None
    if not isinstance(eps, float) or len(inspect.signature(m.forward).parameters) != 1:
        return None
    rng, d = torch.Generator().manual_seed(0), weight.numel()
    theta = {name: torch.randn(d, generator=rng) for name in has}
    x = 3 * torch.randn((2, d + 1 if d < 9 else 3, d), generator=rng) + 1  # no other axis has d features
    modulation: Modulation = "scale and shift" if "bias" in has else "scale"
    for center in (False, True):
        norm = Norm("... d -> ...", d, center=center, eps=eps, modulation=modulation)
        try:
            same = torch.allclose(functional_call(m, theta, x), functional_call(norm, theta, x), rtol=1e-4, atol=1e-5)
        except Exception:  # somebody else's layer that does not take the probe is none of these norms
            return None
        if same:
            return norm
    return None


def _ours(m: nn.Module) -> bool:
    """Whether it is a norm of etude, which says so, the number of its features and their axis."""
    return getattr(m, "_role", None) == "norm" and hasattr(m, "features") and hasattr(m, "axis")


def _needed(m: nn.Module) -> int:
    """How many arguments it cannot be called without."""
    return sum(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in inspect.signature(m.forward).parameters.values()
    )


def _refuse_held(pairs: list[tuple[nn.Module, nn.Module]], optimizer: torch.optim.Optimizer | None) -> None:
    """Raise if an optimizer trains a layer whose parameters would not all stay, or would get new ones beside them."""
    held = [old for old, new in pairs if {*map(id, old.parameters())} != {*map(id, new.parameters())}]
    refuse_routes(optimizer, "norms.swap", "the swap")
    try:
        refuse_if_held((p for old in held for p in old.parameters()), "norms.swap", optimizer)
    except ValueError:
        raise ValueError(
            "an optimizer already trains norms that swap would replace: swap before you make it, or pass optimizer=…"
        ) from None


def _refuse_loss(name: str, old: nn.Module, new: nn.Module) -> None:
    """Raise if the old layer's weight or bias is more than the 1 or 0 it was born with, and the new has none."""
    for key, neutral in (("weight", 1.0), ("bias", 0.0)):
        was, now = getattr(old, key, None), getattr(new, key, None)
        if was is None or (now is not None and now.shape == was.shape) or bool((was == neutral).all()):
            continue
        raise ValueError(
            f"{name}.{key} has learned something, for which {_short(new)} has no place; norms.fold puts it into the "
            f"next layer, nn.init.constant_({name}.{key}, {neutral:g}) forgets it"
        )


def _carry(old: nn.Module, new: nn.Module) -> None:
    names = [*_AFFINE, *(_AVERAGES if hasattr(old, "num_rows_tracked") == hasattr(new, "num_rows_tracked") else ())]
    if type(old) is type(new):
        names += [name for name, _ in old.named_buffers(recurse=False)]
    for name in names:
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


def _short(m: nn.Module) -> str:
    line = " ".join(repr(m).split())
    return line if len(line) <= 120 else f"{line[:119]}…"


def _types(model: nn.Module) -> str:
    return ", ".join(
        f"{name} × {n}" for name, n in Counter(type(m).__name__ for m in [*model.modules()][1:]).most_common(8)
    )
