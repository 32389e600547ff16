"""What the norms that are no pattern share: the axis of the features, and weight · x̂ + bias along it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etude.norms._broadcast import over, wide


class Affine(nn.Module):
    """A norm with weight and bias per feature, on axis −1 (x: [..., d]) or on axis 1 (x: [b, d, ...])."""

    _role = "norm"
    _shown: tuple[str, ...] = ("eps",)

    def __init__(self, features: int, axis: int, eps: float):
        super().__init__()
        self.features, self.axis, self.eps = features, axis, eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def checked(self, x: Tensor, at_least: int = 2) -> Tensor:
        """x, once its shape is what it should be; statistics of half precision are taken in float32."""
        if x.ndim < at_least or x.shape[self.axis] != self.features:
            raise ValueError(
                f"{type(self).__name__} has {self.features} features on axis {self.axis} of at least {at_least} axes "
                f"but x has shape {tuple(x.shape)}"
            )
        return wide(x)

    def along(self, t: Tensor, x: Tensor) -> Tensor:
        """t: [d], or [b, d] where the features are on axis 1, with the axes that let it meet x."""
        return t if self.axis == -1 else over(x, t)

    def affine(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.along(self.bias, x), x, self.along(self.weight, x))

    def extra_repr(self) -> str:
        return ", ".join([str(self.features), *(f"{name}={getattr(self, name)!r}" for name in self._shown)])


def var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean over the last axis; torch warns of an empty batch, where there is nothing to say."""
    return torch.var_mean(x, -1, correction=0) if x.numel() else (x.mean(-1), x.mean(-1))
