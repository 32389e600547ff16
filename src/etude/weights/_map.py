"""What a map V → W is, and how the chain of one weight's maps is held: on ``torch.nn.utils.parametrize``.

A chain is first reparametrisations (θ → W: θ replaces the trained weight), then adapters (W → W with θ of their own;
the weight beneath is frozen).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize as P

from etude._method import stamp
from etude.weights._birth import Watch

Spot = tuple[nn.Module, str]


class Map(nn.Module):
    """V → W. What a factory returns is a pattern: ``put`` copies it for every weight.

    A subclass writes ``forward(*theta) -> W`` and ``right_inverse(W) -> theta`` (a tensor, or a tuple of tensors; W
    itself if not written), and ``born(w)`` if it must see the weight to make its buffers or to refuse it.
    """

    changes: ClassVar[str] = ""
    """Why putting it changes a trained weight; empty for the maps that reach every weight, which change nothing."""

    name = ""
    axis = 0  # of the output units; 1 in a transposed convolution and in Hugging Face's Conv1D
    many = False  # whether ``right_inverse`` makes several tensors
    on = True
    product: Callable[..., Tensor] | None = (
        None  # a reparametrisation's twin: (*theta, x) ↦ x Wᵀ without W, if it has one
    )
    twin = False  # whether ``linear``, or ``product``, stands in for ``forward`` where it can

    def takes(self, w: Tensor) -> bool:
        """Whether this is a weight for the map; biases and gains are not."""
        return w.ndim >= 2

    def born(self, w: Tensor) -> None:
        """Called by ``put`` once, with the weight as it stands (and, where ``watch`` makes one, with its watch)."""

    def blank(self, w: Tensor, state: Mapping[str, Tensor]) -> None:
        """θ for this weight, into which ``state`` is loaded next."""
        self.born(w)

    def watch(self) -> Watch | None:
        """What must see the data before this map is born on a weight; mostly nothing."""
        return None

    def enough(self, watches: list[Watch]) -> bool:
        """Whether the weights have seen enough of the data."""
        return False

    def allot(self, watches: list[Watch]) -> None:
        """Give each weight's watch its rank, where the weights share a budget."""

    def matrix(self, w: Tensor) -> Tensor:
        """The weight as [out, in], however stored; a kernel as [out, in · kh · kw]."""
        return w.movedim(self.axis, 0).flatten(1)

    def stored(self, m: Tensor, w: Tensor) -> Tensor:
        """A matrix [out, in] in the shape and order in which w is stored."""
        return m.view(w.movedim(self.axis, 0).shape).movedim(0, self.axis).contiguous()

    def right_inverse(self, w: Tensor) -> Tensor | tuple[Tensor, ...]:
        return w

    def __repr__(self) -> str:
        made = stamp(self)
        named = f" {self.name!r}" if made and self.name not in ("", made.name) else ""
        return f"{made or type(self).__name__}{named}{'' if self.on else ' (off)'}"


class Adapter(Map):
    """W → W with θ of its own, made by ``born``; the weight beneath is frozen and keeps its bits.

    A subclass may write ``linear(x, base)``, the activation-side twin of ``forward``: x W'ᵀ from ``base``: x ↦ x Wᵀ.
    (``nn.Module`` has taken the name ``apply``.)
    """

    additive: ClassVar[bool] = False
    """W' − W does not depend on W: such adapters commute."""

    remade: ClassVar[tuple[str, ...]] = ()
    """Buffers that a birth makes again from the knobs alone, as from a seed: ``save`` leaves them out of its file."""

    def right_inverse(self, w: Tensor) -> Tensor:
        raise NotImplementedError(f"the weight carries {self!r}: merge or remove it before you assign a weight")

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        raise NotImplementedError(f"{self!r} has no activation-side twin")


