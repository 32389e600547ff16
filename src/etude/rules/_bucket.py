"""Which parameters move together: small tensors flat in one buffer, equal shapes stacked, large ones in place.

A bucket owns its members' state as one tensor per name; what a user sees in ``optimizer.state[p]`` are views into it.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from etude.rules._kernel import Kernel, Ready
from etude.rules._member import Member
from etude.rules._rounding import noise_bits, rest, stochastic
from etude.rules._rule import Chain, Part, Width, unused
from etude.rules._split import count, cut
from etude.rules._spread import Spread, aligned_with, fill, looks_wide, wrapped

SMALL = 32_768
"""Elements below which a tensor is gathered with others. Above it, copying costs more than a kernel's start."""
SMALL_MATRIX = 131_072
"""The same for matrix rules, whose products gain more from a stack."""

LOW = (torch.bfloat16, torch.float16)
"""Weights of these types are updated in float32, and what rounding loses is kept or drawn (see ``rounding``)."""


def layout(width: Width, numel: int, reference: bool) -> tuple[str, bool]:
    """Where a parameter goes: the bucket's layout, and whether it shares the bucket with others."""
    if reference:
        return "full", False
    if width in ("shape", "matrix"):
        return "full", numel < SMALL_MATRIX
    return "rows" if width == "tensor" else "flat", numel < SMALL


@dataclass
class Room:
    """A buffer in a bucket's layout, and the pieces of it that are each member's, in the member's shape."""

    whole: Tensor
    pieces: list[Tensor]
    shapes: list[torch.Size]


