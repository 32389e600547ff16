"""What a rule is: a chain of parts, each a function of the update so far, on stacks.

A part sees ``u`` the update so far, ``g`` the raw gradient, ``w`` the weight, ``s`` its own state and ``c`` the step's
context. Every tensor has a leading axis k: members of one shape, whatever layer or model they come from. A part never
changes u, g or w in place; it changes only s.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from etude._method import _METHODS, stamp

Width = Literal["coordinate", "tensor", "shape", "matrix", "model"]
WIDTHS: tuple[Width, ...] = ("coordinate", "tensor", "shape", "matrix")


class Bag:
    """Values by name, read as attributes; plain enough for the compiler to see through."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        for key in items:
            setattr(self, key, items[key])

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no {name!r} here; there are {', '.join(vars(self))}")


State = Bag
"""The part's own tensors by name: ``s.exp_avg``: [k, …]."""
Context = Bag
"""The part's own numbers by field name, what it ``reads`` of the step, and ``total`` for a model-wide part."""


@dataclass(frozen=True)
class Part:
    """One step of a chain. Its float fields are knobs; they arrive in ``c`` as floats, or tensors that broadcast."""

    width: ClassVar[Width] = "coordinate"
    """How far it looks: each coordinate alone; one tensor, as a row; one tensor in its ``shape``, whatever that is; a
    matrix with its axes, which alone is served; or the whole model it belongs to."""
    plain: ClassVar[bool] = False
    """Whether it is never compiled: eigenvectors, a choice by what the numbers are."""
    per_member: ClassVar[bool] = False
    """Of a part that looks at the whole model or at coordinates: whether it keeps state per tensor, [k, 1, …]."""
    gather: ClassVar[Literal["sum", "amax"]] = "sum"
    """Of a part that looks at the whole model: how its partials become one number."""
    on_gradient: ClassVar[bool] = False
    """Whether its result also replaces the raw gradient that later parts see."""
    reads: ClassVar[tuple[str, ...]] = ()
    """What it reads of the step beside its own fields: ``t``, steps from 1; ``multiplier``, lr / initial lr; ``loss``,
    what the closure gave; ``noise``, standard normal numbers like u, by name and step; ``hessian``, an estimate of its
    diagonal like u, only there (``vars(c)``) at steps at which ``p.hessian`` was given."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, given = getattr(self, f.name), f"{type(self).__name__}({f.name}={getattr(self, f.name)!r})"
            if f.type in (float, "float", int, "int") and not isinstance(value, Tensor):
                top = 1.0 if f.name.startswith(("beta", "momentum")) else math.inf
                if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 <= value < top:
                    raise ValueError(f"{given}: {f.name} must be a number in [0, {top})")
            cls: Any = type(self)
            choices = get_args(_hints(cls)[f.name])
            if choices and isinstance(value, str) and value not in choices:
                raise ValueError(f"{given}: {f.name} is one of {', '.join(map(repr, choices))}")

    def init(self, w: Tensor) -> dict[str, Tensor]:
        """The state at step 0 for a stack w: [k, …]; zeros, on w's device."""
        return {}

    def clock(self, t: int) -> dict[str, float]:
        """Numbers that depend on the step count; computed once a step, outside any kernel."""
        return {}

    def draws(self, t: int) -> bool:
        """Whether it wants its ``noise`` at step t; at others there is none (``vars(c)``)."""
        return True

    def partial(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor | dict[str, Tensor]:
        """For width ``model``: the coordinates whose sum over the owner model arrives as ``c.total``, or by name.

        [k, …], or one value for each member, [k, 1, …]
        """
        raise NotImplementedError(f"{type(self).__name__} looks at one tensor at a time")

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        """The next update.  [k, …]"""
        raise NotImplementedError

    def evaluated(self, w: Tensor, s: State, c: Context) -> Tensor:
        """The weights to evaluate and keep, where they are not the ones that are trained; ``c``: its numbers."""
        return w

    def numbers(self) -> dict[str, Any]:
        """Its float fields: what may change from step to step without a new kernel."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type in (float, "float")}

    def __str__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items() if v is not False)})"


@functools.cache
def _hints(part: Any) -> dict[str, Any]:
    return get_type_hints(part)


@dataclass(frozen=True, repr=False)
class Chain:
    """Parts in order; the update they end with is subtracted from the weight. Prints as the recipe it is."""

    parts: tuple[Part, ...]

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def __str__(self) -> str:
        return " → ".join(map(str, self.parts))

    __repr__ = __str__

    @property
    def name(self) -> str:
        """The method's name, or ``chain`` for one made by hand."""
        made = stamp(self)
        return made.name if made else "chain"

    @functools.cached_property
    def width(self) -> Width:
        """The widest look of its parts; a model-wide part needs only partial sums, so it counts as a coordinate's."""
        return WIDTHS[max(map(_reach, self.parts))]

    @property
    def plain(self) -> bool:
        """Whether one of its parts is never compiled."""
        return any(p.plain for p in self.parts)

    @functools.cached_property
    def steady(self) -> bool:
        """Whether its parts read nothing of the step that is a tensor like u."""
        return not any({"noise", "hessian"} & set(part.reads) for part in self.parts)

    @functools.cached_property
    def structure(self) -> tuple[Any, ...]:
        """What decides the kernel: the parts' types and every field that is not a number."""
        return _structure(self.parts)

    def knobs(self) -> dict[str, Any]:
        """What a param group holds: the method's knobs, or for a chain made by hand its parts' fields."""
        made = stamp(self)
        if made:
            return dict(made.knobs)
        at = dict(_walk(self.parts, ()))
        return {key: getattr(at[path], field) for key, (path, field) in self._fields().items()}

    def remake(self, knobs: Mapping[str, Any]) -> Chain:
        """The same rule at other knobs."""
        made = stamp(self)
        if made:
            again = _METHODS[made.room, made.name].fn(**knobs)
            assert isinstance(again, Chain)
            return again
        return Chain(_remade(self.parts, (), {at: knobs[key] for key, at in self._fields().items()}))

    def _fields(self) -> dict[str, tuple[Path, str]]:
        """Group key → (where the part is, field); a second field of one name gets a number: ``beta``, ``beta_2``."""
        found: dict[str, tuple[Path, str]] = {}
        for path, part in _walk(self.parts, ()):
            for f in _own_fields(part):
                found[unused(f.name, found)] = (path, f.name)
        return found


Path = tuple[int, ...]
"""Where a part is: its place in the chain, then within that part, …"""


def _walk(parts: Iterable[Part], path: Path) -> Iterator[tuple[Path, Part]]:
    """Every part with its place, the parts within parts after the one they are in."""
    for i, part in enumerate(parts):
        yield (*path, i), part
        if isinstance(part, Within):
            yield from _walk(part.inner, (*path, i))


def _own_fields(part: Part) -> list[dataclasses.Field[Any]]:
    """Its fields but for the parts within it."""
    return [f for f in dataclasses.fields(part) if not (isinstance(part, Within) and f.name == "inner")]


def _remade(parts: Iterable[Part], path: Path, values: Mapping[tuple[Path, str], Any]) -> tuple[Part, ...]:
    made = []
    for i, part in enumerate(parts):
        at = (*path, i)
        changed = {name: value for (where, name), value in values.items() if where == at}
        if isinstance(part, Within):
            changed["inner"] = _remade(part.inner, at, values)
        made.append(dataclasses.replace(part, **changed))
    return tuple(made)


def _reach(p: Part) -> int:
    return max(int(p.per_member), 0 if p.width == "model" else WIDTHS.index(p.width))


def _structure(parts: Iterable[Part]) -> tuple[Any, ...]:
    return tuple(
        (
            type(p),
            *((f.name, _still(getattr(p, f.name))) for f in dataclasses.fields(p) if f.type not in (float, "float")),
        )
        for p in parts
    )


def _still(value: Any) -> Any:
    """A field's value without the numbers in it."""
    return _structure(value) if isinstance(value, tuple) and value and isinstance(value[0], Part) else value


@dataclass(frozen=True)
class Within(Part):
    """A part that plays parts of its own, ``inner``, where its subclass says: on a projection, on blocks, on a factor.

    Their state, numbers and clocks are kept beside its own, under ``inner.0.exp_avg``, ``inner.1.beta``, ….
    """

    inner: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for p in self.inner:
            if p.width == "model" or {"noise", "hessian"} & set(p.reads):
                what = "looks at the whole model" if p.width == "model" else "reads noise or curvature"
                raise ValueError(f"{type(self).__name__}: {p} {what} and cannot be played within another part")
        told = dict.fromkeys([*type(self).reads, *(key for p in self.inner for key in p.reads)])
        object.__setattr__(self, "reads", tuple(told))
        object.__setattr__(self, "plain", type(self).plain or any(p.plain for p in self.inner))

    def numbers(self) -> dict[str, Any]:
        mine = super().numbers()
        return mine | {f"inner.{i}.{k}": v for i, p in enumerate(self.inner) for k, v in p.numbers().items()}

    def clock(self, t: int) -> dict[str, float]:
        return {f"inner.{i}.{k}": v for i, p in enumerate(self.inner) for k, v in p.clock(t).items()}

    def started(self, w: Tensor) -> dict[str, Tensor]:
        """The inner parts' state at step 0 for what they will be played on, w: [k, …]."""
        return {f"inner.{i}.{k}": x for i, p in enumerate(self.inner) for k, x in p.init(w).items()}

    def played(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        """The inner parts' update on tensors of the shape they were started for."""
        for i, p in enumerate(self.inner):
            state, number = _own(s, f"inner.{i}."), _own(c, f"inner.{i}.")
            for key in p.reads:
                setattr(number, key, getattr(c, key))
            u = p(u, g, w, state, number)
            g = u if p.on_gradient else g
        return u


def _own(bag: Bag, prefix: str) -> Bag:
    return Bag({k.removeprefix(prefix): v for k, v in vars(bag).items() if k.startswith(prefix)})


def chain(*parts: Part) -> Chain:
    """A rule of your own: the parts in order, e.g. ``chain(Ema(0.95), Polar(), Decay(0.1), Scale(2e-2))``."""
    for p in parts:
        if isinstance(p, Chain):
            raise TypeError(f"chain(): {p.name} is a chain; to go on from it, unpack it: chain(*{p.name}(), …)")
        if not isinstance(p, Part):
            raise TypeError(f"chain(): {p!r} is no part; a part is an instance such as Scale(1e-3)")
        if vars(type(p)).get("__annotations__") and "__dataclass_params__" not in vars(type(p)):
            raise TypeError(f"chain(): the part {type(p).__name__} has fields and needs @dataclass(frozen=True)")
    if not parts:
        raise ValueError("chain(): needs at least one part, e.g. Scale(1e-3)")
    return Chain(parts)


@dataclass(frozen=True, repr=False)
class Route:
    """Which rule serves which roles: ``route(matrices=muon(), rest=adamw())``."""

    arms: tuple[tuple[str, Chain], ...]

    def __str__(self) -> str:
        return "route(" + ", ".join(f"{arm}={rule.name}" for arm, rule in self.arms) + ")"

    __repr__ = __str__


MATRICES = ("hidden", "conv")
"""The roles that the arm ``matrices`` serves."""


def route(**arms: Chain) -> Route:
    """Send parameters to rules by role: an arm is a role, ``matrices`` (hidden and conv) or ``rest``."""
    for arm, rule in arms.items():
        if not isinstance(rule, Chain):
            raise TypeError(f"route({arm}=…): expected a rule such as adamw(), got {rule!r}")
    if not arms:
        raise ValueError("route(): needs arms, e.g. route(matrices=muon(), rest=adamw())")
    return Route(tuple(arms.items()))


def unused(name: str, taken: Iterable[str]) -> str:
    """The name, or ``name_2``, ``name_3``, … where it is taken."""
    same = sum(re.fullmatch(rf"{name}(_\d+)?", key) is not None for key in taken)
    return f"{name}_{same + 1}" if same else name


def pair(betas: Any) -> tuple[Any, Any]:
    """Two betas, or one clear line."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r}: expected two numbers, e.g. (0.9, 0.999)")
    return betas[0], betas[1]


def mix_(average: Tensor, x: Tensor, beta: Any) -> Tensor:
    """average ← β average + (1 − β) x, in place."""
    if isinstance(beta, Tensor):
        return average.mul_(beta).add_(x * (1 - beta))
    return average.lerp_(x, 1 - beta)


def mix_square_(average: Tensor, x: Tensor, beta: Any) -> Tensor:
    """average ← β average + (1 − β) x², in place."""
    if isinstance(beta, Tensor):
        return average.mul_(beta).add_(x * x * (1 - beta))
    return average.mul_(beta).addcmul_(x, x, value=1 - beta)


def debias(beta: float, t: int) -> float:
    """1 / (1 − βᵗ), which frees an average that began at 0 of that; a product costs less than a quotient."""
    return 1 / (1 - beta**t)


def begin_(x: Tensor, value: Tensor | float, t: Any) -> Tensor:
    """x ← value at the first step, in place; afterwards x as it is."""
    return x.copy_(torch.where(torch.as_tensor(t, device=x.device) == 1, value, x))


def norm(x: Tensor) -> Tensor:
    """‖x‖ of each member.  [k, …] → [k, 1, …]"""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else x.abs()


def mean(x: Tensor) -> Tensor:
    """The mean of each member.  [k, …] → [k, 1, …]"""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else x


def scalars(w: Tensor) -> Tensor:
    """A zero for each member.  [k, …] → [k, 1, …]"""
    return w.new_zeros(w.shape[0], *[1] * (w.ndim - 1))


def total(x: Tensor) -> Tensor:
    """The sum of each member.  [k, …] → [k, 1, …]"""
    return x.sum(dim=tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else x