class Chain(P.ParametrizationList):
    """The maps of one weight; one object under every alias of a tied weight."""

    trains: bool  # whether the weight trained before an adapter froze it, and ``freeze`` has not frozen it since
    baked: list[Map]  # what ``merge`` took out, while this chain waits for ``unmerge``

    def roots(self) -> list[nn.Parameter]:
        """The parameters that stand where the weight stood."""
        return list(self.parameters(recurse=False))

    def maps(self) -> list[Map]:
        """All of them, from the weight outwards; one of torch's own may be among them."""
        return cast("list[Map]", list(self))

    def active(self) -> list[Map]:
        return [m for m in self.maps() if getattr(m, "on", True)]

    def thawed(self) -> bool:
        """Whether the weight trains once no adapter stands on it."""
        kept = self.trains and any(isinstance(m, Adapter) for m in self)
        return kept or any(p.requires_grad for p in self.roots())

    def forward(self) -> Tensor:
        return self.make(self.active())

    def make(self, maps: list[Map]) -> Tensor:
        """What these of the maps make of the roots."""
        if not maps:
            return self.original
        w: Tensor = maps[0](*self._theta())
        for m in maps[1:]:
            w = m(w)
        return w

    def _theta(self) -> list[Tensor]:
        """What the first map is played on."""
        return [self.original] if self.is_tensor else [getattr(self, f"original{i}") for i in range(self.ntensors)]

    def still(self, maps: list[Map]) -> Tensor:
        """``make`` outside autograd and training: no buffer moves."""
        was = self.training
        with torch.no_grad():
            w = self.eval().make(maps)
        self.train(was)
        return w.detach()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias, where the maps on top that have a twin never build W."""
        maps = self.active()
        cut = len(maps)
        while cut and isinstance(maps[cut - 1], Adapter) and maps[cut - 1].twin:
            cut -= 1
        above = cast("list[Adapter]", maps[cut:])
        inside = bias if all(m.additive for m in above) else None  # where maps only add, the bias rides along for free
        base: Callable[[Tensor], Tensor]
        if cut == 1 and getattr(maps[0], "twin", False):
            base, inside = partial(cast(Any, maps[0]).product, *self._theta()), None
        else:
            base = partial(F.linear, weight=self.make(maps[:cut]), bias=inside)
        for m in above:
            base = partial(m.linear, base=base)
        return base(x) if inside is bias else base(x) + cast(Tensor, bias)


def adopt(chain: P.ParametrizationList) -> Chain:
    """torch's list of parametrizations as one of ours."""
    if not isinstance(chain, Chain):
        trains = any(p.requires_grad for p in chain.parameters(recurse=False))
        chain.__class__ = Chain
        chain.__dict__.update(trains=trains, baked=[])
    return cast(Chain, chain)


# -- the places where a weight stands ---------------------------------------------------------------------------------


def chain_at(spot: Spot) -> Chain | None:
    module, key = spot
    return adopt(cast(Any, module).parametrizations[key]) if P.is_parametrized(module, key) else None


def called(spot: Spot) -> bool:
    """Whether this is the weight of an nn.Linear whose forward runs: nn.MultiheadAttention never calls out_proj's."""
    module, key = spot
    known = type(module).forward in (nn.Linear.forward, _forward)
    return key == "weight" and known and not isinstance(module, NonDynamicallyQuantizableLinear)


def _forward(self: Any, x: Tensor) -> Tensor:
    """nn.Linear.forward where a map of the weight has a twin."""
    return cast(Chain, self.parametrizations["weight"]).linear(x, self.bias)


def install(spots: list[Spot], chain: Chain) -> None:
    """Let every alias look at this chain, and let nn.Linear use the twins."""
    for module, key in spots:
        own_class(module)
        if not P.is_parametrized(module, key):
            P.register_parametrization(module, key, nn.Identity(), unsafe=True)
        cast(Any, module).parametrizations[key] = chain
        if called((module, key)) and any(getattr(m, "twin", False) for m in chain):
            type(module).forward = _forward


def bare(spots: list[Spot], w: nn.Parameter) -> None:
    """A plain parameter again, under every alias."""
    for module, key in spots:
        own_class(module)
        cls, held = type(module), cast(Any, module).parametrizations
        delattr(cls, key)
        del held[key]
        if key == "weight" and "forward" in vars(cls):
            del cls.forward
        if not held:
            del module.parametrizations
            module.__class__ = cls.__bases__[0]
        module.register_parameter(key, w)


def own_class(module: nn.Module) -> None:
    """Give a mapped module a class of its own: a deepcopy shares the one torch made, and we are about to change it."""
    if P.is_parametrized(module):
        cls = type(module)
        mine = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, cls.__bases__, mine)
