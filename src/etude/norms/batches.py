"""Batch norms for batches that are too large or too small: by ghost batches, and followed by groups of channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.norms._norm import Norm
from etude.norms.named import batch_norm


class GhostNorm(Norm):
    """Batch norm of each ``ghost_batch_size`` examples by themselves; the running averages take one step for each."""

    def __init__(self, features: int, ghost_batch_size: int, eps: float, momentum: float) -> None:
        super().__init__("b c ... -> c", features, eps=eps, momentum=momentum)
        if ghost_batch_size < 1:
            raise ValueError(f"GhostNorm: ghost_batch_size={ghost_batch_size}; a ghost batch holds 1 example or more")
        self.ghost_batch_size = ghost_batch_size

    def forward(self, x: Tensor) -> Tensor:
        return self._each(super().forward, x)

    def by_pattern(self, x: Tensor) -> Tensor:
        return self._each(super().by_pattern, x)

    def _each(self, norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self.training or len(x) <= self.ghost_batch_size:
            return norm(x)
        return torch.cat([norm(ghost) for ghost in torch.split(x, self.ghost_batch_size)])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_batch_size={self.ghost_batch_size}"


@method(
    "Hoffer et al. 2017, Train longer, generalize better: closing the generalization gap in large batch training of "
    "neural networks, arXiv:1705.08741",
    off=lambda: (ghost_batch_norm(6, ghost_batch_size=2**31), batch_norm(6)),
)
def ghost_batch_norm(d: int, ghost_batch_size: int = 128, eps: float = 1e-5, momentum: float = 0.1) -> GhostNorm:
    """(x − mean) / √(var + eps) · weight + bias, each channel over its ghost batch, or running in eval. x: [b, c, ...].

    A batch is cut into ghosts of ``ghost_batch_size`` in order, the last one the rest. The running averages take one
    step of ``momentum`` per ghost: divide it by the number of ghosts to have them forget as fast as batch_norm's.
    """
    return GhostNorm(d, ghost_batch_size, eps, momentum)


class BatchChannelNorm(Norm):
    """group_norm(batch_norm(x)): the batch's weight and bias are per channel, those of the groups per group."""

    def __init__(self, features: int, groups: int, estimate: bool, eps: float, momentum: float) -> None:
        super().__init__("b c ... -> c", features, eps=eps, momentum=momentum)
        if features % groups:
            raise ValueError(f"BatchChannelNorm: {features} features do not divide into {groups} groups")
        self.groups, self.estimate = groups, estimate
        self.group_weight, self.group_bias = nn.Parameter(torch.ones(groups)), nn.Parameter(torch.zeros(groups))

    def forward(self, x: Tensor) -> Tensor:
        return self._by_group(super().forward, x)

    def by_pattern(self, x: Tensor) -> Tensor:
        return self._by_group(super().by_pattern, x)

    def _by_group(self, batch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = self._estimated(x) if self.estimate and self.training and x.numel() else batch(x)
        w, b = (t.repeat_interleave(self.features // self.groups) for t in (self.group_weight, self.group_bias))
        return F.group_norm(y, self.groups, w, b, self.eps)

    def _estimated(self, x: Tensor) -> Tensor:
        """By running averages that this batch has moved; they are constants to the gradient."""
        self._check_shape(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            values = x.to(self.running_mean.dtype).transpose(0, 1).flatten(1)
            mean, var = values.mean(1), (values - self.running_mean[:, None]).square().mean(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean.clone(), self.running_var.clone()  # backward wants them as they are now
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}, estimate={self.estimate}"


@method(
    "Qiao et al. 2019, Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, "
    "arXiv:1903.10520"
)
def batch_channel_norm(
    d: int, groups: int = 32, estimate: bool = False, eps: float = 1e-5, momentum: float = 0.1
) -> BatchChannelNorm:
    """group_norm(batch_norm(x)), with a weight and a bias per channel after the first, per group after the second.

    With ``estimate``, for batches of one or two images, the running averages serve in training too: they take their
    step of ``momentum`` (which the authors' training scripts set) before they are used, the variance about the mean as
    it was before that step, as in the authors' code. x: [b, c, ...].
    """
    return BatchChannelNorm(d, groups, estimate, eps, momentum)