@dataclass
class Bucket:
    """Members in one layout: ``flat`` [n], ``rows`` [k, n], or ``full`` [k, *shape]."""

    group: int
    layout: str
    dtype: torch.dtype
    members: list[Member]
    spread: Spread | None = None
    """How the members are sharded."""
    state: list[dict[str, Tensor]] = field(default_factory=list)
    """For each part of the chain its tensors; the last entry is the engine's own (what rounding lost)."""
    single: list[set[str]] = field(default_factory=list)
    """Of sharded members, the names of state that is of each as such, not of its coordinates."""
    steps: Tensor = field(default_factory=lambda: torch.empty(0))
    """How many steps each member has taken; on the CPU, where reading it waits for nothing.  [k]"""
    resident: Tensor | None = None
    """The weights themselves, when the parameters are views of this buffer."""
    plain: bool = False
    """Whether no kernel could be built for it."""
    ready: Ready | None = None
    """Of one tensor updated in place, the kernel of its last step."""
    room: dict[str, Room] = field(default_factory=dict)
    """What weights and gradients are gathered into."""
    sizes: list[int] = field(default_factory=list)
    """How many real numbers each member holds."""
    made_for: tuple[torch.dtype, torch.device] = (torch.float32, torch.device("cpu"))

    def allocate(self, chain: Chain, kahan: bool) -> None:
        """State at step 0: zeros, on the members' device."""
        first = self.members[0]
        self.made_for = (first.p.dtype, first.p.device)
        self.sizes = [m.real.numel() for m in self.members]
        like = torch.empty(self._shape(), dtype=self.dtype, device=first.p.device)
        apart = self.spread is not None
        self.state = [{} if apart and looks_wide(part) else part.init(like) for part in chain.parts]
        self.single = [_single(part) if apart and entry else set() for part, entry in zip(chain.parts, self.state)]
        low = first.p.dtype
        self.state.append({"compensation": torch.zeros_like(like, dtype=low)} if kahan and low in LOW else {})
        self.single.append(set())
        self.steps = torch.zeros(len(self.members), dtype=torch.int64)

    @property
    def apart(self) -> Spread:
        """How the members are sharded, of a bucket of such."""
        assert self.spread is not None
        return self.spread

    def _shape(self) -> tuple[int, ...]:
        k, first = len(self.members), self.members[0].real
        if self.layout == "flat":
            return (sum(self.sizes),)
        if self.layout == "rows":
            return (k, first.numel())
        shape = first.shape[1:] if self.members[0].split else first.shape
        return (sum(self.counts()), *(shape or (1,)))

    def counts(self, mine: Sequence[int] | None = None) -> list[int]:
        """How many matrices each member holds."""
        members = self.members if mine is None else [self.members[i] for i in mine]
        return [1 if self.spread else count(m.split) for m in members]

    def settle(self) -> None:
        """Move the members' weights into one buffer that they become views of."""
        if any(m.p.is_complex() or m.p.dtype != self.dtype or not m.p.is_contiguous() for m in self.members):
            return
        whole = torch.cat([m.real.reshape(-1) for m in self.members])
        for m, piece in zip(self.members, torch.split(whole, self.sizes)):
            m.p.data = piece.view(m.p.shape)
        self.resident = whole

    def stands(self, state: Any) -> bool:
        """Whether the members are what it was made for and their state is what it owns: users may edit both."""
        for m in self.members:
            held = state.get(m.p)
            if held is not m.shown or (m.p.dtype, m.p.device) != self.made_for or len(held) != len(m.views):
                return False
            if not all(map(operator.is_, held.values(), m.views)):
                return False
        if self.resident is None:
            return True
        at, size = self.resident.data_ptr(), self.resident.element_size()
        for m, n in zip(self.members, self.sizes):
            if m.p.data_ptr() != at:
                return False
            at += n * size
        return True

    def show(self, i: int, before: dict[str, Tensor], owned: Sequence[dict[str, Any]] = ()) -> dict[str, Tensor]:
        """Member i's state by name in the parameter's own shape, holding what it held ``before``.

        ``owned``: of a sharded one, for each part, what is kept of the whole tensor; None where another process does.
        """
        m, found = self.members[i], {"step": self.steps[i]}
        m.elsewhere = set()
        for j, entry in enumerate(self.state):
            for name, x in entry.items():
                found[unused(name, {*found, *m.elsewhere})] = self._own(i, x, apart=name not in self.single[j])
            for name, x in (owned[j] if j < len(owned) else {}).items():
                key = unused(name, {*found, *m.elsewhere})
                if x is None:
                    m.elsewhere.add(key)
                else:
                    found[key] = x if m.split and m.split[0] else _shaped(x, m.p)
        for key, value in before.items():
            if key in found:
                fill(found[key], value)
        m.shown, m.views = found, tuple(found.values())
        return found

    def _own(self, i: int, x: Tensor, *, apart: bool) -> Tensor:
        """Member i's view of a state; of a sharded one, this process's part of it."""
        mine, p, at = self.split(x)[i], self.members[i].p, self.members[i].split
        if at and at[0] and not self.spread:
            return mine  # columns apart: no view of these numbers has the parameter's own shape
        return _shaped(mine, p) if self.spread is None else wrapped(mine, p) if apart else mine

    def names(self, chain: Chain, m: Member) -> set[str]:
        """What a member's state would be called under another chain, at the knobs of a checkpoint."""
        shape = self._shape() if self.spread is None else whole_shape(chain, m)
        found, like = ["step"], torch.empty(shape, dtype=self.dtype, device="meta")
        for part in chain.parts:
            for name in part.init(like):
                found.append(unused(name, found))
        return {*found, *(["compensation"] if "compensation" in m.shown else [])} - m.elsewhere

    def split(self, x: Tensor, mine: Sequence[int] | None = None) -> Sequence[Tensor]:
        """A tensor in the bucket's layout as one view per member."""
        if self.layout == "flat":
            return torch.split(x, self.sizes if mine is None else [self.sizes[i] for i in mine])
        counts = self.counts(mine)
        if max(counts) == 1:
            return x.unbind(0)
        return [piece if n > 1 else piece[0] for piece, n in zip(torch.split(x, counts), counts)]

    def gather(self, xs: Sequence[Tensor], into: str) -> Tensor:
        """Tensors of the members, in the bucket's layout and dtype; the buffer is kept from step to step."""
        first = xs[0]
        if len(xs) == 1 and first.dtype == self.dtype and first.is_contiguous():
            return first.view(self._one(first))
        shapes = [x.shape for x in xs]
        room = self.room.get(into)
        if room is None or room.shapes != shapes:
            room = self.room[into] = self._room(xs, shapes)
        torch._foreach_copy_(room.pieces, list(xs))
        return room.whole

    def _room(self, xs: Sequence[Tensor], shapes: list[torch.Size]) -> Room:
        sizes = [x.numel() for x in xs]  # none, perhaps: a shard may be empty
        flat = torch.empty(sum(sizes), dtype=self.dtype, device=xs[0].device)
        pieces = [piece.view(shape) for piece, shape in zip(torch.split(flat, sizes), shapes)]
        if self.layout != "flat":
            flat = flat.view(sum(self._one(x)[0] for x in xs), *self._one(xs[0])[1:])
        return Room(flat, pieces, shapes)

    def _one(self, x: Tensor) -> tuple[int, ...]:
        if self.layout == "flat":
            return (x.numel(),)
        if self.layout == "rows":
            return (1, x.numel())
        shape = self._shape()[1:]
        return (x.numel() // math.prod(shape), *shape)


@dataclass
class Work:
    """Members of a bucket that step together: same count, all with a gradient."""

    bucket: Bucket
    members: list[int]
    t: int
    w: Tensor
    g: Tensor
    u: Tensor
    state: list[dict[str, Tensor]]
    whole: bool
    room: str
    """Which of the bucket's buffers are its own."""
    in_place: bool = False
    """Whether w is the memory of its one member."""
    numbers: list[dict[str, Any]] = field(default_factory=list)
    packed: Tensor | None = None
    """The numbers as one tensor, for a kernel."""
    done: int = 0
    """How many of the chain's parts have been played."""
    pieces: list[dict[str, Tensor]] = field(default_factory=list)
    """For each member what its owner sent back."""

    def ready(self, kernel: Kernel, names: Any) -> Ready:
        """What plays this again at the next step, where it is one tensor updated in place."""
        p, tensors = self.bucket.members[0].p, [x for entry in self.state for x in entry.values()]
        return Ready(kernel, p.data_ptr(), p.shape, self.w, tensors, names, torch.get_num_threads())

    def per_member(self, values: Tensor) -> Tensor:
        """A value for each owner model, as the members see it: broadcastable to u.  [owners] → [n] or [k, 1, …]"""
        counts = self.bucket.counts(self.members)
        flat = self.bucket.layout == "flat"
        held = ([i] * (1 if flat else n) for i, n in zip(self.members, counts))
        owners = torch.tensor([self.bucket.members[i].owner for same in held for i in same])
        mine = values.to(self.u.device, self.u.dtype)[owners.to(self.u.device)]
        if self.bucket.layout != "flat":
            return mine.view(-1, *[1] * (self.u.ndim - 1))
        sizes = torch.tensor([self.bucket.sizes[i] for i in self.members], device=self.u.device)
        return mine.repeat_interleave(sizes)

    def hessian(self) -> Tensor | None:
        """The members' ``p.hessian``, in the bucket's layout; None where it was not measured for this step."""
        ps = [self.bucket.members[i].p for i in self.members]
        found = [h for p in ps if (h := getattr(p, "hessian", None)) is not None]
        if len(found) < len(ps):
            return None
        members = [self.bucket.members[i] for i in self.members]
        return self.bucket.gather([m.seen(h) for m, h in zip(members, found)], "hessian" + self.room)

    def noise(self) -> Tensor:
        """Standard normal numbers, by the members' names, the step and the place in the whole tensor alone."""
        b = self.bucket
        drawn = [self.drawn(b.members[i], b.members[i].places()).view(b.members[i].real.shape) for i in self.members]
        return b.gather(drawn, "noise" + self.room)

    def drawn(self, m: Member, places: Tensor | None = None) -> Tensor:
        """A member's noise at these places, or everywhere.  [n]"""
        n, key = m.p.numel() * (2 if m.p.is_complex() else 1), zlib.crc32(m.name.encode())
        at = torch.arange(n, device=self.u.device) if places is None else places
        bits = [noise_bits(x, key, self.t).to(self.bucket.dtype) for x in (at, at + n)]
        return (-2 * ((bits[0] + 0.5) / 2**32).log()).sqrt() * (bits[1] / 2**32 * (2 * math.pi)).cos()  # Box and Muller

    def land(self, rounding: str) -> None:
        """Put the weights, and the state if it was gathered, back where they live."""
        b = self.bucket
        if self.w is b.resident or self.in_place:
            return
        ps = [b.members[i].memory for i in self.members]
        if "compensation" in self.state[-1]:
            rounded = self.w.to(ps[0].dtype)
            self.state[-1]["compensation"].copy_(rest(self.w, rounded))
            self.w = rounded
        elif rounding == "stochastic" and ps[0].dtype in LOW:
            ms = [b.members[i] for i in self.members]
            pieces = [stochastic(x, m.name, self.t, ps[0].dtype, m.places()) for m, x in zip(ms, self._split())]
            torch._foreach_copy_(ps, [x.view(p.shape) for x, p in zip(pieces, ps)])
            self.w = ps[0]
        room = b.room.get("w" + self.room)
        if room is not None and self.w is room.whole:
            torch._foreach_copy_(ps, room.pieces)
        elif self.w.data_ptr() != ps[0].data_ptr():
            torch._foreach_copy_(ps, [x.view(p.shape) for x, p in zip(self._split(), ps)])
        if not self.whole:
            for entry, mine in zip(b.state, self.state):
                for name, x in entry.items():
                    homes = b.split(x)
                    torch._foreach_copy_([homes[i] for i in self.members], list(b.split(mine[name], self.members)))

    def _split(self) -> Sequence[Tensor]:
        return self.bucket.split(self.w, self.members)


def works(bucket: Bucket, maximize: bool) -> list[Work]:
    """The bucket's members that have a gradient, by step count. Mostly that is all of them, and nothing is copied."""
    by_count: dict[int, tuple[list[int], list[Tensor]]] = {}
    for i, (m, t) in enumerate(zip(bucket.members, bucket.steps.tolist())):
        g = m.p.grad
        if g is None:
            continue
        if g.layout is not torch.strided:
            raise RuntimeError(f"{m.name} has a sparse gradient; etude's rules need dense ones")
        mine, gs = by_count.setdefault(t, ([], []))
        mine.append(i)
        gs.append(g if m.plain else m.seen(aligned_with(g, m.p)))
    return [
        _work(bucket, mine, gs, t + 1, str(n), maximize) for n, (t, (mine, gs)) in enumerate(sorted(by_count.items()))
    ]


def _work(bucket: Bucket, mine: list[int], gs: list[Tensor], t: int, room: str, maximize: bool) -> Work:
    whole = len(mine) == len(bucket.members)
    if whole and bucket.resident is not None:
        w = bucket.resident
    else:
        w = bucket.gather([bucket.members[i].memory for i in mine], "w" + room)
    g = bucket.gather(gs, "g" + room)
    state = bucket.state
    if not whole:
        state = [{n: _pick(bucket, x, mine) for n, x in entry.items()} for entry in bucket.state]
    if "compensation" in state[-1]:
        w = w.add_(state[-1]["compensation"])
    if whole:
        bucket.steps += 1
    else:
        bucket.steps[mine] += 1
    g = -g if maximize else g
    first = bucket.members[mine[0]]
    in_place = len(mine) == 1 and whole and first.plain and w.data_ptr() == first.p.data_ptr()
    return Work(bucket, mine, t, w, g, g, state, whole, room, in_place)


def _pick(bucket: Bucket, x: Tensor, mine: list[int]) -> Tensor:
    homes = bucket.split(x)
    pieces = [homes[i] for i in mine]
    if bucket.layout == "flat":
        return torch.cat(pieces)
    return torch.cat([x if n > 1 else x[None] for x, n in zip(pieces, bucket.counts(mine))])


def _single(part: Part) -> set[str]:
    """Which of its state is of a tensor as such, not of its coordinates."""
    return {name for name, x in part.init(torch.empty(1, 7, device="meta")).items() if x.shape[-1] != 7}


def _shaped(x: Tensor, p: Tensor) -> Tensor:
    if x.numel() != p.numel() * (2 if p.is_complex() else 1):
        return x
    return torch.view_as_complex(x.view(*p.shape, 2)) if p.is_complex() else x.view(p.shape)


def whole_shape(chain: Chain, m: Member) -> tuple[int, ...]:
    """The shape in which the chain's parts see a member as a whole: [1, …], or [n, …] where it holds n matrices."""
    real = (*m.p.shape, 2) if m.p.is_complex() else tuple(m.p.shape)
    if chain.width == "tensor":
        return (1, math.prod(real))
    return tuple(cut(torch.empty(real, device="meta"), m.split).shape) if m.split else (1, *real)
