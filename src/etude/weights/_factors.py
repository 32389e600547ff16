"""Structured matrices as maps of the last axis, x ↦ x M with M never built: one algebra for adapters and for layers.

x: [..., d]. ``T`` is the transposed map, ``Product`` reads from left to right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128
"""Stages that together mix groups of at most so many coordinates are multiplied out: one product instead of many."""


class Factor(ABC):
    """x ↦ x M on the last axis."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    @abstractmethod
    def T(self) -> Factor: ...  # noqa: N802  (as torch)


@dataclass(frozen=True)
class Product(Factor):
    """x M₁ M₂ …"""

    factors: tuple[Factor, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for factor in self.factors:
            x = factor(x)
        return x

    @property
    def T(self) -> Product:  # noqa: N802
        return Product(tuple(factor.T for factor in reversed(self.factors)))


@dataclass(frozen=True)
class Scale(Factor):
    """x ∘ s; s: [d]."""

    s: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.s

    @property
    def T(self) -> Scale:  # noqa: N802
        return self


@dataclass(frozen=True)
class Update(Factor):
    """x + x P Z: the identity and a low rank; p: [d, r], z: [r, d]."""

    p: Tensor
    z: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.addmm(rows, rows @ self.p, self.z).view_as(x)

    @property
    def T(self) -> Update:  # noqa: N802
        return Update(self.z.mT, self.p.mT)


@dataclass(frozen=True)
class Blocks(Factor):
    """The k parts of x through a matrix each; blocks: [k, b, c], from k b to k c coordinates."""

    blocks: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        k, b, c = self.blocks.shape
        parts = x.reshape(-1, k, b).transpose(0, 1)
        return (parts @ self.blocks).transpose(0, 1).reshape(*x.shape[:-1], k * c)

    @property
    def T(self) -> Blocks:  # noqa: N802
        return Blocks(self.blocks.mT)


@dataclass(frozen=True)
class Shuffle(Factor):
    """Axes a and b of x: [a · b · c] change places."""

    a: int
    b: int
    c: int

    def __call__(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.a, self.b, self.c)).transpose(-3, -2).reshape(x.shape)

    @property
    def T(self) -> Shuffle:  # noqa: N802
        return Shuffle(self.b, self.a, self.c)


@dataclass(frozen=True)
class Butterfly(Factor):
    """Blocks, each of half a block and the half block ``stride`` further on; blocks: [d / b, b, b]."""

    blocks: Tensor
    stride: int

    def __call__(self, x: Tensor) -> Tensor:
        gather = Shuffle(2, self.stride, self.blocks.shape[-1] // 2)
        parts = torch.unflatten(x, -1, (-1, 2 * self.stride * gather.c))
        return gather.T(Blocks(self.blocks)(gather(parts).flatten(-2)).view_as(parts)).flatten(-2)

    @property
    def T(self) -> Butterfly:  # noqa: N802
        return Butterfly(self.blocks.mT, self.stride)


@dataclass(frozen=True)
class Padded(Factor):
    """A factor of more coordinates than x has, which leaves those beyond x alone."""

    inner: Factor
    width: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(F.pad(x, (0, self.width - x.shape[-1])))[..., : x.shape[-1]]

    @property
    def T(self) -> Padded:  # noqa: N802
        return Padded(self.inner.T, self.width)


@dataclass(frozen=True)
class Hubs(Factor):
    """Blocks, and then (or, ``first``, before them) a matrix over the first coordinates of all blocks, their hubs.

    blocks: [k, b, b], hubs: [k, k].
    """

    blocks: Tensor
    hubs: Tensor
    first: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        x = self._over_hubs(x) if self.first else x
        x = Blocks(self.blocks)(x)
        return x if self.first else self._over_hubs(x)

    @property
    def T(self) -> Hubs:  # noqa: N802
        return Hubs(self.blocks.mT, self.hubs.mT, not self.first)

    def _over_hubs(self, x: Tensor) -> Tensor:
        parts = torch.unflatten(x, -1, self.blocks.shape[:2])
        return torch.cat([(parts[..., 0] @ self.hubs)[..., None], parts[..., 1:]], -1).flatten(-2)


def tournament(planes: Tensor, d: int) -> Factor:
    """d − 1 plane maps in ⌈log₂ d⌉ rounds: round k maps the pairs (i, i + 2ᵏ), i a multiple of 2ᵏ⁺¹, each as a row.

    planes: [d − 1, 2, 2], round by round. The rounds within groups of neighbours, and those between, are multiplied
    out.
    """
    like = planes.new_empty(0)
    alive = [-(-d // 2**k) for k in range((d - 1).bit_length())]
    rounds = list(torch.split(planes.flatten(1).T.contiguous(), [n // 2 for n in alive], dim=1))
    inner = min(len(rounds), 4)
    size, groups = 2**inner, -(-d // 2**inner)
    for k in range(inner):  # what reaches beyond d stays where it is
        rest = eye(2, like).view(4, 1).expand(4, groups * size // 2 ** (k + 1) - rounds[k].shape[1])
        rounds[k] = torch.cat([rounds[k], rest], 1).view(4, groups, -1)
    blocks = _played(rounds[:inner], eye(size, like)[:, None].expand(size, groups, size)).transpose(0, 1)
    whole: Factor = Hubs(blocks, _played(rounds[inner:], eye(groups, like))) if groups > 1 else Blocks(blocks)
    return Padded(whole, groups * size) if groups * size > d else whole


def _played(rounds: list[Tensor], x: Tensor) -> Tensor:
    """x through the rounds, each [4, ..., pairs]: the first of a pair goes on to the next round."""
    out = []
    for aa, ab, ba, bb in (g.unbind() for g in rounds):
        n = aa.shape[-1]
        a, b = x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2]
        out.append(a * ab + b * bb)
        x = torch.cat([a * aa + b * ba, x[..., 2 * n :]], -1)
    for b in reversed(out):
        n = b.shape[-1]
        x = torch.cat([torch.stack([x[..., :n], b], -1).flatten(-2), x[..., n:]], -1)
    return x


def multiplied_out(stages: Factor, group: int, width: int, like: Tensor) -> Blocks:
    """Stages that mix only within groups of neighbours, as one matrix per group."""
    rows = eye(group, like).repeat(1, width // group)
    return Blocks(stages(rows).view(group, -1, group).transpose(0, 1))


def eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def skew(theta: Tensor, n: int) -> Tensor:
    """Q = −Qᵀ from what stands above its diagonal, row by row; theta: [n (n − 1) / 2]."""
    i, j = torch.triu_indices(n, n, 1, device=theta.device)
    q = theta.new_zeros(n * n).index_copy(0, i * n + j, theta).view(n, n)
    return q - q.mT


def cayley(q: Tensor) -> Tensor:
    """(I + Q) (I − Q)⁻¹ = 2 (I − Q)⁻¹ − I, a rotation where Q is skew."""
    one = eye(q.shape[-1], q)
    turned: Tensor = 2 * torch.linalg.inv(one - q) - one
    return turned


def cayley_neumann(q: Tensor, k: int) -> Tensor:
    """(I + Q) (I + Q + … + Qᵏ): the Cayley map with its inverse cut off after k terms."""
    one = eye(q.shape[-1], q)
    total = one + q
    for _ in range(k - 1):
        total = one + q @ total
    return total + q @ total


def wide(x: Tensor) -> Tensor:
    """float32 for the half types, which the solvers of linear algebra do not know."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
