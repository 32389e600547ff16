"""Sources of a batch norm's statistics: the batch, a mixture, components of a stream, balanced tasks, all batches."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from etude.norms._broadcast import over, wide
from etude.norms._calibrate import BatchNorm, Source

Statistics = tuple[Tensor, Tensor]


class BatchStatistics(Source):
    """The mean and variance of the batch itself, always."""

    _affine_only = True

    def forward(self, x: Tensor, norm: BatchNorm) -> Statistics:
        return of_batch(x)


class Mixed(Source):
    """a · running + (1 − a) · batch, of means and of variances."""

    def __init__(self, source_weight: float):
        super().__init__()
        if not 0 <= source_weight <= 1:
            raise ValueError(f"alpha_bn: source_weight lies in [0, 1], got {source_weight}")
        self.source_weight = source_weight

    def forward(self, x: Tensor, norm: BatchNorm) -> Statistics:
        a, (mean, var) = self.source_weight, of_batch(x)
        return a * _there(norm.running_mean) + (1 - a) * mean, a * _there(norm.running_var) + (1 - a) * var

    def extra_repr(self) -> str:
        return f"source_weight={self.source_weight}"


class Unmixed(Source):
    """K components that follow the stream; an example is normalised by their mixture, its nearest moved to it first."""

    _no_vmap = "every forward pass moves the components, in place"
    _no_gradcheck = "which component an example is near to is a constant to autograd"
    mean: Tensor
    var: Tensor

    def __init__(self, components: int, temperature: float, alpha: float, momentum: float, batch_size: int):
        super().__init__()
        if components < 1 or not 0 <= alpha < 1:
            raise ValueError(f"unmix_tns needs components ≥ 1 and alpha in [0, 1), got {components} and {alpha}")
        self.components, self.temperature, self.alpha = components, temperature, alpha
        self.momentum, self.batch_size = momentum, batch_size

    def bind(self, norm: BatchNorm) -> None:
        k, a = self.components, self.alpha if self.components > 1 else 0.0
        mean, var = (_there(t).expand(k, -1) for t in (norm.running_mean, norm.running_var))
        noise = math.sqrt(a * k / max(1, k - 1)) * var.sqrt() * torch.randn_like(mean)
        self.register_buffer("mean", mean + noise)
        self.register_buffer("var", (1 - a) * var)

    def forward(self, x: Tensor, norm: BatchNorm) -> Statistics:
        if x.ndim == 2:  # an example without positions has no statistics of its own
            return _there(norm.running_mean), _there(norm.running_var)
        var, mean = torch.var_mean(x.flatten(2), 2, correction=0)  # [b, c]
        means, variances = self.mean.clone(), self.var.clone()  # compiled, what is updated below must not be saved
        near = F.normalize(mean.detach(), dim=1) @ F.normalize(wide(means), dim=1).T
        p = torch.softmax(near / self.temperature, 1)[..., None]  # [b, k, 1]
        to_mean, to_var = p * (mean[:, None] - means), p * (var[:, None] - variances)  # [b, k, c]
        means, variances = means + to_mean, variances + to_var
        mixed = means.mean(1)
        mixed_var = variances.mean(1) + (means - mixed[:, None]).square().mean(1)
        with torch.no_grad():
            rate = 1 - (1 - self.momentum) ** (len(x) / self.batch_size)
            self.mean.add_(rate * to_mean.mean(0))
            self.var.add_(rate * to_var.mean(0))
        return mixed, mixed_var

    def extra_repr(self) -> str:
        return f"components={self.components}, temperature={self.temperature}, momentum={self.momentum}"


class Balanced(Source):
    """In training each task of the batch has its share, and the running momentum adapts; in eval, what then ran."""

    task: Tensor | None = None
    drift: Tensor | None = None
    eta: Tensor

    def __init__(self, tasks: int, kappa: float):
        super().__init__()
        if not 0 <= kappa <= 1:
            raise ValueError(f"adab2n: kappa lies in [0, 1], got {kappa}")
        self.tasks, self.kappa = tasks, kappa
        self.weight = torch.nn.Parameter(torch.zeros(tasks))
        self.register_buffer("eta", torch.tensor(0.0))

    def bind(self, norm: BatchNorm) -> None:
        if norm.momentum is None:
            raise ValueError("adab2n adapts the momentum of a batch norm, but this one has None")

    def forward(self, x: Tensor, norm: BatchNorm) -> Statistics:
        running_mean, running_var = _there(norm.running_mean), _there(norm.running_var)
        if not self.training:
            return running_mean, running_var
        share, (b, c) = self._shares(x), x.shape[:2]
        mean = share @ x.reshape(b, c, -1).mean(2)
        var = share @ (x - over(x, mean)).square().reshape(b, c, -1).mean(2)
        with torch.no_grad():
            m = norm.momentum or 0.0
            eta = torch.where(self.eta == 0, m**self.kappa, self.eta / (self.eta + (1 - m) ** self.kappa))
            self.eta.copy_(eta)
            running_mean.lerp_(mean.to(running_mean.dtype), eta.to(running_mean.dtype))
            running_var.lerp_(var.to(running_var.dtype), eta.to(running_var.dtype))
        self.drift = (mean - running_mean.clone()).square().mean() + (var - running_var.clone()).square().mean()
        return mean, var

    def _shares(self, x: Tensor) -> Tensor:
        """What each example counts: the share of its task over the number of its examples. [b]"""
        if self.task is None or self.task.shape != x.shape[:1]:
            got = "none" if self.task is None else f"{len(self.task)}"
            raise ValueError(f"adab2n: tell_tasks(model, ids) the tasks of the {len(x)} examples first; got {got}")
        of = F.one_hot(self.task, self.tasks).to(x.dtype)  # [b, tasks]
        n = of.sum(0)
        # Shares are of the tasks in the batch. The authors also count those absent, and shrink mean and variance.
        p = torch.where(n > 0, self.weight.to(x.dtype).exp() + n, 0)
        return of @ (p / p.sum() / n.clamp(min=1))

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}, kappa={self.kappa}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"drift": None}  # it hangs on a graph, which is not copied


class Pooled(Source):
    """The batch's own statistics, and beside them those of all batches so far, as if they had been one."""

    def bind(self, norm: BatchNorm) -> None:
        self.n = 0

    def forward(self, x: Tensor, norm: BatchNorm) -> Statistics:
        mean, var = of_batch(x)
        n = x.numel() // x.shape[1]
        if not n:
            return mean, var
        if not self.n:
            self.mean, self.var = torch.zeros_like(mean), torch.zeros_like(var)
        b = n / (self.n + n)
        far = mean - self.mean
        self.mean, self.var = self.mean + b * far, (1 - b) * self.var + b * var + b * (1 - b) * far.square()
        self.n += n
        return mean, var


def of_batch(x: Tensor) -> Statistics:
    """The mean and biased variance of each channel. x: [b, c, ...]."""
    var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    return mean, var


def _there(t: Tensor | None) -> Tensor:
    assert t is not None
    return t
