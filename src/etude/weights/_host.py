"""Attach, enable, merge, remove: what is done with the maps of a model, once for all of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as P

from etude._held import orphan, refuse_if_held, returned
from etude._method import stamp
from etude._roles import _is_transposed_linear, roles
from etude.weights._map import Adapter, Chain, Map, Spot, bare, called, chain_at, install, own_class

Route = Literal["auto", "weight", "apply"]

# -- the weights of a model -------------------------------------------------------------------------------------------


@dataclass
class Weight:
    """A weight under all its aliases, mapped or not."""

    names: list[str] = field(default_factory=list)
    spots: list[Spot] = field(default_factory=list)
    params: list[str] = field(default_factory=list)  # the names of its parameters, by which its role is found

    @property
    def chain(self) -> Chain | None:
        return chain_at(self.spots[0])

    @property
    def roots(self) -> list[nn.Parameter]:
        module, key = self.spots[0]
        return self.chain.roots() if self.chain else [cast(nn.Parameter, getattr(module, key))]

    @property
    def theta(self) -> list[nn.Parameter]:
        """All that may train: the roots, and the maps' own."""
        return list(self.chain.parameters()) if self.chain else self.roots

    def value(self) -> Tensor:
        """The weight the model sees."""
        return self.chain.still(self.chain.active()) if self.chain else self.roots[0].detach()


def weights_of(model: nn.Module) -> list[Weight]:
    """Every weight of the model once; a map's own parameters are not weights."""
    found: dict[int, Weight] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" in path.split("."):
            continue
        dot = f"{path}." if path else ""
        here = {key: (id(p), [key]) for key, p in module._parameters.items() if p is not None}
        for key, chain in getattr(module, "parametrizations", nn.ModuleDict()).items():
            here[key] = id(chain), [f"parametrizations.{key}.{n}" for n, _ in chain.named_parameters(recurse=False)]
        for key, (which, params) in here.items():
            weight = found.setdefault(which, Weight())
            weight.names.append(dot + key)
            weight.params += [dot + p for p in params]
            if not any(module is m and key == k for m, k in weight.spots):
                weight.spots.append((module, key))
    return list(found.values())


def _choose(model: nn.Module, on: str | Iterable[str]) -> list[Weight]:
    """The weights whose role is ``on``, or one of whose names, or whose module's name, matches that pattern."""
    wanted = [on] if isinstance(on, str) else list(on)
    every, role_of = weights_of(model), roles(model)

    def role(weight: Weight) -> str:
        known = [role_of[p] for p in weight.params if p in role_of]
        return next((r for r in known if r != "vector"), "vector")

    def fits(weight: Weight) -> bool:
        names = [n for name in weight.names for n in (name, name.rpartition(".")[0])]
        return any(role(weight) == w or any(fnmatchcase(n, w) for n in names) for w in wanted)

    if chosen := [w for w in every if fits(w)]:
        return chosen
    names = [w.names[0] for w in every]
    some = ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")
    raise ValueError(
        f"no weight of {type(model).__name__} has the role or the name {' or '.join(map(repr, wanted))}; "
        f"roles here: {', '.join(sorted({role(w) for w in every})) or 'none'}; names: {some}"
    )


def held(model: nn.Module, name: str | None = None, kind: type[Map] = Map) -> Iterator[tuple[Weight, list[Map]]]:
    """The mapped weights, and their maps of this name (None: of any) and kind. None at all is an error."""
    found, names = False, set()
    for weight in weights_of(model):
        maps = [m for m in weight.chain.maps() if isinstance(m, kind)] if weight.chain else []
        names |= {m.name for m in maps}
        if maps := [m for m in maps if name in (None, m.name)]:
            found = True
            yield weight, maps
    if not found:
        what = "adapter" if kind is Adapter else "map"
        there = f"there are {', '.join(map(repr, sorted(names)))}" if names else f"no weight carries any {what}"
        raise ValueError(f"{type(model).__name__} has no {what}{f' named {name!r}' if name else ''}; {there}")


# -- putting ----------------------------------------------------------------------------------------------------------


