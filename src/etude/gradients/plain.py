"""The gradient itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from etude._method import method
from etude.gradients._gradient import Gradient, Grads, LossFn, differentiate, differentiate_stacks


@dataclass(frozen=True, repr=False)
class Plain(Gradient):
    """g = ∇ℓ(w)."""

    def __call__(
        self,
        loss_fn: LossFn,
        params: Iterable[Tensor],
        buffers: Iterable[Tensor] = (),  # one pass moves them once
    ) -> tuple[Tensor, Grads]:
        return differentiate(loss_fn, list(params))

    def on_stacks(self, losses: LossFn, params: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, Grads]:
        return differentiate_stacks(losses, params)


@method(
    "Rumelhart, Hinton and Williams 1986, Learning representations by back-propagating errors, doi:10.1038/323533a0"
)
def plain() -> Plain:
    """g = ∇ℓ(w), by one forward and one backward pass."""
    return Plain()
