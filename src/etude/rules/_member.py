"""One parameter as the engine holds it: what a rule sees of it, and the state that its user sees."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from etude.rules._split import Split, cut
from etude.rules._spread import is_distributed, local, spread


def real(x: Tensor) -> Tensor:
    """What of x lies here, as real numbers."""
    return torch.view_as_real(local(x)) if x.is_complex() else local(x)


@dataclass
class Member:
    """One parameter in a bucket, its name, its owner model, and the state that a user sees."""

    p: Tensor
    name: str
    owner: int
    place: tuple[int, int] = (0, 0)
    """Its group, and its place there."""
    split: Split = None
    """The matrices that it holds, for a rule that looks at matrices."""
    shown: dict[str, Tensor] = field(default_factory=dict)
    views: tuple[Tensor, ...] = ()
    elsewhere: set[str] = field(default_factory=set)
    """State of it that another process owns."""
    index: Tensor | None = None
    plain: bool = False
    """Whether the rule sees it as it is: real, whole, not split. Asked for each tensor at each step."""

    def __post_init__(self) -> None:
        self.plain = not (self.p.is_complex() or is_distributed(self.p) or self.split)

    @property
    def real(self) -> Tensor:
        """The parameter's memory in this process as real numbers: complex ones gain a last axis of 2."""
        return self.seen(self.p.detach())

    @property
    def memory(self) -> Tensor:
        """The same, to copy from and to without gradients: no view where the parameter is plain."""
        return self.p if self.plain else self.real

    def seen(self, x: Tensor) -> Tensor:
        """x, like the parameter, as the rule sees it: real, in the matrices that it holds; of a shard, as it lies."""
        if self.plain:
            return x
        return real(x) if spread(self.p) else cut(real(x), self.split)

    def places(self) -> Tensor | None:
        """Of a shard, the places of its numbers in the whole tensor; of a whole tensor None."""
        here = spread(self.p)
        if here is not None and self.index is None:
            whole = (*self.p.shape, 2) if self.p.is_complex() else tuple(self.p.shape)
            self.index = here.index(whole, self.p.device)
        return self.index
