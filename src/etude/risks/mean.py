"""The empirical risk: every example counts the same."""

from __future__ import annotations

from torch import Tensor

from etude._method import method
from etude.risks._risk import Risk, check


class Mean(Risk):
    """1/n Σ ℓᵢ."""

    def forward(self, losses: Tensor, group: Tensor | None = None) -> Tensor:
        check(losses)
        return losses.mean()


@method(
    "Vapnik 1991, Principles of Risk Minimization for Learning Theory, "
    "https://proceedings.neurips.cc/paper/1991/hash/ff4d5fbbafdf976cfdc032e3bde78de5-Abstract.html"
)
def mean() -> Mean:
    """ℓ = 1/n Σ ℓᵢ, the empirical risk; groups are not looked at."""
    return Mean()
