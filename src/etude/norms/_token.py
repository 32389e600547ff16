"""A norm that looks at one token at a time: a formula, its knobs, and what it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class TokenNorm(nn.Module):
    """formula(x, *parameters, **knobs) of each token over its features, in float32 at least. x: [..., d]."""

    _role = "norm"
    axis = -1

    def __init__(
        self, formula: Callable[..., Tensor], features: int, starts: Mapping[str, Tensor], **knobs: float
    ) -> None:
        super().__init__()
        self.formula, self.features, self.knobs = formula, features, knobs
        self._learned = tuple(starts)
        for name, start in starts.items():
            self.register_parameter(name, nn.Parameter(start))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != self.features:
            raise ValueError(f"{self} has {self.features} features on axis -1 but x has shape {tuple(x.shape)}")
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return self.formula(wide, *(getattr(self, name) for name in self._learned), **self.knobs).to(x.dtype)

    def extra_repr(self) -> str:
        named = self.formula.__name__.strip("_")
        return ", ".join([named, str(self.features), *(f"{k}={v}" for k, v in self.knobs.items())])
