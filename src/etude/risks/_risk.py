"""What every risk is: a module from losses per example to one loss, with its state in buffers."""

from __future__ import annotations

from torch import Tensor, nn

from etude._method import stamp


class Risk(nn.Module):
    """ℓ[n] → ℓ. losses: [n] or [n, t]; group: [n], integers, for risks that need to know who is who."""

    def forward(self, losses: Tensor, group: Tensor | None = None) -> Tensor:
        """One loss (a scalar) of the dtype of ``losses``."""
        raise NotImplementedError(f"{type(self).__name__} is not a risk yet: write forward(losses, group)")

    def __repr__(self) -> str:
        return str(stamp(self) or super().__repr__())


def check(losses: Tensor) -> None:
    """Losses come per example; an empty batch has no risk."""
    if losses.ndim == 0 or losses.numel() == 0:
        raise ValueError(f"a risk needs losses [n], one per example, n ≥ 1; got shape {list(losses.shape)}")
