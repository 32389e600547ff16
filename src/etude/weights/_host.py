"""The weights of a model, and how a map is put on those that are chosen."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as P

from etude._held import hand_over, orphan, refuse_if_held, refuse_routes, returned
from etude._method import stamp
from etude._roles import _is_transposed_linear, roles
from etude.weights._birth import Loss, Site, Watch, gather
from etude.weights._experts import per_expert
from etude.weights._map import Adapter, Chain, Map, Spot, called, chain_at, install, own_class

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
    def experts(self) -> bool:
        """Whether it is a stack of matrices [e, out, in] that no layer of torch's knows of."""
        module = self.spots[0][0]
        return self.value().ndim == 3 and not isinstance(module, (nn.modules.conv._ConvNd, nn.Bilinear))

    @property
    def axis(self) -> int:
        """The axis of the output units, of one expert where there are several."""
        module = self.spots[0][0]
        if self.value().ndim < 2:
            return 0
        if isinstance(module, nn.modules.conv._ConvTransposeNd) or _is_transposed_linear(module):
            return 1
        return int(self.experts and getattr(module, "is_transposed", False))  # Hugging Face's experts say so

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


def choose(model: nn.Module, on: str | Iterable[str]) -> list[Weight]:
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
    batches: Iterable[Any] | None = None, loss: Loss | None = None,
) -> nn.Module:  # fmt: skip
    """Attach a copy of ``map`` to every weight that ``on`` selects; returns the model.

    ``on``: a role ("hidden", "conv", "head", "embedding"), a pattern of names ("*.attn.*"), or several. ``name``: what
    ``merge``, ``disable`` and the rest call it; the method's name if not given. ``route``: ``apply`` uses the map's
    activation-side twin, ``weight`` builds W, ``auto`` takes the twin wherever there is one and the layer's own forward
    is called. An adapter freezes the weight it stands on and nothing else; ``weights.freeze`` freezes all the rest.
    Maps come before the optimizer; the groups of an ``optimizer`` made earlier are brought up to date, and one of etude
    that trains what goes, and is not handed in, is an error.
    ``batches``, ``loss``: for a map that is born from data (``corda``, ``eva``, ``lora_sb``): one pass over the
    batches by ``loss(model, batch)``, or, where only the layers' inputs count, by calling the model on each batch.
    A [e, out, in] parameter of no layer of torch's holds e experts, each of which gets a map of its own.
    """
    if not isinstance(map, Map):
        raise TypeError(f"weights.put takes a map, such as weights.lora(r=8); got {map!r}")
    if route not in get_args(Route):
        raise ValueError(f"route={route!r}: choose one of {', '.join(get_args(Route))}")
    made = stamp(map)
    name = name or (made.name if made else type(map).__name__)
    weights = [w for w in choose(model, on) if map.takes(w.value())]
    if not weights:
        raise ValueError(f"{on!r} selects no weight that {map!r} can ride on (biases and gains are left alone)")
    watches = _watched(model, map, weights, batches, loss)
    # all that is refused is refused before a change
    pairs = [(weight, born(map, name, weight, route, watch)) for weight, watch in watches]
    weights = [weight for weight, _ in pairs]
    gone = [p for weight, mine in pairs if isinstance(mine, Adapter) or mine.many for p in weight.theta]
    with following(optimizer, model, weights, gone, "weights.put"):
        for weight, mine in pairs:
            attach(weight, mine)
    return model


