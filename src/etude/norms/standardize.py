"""Standardising by the statistics of everything seen so far: for observations, which have units of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etude._method import method


class RunningStandardization(nn.Module):
    """(x − mean) / √(var + eps) per feature over all rows ever seen in training, these included. x: [..., d]."""

    _role = "norm"
    axis = -1
    running_mean: Tensor
    running_var: Tensor
    num_rows_tracked: Tensor

    def __init__(self, features: int, eps: float = 1e-8):
        super().__init__()
        self.features, self.eps = features, eps
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_rows_tracked", torch.tensor(0))

    @property
    def _no_gradcheck(self) -> str:
        return "the statistics move with each look, and are constants to autograd" if self.training else ""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != self.features:
            raise ValueError(f"{self} has {self.features} features on axis -1 but x has shape {tuple(x.shape)}")
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if self.training and x.numel():
            self._remember(wide.detach().reshape(-1, self.features))
        return ((wide - self.running_mean) * (self.running_var + self.eps).rsqrt()).to(x.dtype)

    def _remember(self, rows: Tensor) -> None:
        """Chan's update of mean and biased variance by a batch of its own mean and variance."""
        # The start, mean 0 and variance 1, weighs 1e-4 rows.
        share = len(rows) / (self.num_rows_tracked.to(rows.dtype) + 1e-4 + len(rows))
        delta = rows.mean(0) - self.running_mean
        var = rows.var(0, correction=0) + (1 - share) * delta.square()
        self.running_var.lerp_(var.to(self.running_var.dtype), share.to(self.running_var.dtype))
        self.running_mean.add_(share * delta)
        self.num_rows_tracked.add_(len(rows))

    def extra_repr(self) -> str:
        return f"{self.features}, eps={self.eps}"


@method(
    "Lee et al. 2024, SimBa: Simplicity Bias for Scaling Up Parameters in Deep Reinforcement Learning, arXiv:2410.09754"
)
def rs_norm(d: int, eps: float = 1e-8) -> RunningStandardization:
    """(x − mean) / √(var + eps) per feature of all observations so far; train mode counts them, eval does not.

    So act in train mode and learn from replayed batches in eval mode: they are standardised by what is known by then.
    """
    return RunningStandardization(d, eps)
