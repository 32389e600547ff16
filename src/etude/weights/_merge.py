"""Remove, merge, unmerge, enable, disable, freeze: what is done with the maps that a model carries."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from etude.weights._host import Weight, attach, following, held, weights_of
from etude.weights._map import Adapter, Chain, Map, Spot, bare, chain_at, install


def remove(model: nn.Module, name: str | None = None, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Take maps away: an adapter leaves the weight it stood on, bit for bit, a reparametrisation the weight it made.

    A weight that trained before its adapter trains again, unless ``freeze`` froze it. ``optimizer``: as in ``put``.
    """
    plans = [(weight, [m for m in maps if not isinstance(m, Adapter)], maps) for weight, maps in held(model, name)]
    _take(model, plans, optimizer, "weights.remove")
    return model


def merge(model: nn.Module, name: str | None = None, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Bake the maps that are on (of this name) into the weights: plain layers again. ``unmerge`` has the originals.

    A weight that trained before its adapter trains again, unless ``freeze`` froze it. ``optimizer``: as in ``put``.
    """
    plans = [(weight, on) for weight, maps in held(model, name) if (on := [m for m in maps if m.on])]
    if not plans:
        raise ValueError("weights.merge takes the maps that are on, and these are all disabled; enable them first")
    chains = [cast(Chain, weight.chain) for weight, _ in plans]
    _take(model, [(weight, on, on) for weight, on in plans], optimizer, "weights.merge")
    for (weight, on), chain in zip(plans, chains):
        for module, key in weight.spots:
            first: Chain = module.__dict__.setdefault("_merged", {}).setdefault(key, chain)
        first.baked += on
    return model


def unmerge(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Undo every ``merge``: the originals come back, bit for bit; what merged weights learned since is dropped.

    ``optimizer``: as in ``put``.
    """
    waiting: dict[int, tuple[Chain, list[Spot]]] = {}
    for module in model.modules():
        for key, chain in module.__dict__.get("_merged", {}).items():
            waiting.setdefault(id(chain), (chain, []))[1].append((module, key))
    if not waiting:
        raise ValueError(f"{type(model).__name__} has nothing to unmerge: weights.merge was not called on it")
    back = {which: _before_merge(chain, spots) for which, (chain, spots) in waiting.items()}
    weights = [Weight(spots=spots) for _, spots in waiting.values()]
    with following(optimizer, model, weights, [p for weight in weights for p in weight.roots], "weights.unmerge"):
        for which, (chain, spots) in waiting.items():
            module, key = spots[0]
            w = cast(Tensor, getattr(module, key))
            while len(chain):
                del chain[len(chain) - 1]
            chain.extend(back[which])
            chain.baked = []
            install(spots, chain.to(w.device, w.dtype).train(module.training))
            for module, _ in spots:
                module.__dict__.pop("_merged", None)
    return model


def _before_merge(chain: Chain, spots: list[Spot]) -> list[Map]:
    """The maps that belong on the originals: those merged, and those that are there now."""
    over = chain_at(spots[0])
    known = [*chain.baked, *(over.maps() if over else [])]
    later = [m for m in known if m not in chain.maps()]
    if wrong := [m for m in later if not isinstance(m, Adapter)]:
        raise ValueError(f"{wrong[0]!r} was put on a merged weight and cannot stand on adapters; remove it to unmerge")
    return [m for m in chain.maps() if m in known] + later


def _check_order(weight: Weight, bake: list[Map], leave: list[Map]) -> None:
    """A map may go into the weight before one beneath it only if both merely add."""
    maps = cast(Chain, weight.chain).maps()
    for i, m in enumerate(maps):
        for n in maps[:i] if m in bake else []:
            if n not in leave and not (getattr(m, "additive", False) and getattr(n, "additive", False)):
                raise ValueError(f"{weight.names[0]}: {m!r} stands on {n!r} and cannot go into the weight before it")


def _take(
    model: nn.Module,
    plans: list[tuple[Weight, list[Map], list[Map]]],
    optimizer: torch.optim.Optimizer | None,
    what: str,
) -> None:
    """Carry out (weight, maps to bake, maps to leave) for all weights, or, where one is refused, for none."""
    gone: list[nn.Parameter] = []
    for weight, bake, leave in plans:
        _check_order(weight, bake, leave)
        gone += [*(weight.roots if bake else []), *(p for m in leave for p in m.parameters())]
    with following(optimizer, model, [weight for weight, _, _ in plans], gone, what):
        for plan in plans:
            _take_off(*plan)


def _take_off(weight: Weight, bake: list[Map], leave: list[Map]) -> None:
    """The maps of ``leave`` go; those of them in ``bake`` go into the weight."""
    chain = cast(Chain, weight.chain)
    rest, trains = [m for m in chain.maps() if m not in leave], chain.thawed()
    if bake or not rest:
        w = nn.Parameter(chain.still(bake).clone()) if bake else cast(nn.Parameter, chain.original)
        w.requires_grad_(trains)
        bare(weight.spots, w)
        for m in rest:
            attach(weight, m)
    else:
        for i in reversed(range(len(chain))):
            if chain[i] in leave:
                del chain[i]
        if not any(isinstance(m, Adapter) for m in rest):
            for root in chain.roots():
                root.requires_grad_(trains)


def enable(model: nn.Module, name: str | None = None) -> nn.Module:
    """Switch adapters on again."""
    return _switch(model, name, on=True)


def disable(model: nn.Module, name: str | None = None) -> nn.Module:
    """Switch adapters off: the model is as it was without them, bit for bit."""
    return _switch(model, name, on=False)


def _switch(model: nn.Module, name: str | None, on: bool) -> nn.Module:
    for _, maps in held(model, name, Adapter):
        for m in maps:
            m.on = on
    return model


def freeze(model: nn.Module, name: str | None = None) -> nn.Module:
    """Freeze everything but the adapters (of this name): biases, norms and the head too.

    What is frozen stays so, after ``merge`` and ``remove`` as well, until you call ``requires_grad_(True)`` on it.
    """
    adapters = list(held(model, name, Adapter))
    model.requires_grad_(False)
    for weight in weights_of(model):
        if weight.chain:
            weight.chain.trains = False
    for _, maps in adapters:
        for m in maps:
            m.requires_grad_(True)
    return model