def put(
    model: nn.Module, map: Map, on: str | Iterable[str] = "hidden", name: str | None = None, *,
    route: Route = "auto", optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:  # fmt: skip
    """Attach a copy of ``map`` to every weight that ``on`` selects; returns the model.

    ``on``: a role ("hidden", "conv", "head", "embedding"), a pattern of names ("*.attn.*"), or several. ``name``: what
    ``merge``, ``disable`` and the rest call it; the method's name if not given. ``route``: ``apply`` uses the map's
    activation-side twin, ``weight`` builds W, ``auto`` takes the twin wherever there is one and the layer's own forward
    is called. An adapter freezes the weight it stands on and nothing else; ``weights.freeze`` freezes all the rest.
    Maps come before the optimizer; the groups of an ``optimizer`` made earlier are brought up to date, and one of etude
    that trains what goes, and is not handed in, is an error.
    """
    if not isinstance(map, Map):
        raise TypeError(f"weights.put takes a map, such as weights.lora(r=8); got {map!r}")
    if route not in get_args(Route):
        raise ValueError(f"route={route!r}: choose one of {', '.join(get_args(Route))}")
    made = stamp(map)
    name = name or (made.name if made else type(map).__name__)
    weights = [w for w in _choose(model, on) if map.takes(w.value())]
    if not weights:
        raise ValueError(f"{on!r} selects no weight that {map!r} can ride on (biases and gains are left alone)")
    copies = [born(map, name, weight, route) for weight in weights]  # all that is refused is refused before a change
    pairs = list(zip(weights, copies))
    gone = [p for weight, mine in pairs if isinstance(mine, Adapter) or mine.many for p in weight.theta]
    with following(optimizer, model, weights, gone, "weights.put"):
        for weight, mine in pairs:
            attach(weight, mine)
    return model


def born(pattern: Map, name: str, weight: Weight, route: Route = "auto") -> Map:
    """The pattern's copy for one weight, or why there can be none."""
    where, there = weight.names[0], weight.chain.maps() if weight.chain else []
    if any(getattr(m, "name", None) == name for m in there):
        raise ValueError(f"{where} already carries a map named {name!r}; give this one another name=")
    adapter = isinstance(pattern, Adapter)
    if not adapter and any(isinstance(m, Adapter) for m in there):
        raise ValueError(f"{where} carries {there[-1]!r}: {pattern!r} must come before the adapters")
    twin = isinstance(pattern, Adapter) and type(pattern).linear is not Adapter.linear
    if route == "apply" and not (twin and any(called(spot) for spot in weight.spots)):
        raise ValueError(f'{where}: route="apply" needs a map with a twin, and an nn.Linear whose forward is called')
    mine = copy.deepcopy(pattern)
    mine.name, mine.twin = name, twin and route != "weight"
    module, w = weight.spots[0][0], weight.value()
    mine.axis = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) or _is_transposed_linear(module) else 0
    try:
        mine.born(w)
        if not adapter:
            mine.many = _goes_back(mine, w)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if there and mine.many:
        raise ValueError(f"{where} carries {there[-1]!r}: {pattern!r} makes several tensors and must be the first map")
    return mine


@torch.no_grad()
def _goes_back(map: Map, w: Tensor) -> bool:
    """Whether ``right_inverse`` makes several tensors; where ``forward`` does not make W of them, that is an error."""
    map = copy.deepcopy(map).eval()  # on a copy, because buffers may move
    theta = map.right_inverse(w)
    many = not isinstance(theta, Tensor)
    if not map.changes and not w.is_meta:
        again: Tensor = map(*theta) if many else map(theta)
        gap = (again.double() - w.double()).norm() / w.double().norm() if again.shape == w.shape else math.inf
        if gap > torch.finfo(w.dtype).eps ** (2 / 3):  # 2e-5 in float32
            raise ValueError(
                f"{map!r} would change the weight by {gap:.1%}: its forward(right_inverse(W)) must be W, "
                "or its `changes` must say why it is not"
            )
    return many


def attach(weight: Weight, map: Map) -> None:
    """Put ``map`` on top of the chain of one weight, under all its aliases."""
    module, key = weight.spots[0]
    w = weight.value() if weight.chain and not isinstance(map, Adapter) and not map.changes else None
    own_class(module)
    if weight.chain:
        weight.chain.trains = weight.chain.thawed()
    P.register_parametrization(module, key, map)
    chain = cast(Chain, weight.chain)
    if isinstance(map, Adapter):
        for root in chain.roots():
            root.requires_grad_(False)
    elif w is not None:
        setattr(module, key, w)  # torch only appends; this carries W back through the whole chain
    install(weight.spots, chain)


@contextmanager
def following(
    optimizer: torch.optim.Optimizer | None, model: nn.Module, weights: list[Weight], gone: Iterable[Tensor], what: str
) -> Iterator[None]:
    """Around a change of these weights: this optimizer is kept up, and no other may go on to train what is ``gone``.

    What adds a map is refused at once; taking one off mostly ends a training, and only a further step is refused.
    """
    if optimizer is not None and len({group.get("rule") for group in optimizer.param_groups}) > 1:
        raise ValueError(f"{what}: this optimizer sends parameters to several rules by role; make it after the maps")
    gone = list(gone)
    if what in ("weights.put", "weights.load"):
        refuse_if_held(gone, what, optimizer)
    before = [weight.theta for weight in weights]
    yield
    orphan(gone, what, optimizer)
    returned(p for weight in weights for p in weight.theta)
    if optimizer is not None:
        _hand_over(optimizer, model, before, weights)


def _hand_over(
    optimizer: torch.optim.Optimizer, model: nn.Module, before: list[list[nn.Parameter]], weights: list[Weight]
) -> None:
    """In the optimizer's groups, what trains now takes the place of what trained before."""
    name_of = {id(p): n for n, p in model.named_parameters()}
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    orphans: list[nn.Parameter] = []
    for was, weight in zip(before, weights):
        now = [p for p in weight.theta if p.requires_grad]
        dead = {id(p) for p in was} - {id(p) for p in now}
        new = [p for p in now if id(p) not in known]
        home = next((g for g in optimizer.param_groups if any(p is q for p in g["params"] for q in was)), None)
        if home is None:
            orphans += new
            continue
        keep = [i for i, p in enumerate(home["params"]) if id(p) not in dead]
        home["params"] = [home["params"][i] for i in keep] + new
        if "param_names" in home:
            old = [home["param_names"][i] for i in keep] + [""] * len(new)
            home["param_names"] = [name_of.get(id(p), n) for n, p in zip(old, home["params"])]
        for p in was:
            if id(p) in dead:
                optimizer.state.pop(p, None)
    if orphans:
        named = any("param_names" in group for group in optimizer.param_groups)
        optimizer.add_param_group({"params": [(name_of[id(p)], p) for p in orphans] if named else orphans})
    # what torch itself calls after it has changed the groups, so that an optimizer with a cache can drop it
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


# -- taking away, switching, merging ----------------------------------------------------------------------------------


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