def born(
    pattern: Map, name: str, weight: Weight, route: Route = "auto", watch: Watch | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Map:  # fmt: skip
    """The pattern's copy for one weight, or why there can be none. ``state``: what will be loaded into it."""
    where, there = weight.names[0], weight.chain.maps() if weight.chain else []
    if any(getattr(m, "name", None) == name for m in there):
        raise ValueError(f"{where} already carries a map named {name!r}; give this one another name=")
    adapter = isinstance(pattern, Adapter)
    if not adapter and any(isinstance(m, Adapter) for m in there):
        raise ValueError(f"{where} carries {there[-1]!r}: {pattern!r} must come before the adapters")
    twin = type(pattern).linear is not Adapter.linear if isinstance(pattern, Adapter) else bool(pattern.product)
    if route == "apply" and not (twin and any(called(spot) for spot in weight.spots)):
        raise ValueError(f'{where}: route="apply" needs a map with a twin, and an nn.Linear whose forward is called')
    w = weight.value()
    mine = per_expert(pattern) if weight.experts else copy.deepcopy(pattern)
    mine.name, mine.twin, mine.axis = name, twin and route != "weight" and not weight.experts, weight.axis
    try:
        if state is not None:
            mine.blank(w, state)
        elif watch is not None:
            mine.born(w, watch)  # type: ignore[call-arg]
        else:
            mine.born(w)
        if not adapter:
            mine.many = _goes_back(mine, w)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if there and mine.many:
        raise ValueError(f"{where} carries {there[-1]!r}: {pattern!r} makes several tensors and must be the first map")
    return mine


class _Probe(Adapter):
    """W + 0, whose gradient is W's, for a weight that is made by maps."""

    name = "probe of a birth"

    def born(self, w: Tensor) -> None:
        self.zero = nn.Parameter(torch.zeros_like(w))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.zero


def _watched(
    model: nn.Module, map: Map, weights: list[Weight], batches: Iterable[Any] | None, loss: Loss | None
) -> list[tuple[Weight, Watch | None]]:
    """The weights that the map is for, each with what it has seen of the data, where the map asks for data."""
    made = [map.watch() for _ in weights]
    watches = [watch for watch in made if watch is not None]
    if not watches:
        if batches is not None or loss is not None:
            raise ValueError(f"{map!r} is not born from data: leave batches= and loss= away")
        return list(zip(weights, made))
    if batches is None:
        if all(w.value().is_meta for w in weights):
            return [(weight, None) for weight in weights]  # a state is to come
        raise ValueError(f"{map!r} is born from data: give weights.put batches=, of the data to fine-tune on")
    if stacked := [w.names[0] for w in weights if w.experts]:
        raise ValueError(f"{map!r} is born from data, which no single expert of {stacked[0]} can be shown")
    probes = [(w, _Probe()) for w in weights if w.chain] if watches[0].needs == "gradient" else []
    for weight, probe in probes:
        probe.born(weight.value())
        attach(weight, probe)
    try:
        taps = {id(weight): probe.zero for weight, probe in probes}
        sites = [
            Site(w.names[0], [m for m, key in w.spots if key == "weight"], taps.get(id(w), w.roots[0]), w.axis)
            for w in weights
        ]
        gather(model, sites, watches, batches, loss, map.enough)
    finally:
        for weight, probe in probes:
            detach(weight, probe)
    map.allot(watches)
    return [(weight, watch) for weight, watch in zip(weights, watches) if watch.rank != 0]


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
    hollow = isinstance(map, Adapter) and any(p.is_meta for p in weight.roots)  # where torch cannot try the map out
    P.register_parametrization(module, key, map, unsafe=hollow)
    chain = cast(Chain, weight.chain)
    if isinstance(map, Adapter):
        for root in chain.roots():
            root.requires_grad_(False)
    elif w is not None:
        setattr(module, key, w)  # torch only appends; this carries W back through the whole chain
    install(weight.spots, chain)


def detach(weight: Weight, map: Map) -> None:
    """Take an adapter off again: what it froze trains as before, and a weight without maps is a parameter again."""
    chain = cast(Chain, weight.chain)
    trains = chain.thawed()
    del chain[next(i for i, m in enumerate(chain) if m is map)]
    if not any(isinstance(m, Adapter) for m in chain):
        for root in chain.roots():
            root.requires_grad_(trains)


@contextmanager
def following(
    optimizer: torch.optim.Optimizer | None, model: nn.Module, weights: list[Weight], gone: Iterable[Tensor], what: str
) -> Iterator[None]:
    """Around a change of these weights: this optimizer is kept up, and no other may go on to train what is ``gone``.

    What adds a map is refused at once; taking one off mostly ends a training, and only a further step is refused.
    """
    refuse_routes(optimizer, what, "the maps")
    gone = list(gone)
    if what in ("weights.put", "weights.load", "weights.load_peft", "weights.quantize"):
        refuse_if_held(gone, what, optimizer)
    before = [weight.theta for weight in weights]
    yield
    orphan(gone, what, optimizer)
    returned(p for weight in weights for p in weight.theta)
    if optimizer is not None:
        hand_over(optimizer, model, before, [weight.theta for weight in weights])
