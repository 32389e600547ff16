"""Norms that normalise by what they remember of earlier batches, with the backward passes of their papers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from etude._method import method
from etude.norms._affine import Affine, var_mean
from etude.norms._kernels import rms
from etude.norms._ruled import Pull, Ruled, geometric, mean_square, recur, token_mean

ErrorGuard = Literal["layer scaling", "clamping"]


class _Remembering(Affine):
    """In training backward follows the paper's rule and remembers; eval is a fixed map of what is remembered."""

    @property
    def _no_gradcheck(self) -> str:
        return "in training the gradient is the paper's, not the derivative" if self.training else ""


class OnlineNorm(_Remembering):
    """guard(weight · (x − mean) / √(var + eps) + bias), statistics of all samples before this one. x: [b, d, ...]."""

    _shown = ("alpha_fwd", "alpha_bkw", "ecm", "clamp_val", "eps")
    running_mean: Tensor
    running_var: Tensor
    error_mean: Tensor
    error_scale: Tensor

    def __init__(
        self, features: int, alpha_fwd: float, alpha_bkw: float, ecm: ErrorGuard, clamp_val: float, eps: float
    ) -> None:
        super().__init__(features, 1, eps)
        if ecm not in ("layer scaling", "clamping"):
            raise ValueError(f'OnlineNorm: ecm must be "layer scaling" or "clamping", not {ecm!r}')
        self.alpha_fwd, self.alpha_bkw, self.ecm, self.clamp_val = alpha_fwd, alpha_bkw, ecm, clamp_val
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("error_mean", torch.zeros(features))
        self.register_buffer("error_scale", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        v = self.checked(x)
        if self.training and x.numel():
            z = self._stream(v.flatten(2) if v.ndim > 2 else v.unsqueeze(-1)).view(v.shape)
        else:
            z = (v - self.along(self.running_mean, v)) * self.along((self.running_var + self.eps).rsqrt(), v)
        y = self.affine(z)
        if self.ecm == "clamping":
            return y.clamp(-self.clamp_val, self.clamp_val).to(x.dtype)
        flat = y.flatten(1)
        return rms(flat, flat.new_ones(flat.shape[1]), self.eps).view(y.shape).to(x.dtype)

    def _stream(self, v: Tensor) -> Tensor:
        """v: [b, d, n], the samples in the order in which they come."""
        with torch.no_grad():
            a = self.alpha_fwd
            var, mean = var_mean(v)
            means = recur(a, (1 - a) * mean, self.running_mean)
            new = var + a * (mean - means[:-1]).square()
            variances = recur(a, (1 - a) * new, self.running_var)
            self.running_mean.copy_(means[-1])
            self.running_var.copy_(variances[-1])
            inverse = (variances[:-1] + self.eps).rsqrt()
        z: Tensor = Ruled.apply(v, means[:-1, :, None], inverse[..., None], self._control)  # type: ignore[no-untyped-call]
        return z

    def _control(self, g: Tensor, z: Tensor, inverse: Tensor) -> Tensor:
        """The gradient less what has gathered of it along z, then along 1: on average it is orthogonal to both."""
        s = 1 - self.alpha_bkw
        along_z = recur(1 - s * z.square().mean(2), (g * z).mean(2), self.error_scale)
        g = (g - s * along_z[:-1, :, None] * z) * inverse
        along_1 = recur(self.alpha_bkw, g.mean(2), self.error_mean)
        self.error_scale.copy_(along_z[-1])
        self.error_mean.copy_(along_1[-1])
        return g - s * along_1[:-1, :, None]


@method("Chiley et al. 2019, Online Normalization for Training Neural Networks, arXiv:1905.05894")
def online_norm(
    d: int,
    alpha_fwd: float = 0.999,
    alpha_bkw: float = 0.99,
    ecm: ErrorGuard = "layer scaling",
    clamp_val: float = 5.0,
    eps: float = 1e-5,
) -> OnlineNorm:
    """weight · (x − mean) / √(var + eps) + bias by decaying averages over the samples before this one. x: [b, d, ...].

    The batch is a stream: each sample moves the averages that the next one meets. Backward keeps what the gradients
    have summed to along x̂ and along 1, and takes (1 − alpha_bkw) of it off. ``ecm`` guards against averages that lag:
    each sample is divided by its root mean square, as in the paper, or clamped at ±clamp_val, as the authors' code does
    unless told otherwise. Samples of one value per channel have no variance of their own.
    """
    return OnlineNorm(d, alpha_fwd, alpha_bkw, ecm, clamp_val, eps)


class PowerNorm(_Remembering):
    """weight · x / √(running mean x² + eps) + bias, x first divided by the rms of each token. x: [..., d]."""

    _shown = ("alpha_fwd", "alpha_bkw", "warmup_iters", "groups", "eps")
    running_square: Tensor
    error: Tensor
    steps: Tensor

    def __init__(
        self, features: int, alpha_fwd: float, alpha_bkw: float, warmup_iters: int, groups: int, eps: float
    ) -> None:
        super().__init__(features, -1, eps)
        if features % groups:
            raise ValueError(f"PowerNorm: {features} features do not divide into {groups} groups")
        self.alpha_fwd, self.alpha_bkw, self.warmup_iters, self.groups = alpha_fwd, alpha_bkw, warmup_iters, groups
        self.register_buffer("running_square", torch.ones(features))
        self.register_buffer("error", torch.zeros(features))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """``padding``: [...], True at the tokens that are to stay out of the statistics."""
        v = self.checked(x)
        split = v.reshape(*v.shape[:-1], self.groups, self.features // self.groups)
        v = rms(split, split.new_ones(split.shape[-1]), self.eps).flatten(-2)
        if self.training and x.numel():
            v = Ruled.apply(v, None, self._remember(v.detach(), padding), self._project)  # type: ignore[no-untyped-call]
        else:
            v = v * (self.running_square + self.eps).rsqrt()
        return self.affine(v).to(x.dtype)

    @torch.no_grad()
    def _remember(self, v: Tensor, padding: Tensor | None) -> Tensor:
        """1 / √(what this step divides by), [d]."""
        now, before = mean_square(v, padding), self.running_square
        t = self.steps.add_(1)
        inverse = (torch.where(t <= self.warmup_iters, now, before) + self.eps).rsqrt()
        # In warm-up the authors' code takes the cumulative average and then the decaying one of that.
        averaged = torch.where(t < self.warmup_iters, before + (now - before) / t, before)
        self.running_square.copy_(self.alpha_fwd * averaged + (1 - self.alpha_fwd) * now)
        return inverse

    def _project(self, g: Tensor, z: Tensor, inverse: Tensor) -> Tensor:
        g = g - (1 - self.alpha_bkw) * self.error * z
        self.error.add_(token_mean(g * z))
        return g * inverse


@method("Shen et al. 2020, PowerNorm: Rethinking Batch Normalization in Transformers, arXiv:2003.07845")
def power_norm(
    d: int,
    alpha_fwd: float = 0.9,
    alpha_bkw: float = 0.9,
    warmup_iters: int = 10_000,
    groups: int = 1,
    eps: float = 1e-5,
) -> PowerNorm:
    """weight · x / √(running mean x² over batch and tokens + eps) + bias: batch norm that does not centre. x: [..., d].

    As the authors' code does, each token is first divided by its rms (over each of ``groups``), and for
    ``warmup_iters`` steps the batch's own mean square stands in for the running one. Backward divides by the root that
    forward divided by, as the paper says; the authors' code takes the current batch's. In eval a fixed scale per
    channel after the token's rms.
    """
    return PowerNorm(d, alpha_fwd, alpha_bkw, warmup_iters, groups, eps)


class UnifiedNorm(_Remembering):
    """weight · x / √(v + eps) + bias, v the geometric mean of x² over the last few batches. x: [..., d]."""

    _shown = ("window_size", "warmup_iters", "outlier_filtration", "momentum", "eps")
    running_square: Tensor
    window: Tensor
    gradients: Tensor
    gradient: Tensor
    steps: Tensor

    def __init__(
        self, features: int, window_size: int, warmup_iters: int, outlier_filtration: bool, momentum: float, eps: float
    ) -> None:
        super().__init__(features, -1, eps)
        if window_size < 1:
            raise ValueError(f"UnifiedNorm: a window of {window_size} batches is empty; window_size is 1 or more")
        self.window_size, self.warmup_iters, self.momentum = window_size, warmup_iters, momentum
        self.outlier_filtration = outlier_filtration
        self.register_buffer("running_square", torch.ones(features))
        self.register_buffer("window", torch.zeros(window_size, features))
        self.register_buffer("gradients", torch.zeros(window_size, features))
        self.register_buffer("gradient", torch.zeros(features))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """``padding``: [...], True at the tokens that are to stay out of the statistics."""
        v = self.checked(x)
        if not (self.training and x.numel()):
            return self.affine(v * (self.running_square + self.eps).rsqrt()).to(x.dtype)
        inverse, ratio, pull = self._remember(v.detach(), padding)
        y: Tensor = self.weight * Ruled.apply(v, None, inverse, pull)  # type: ignore[no-untyped-call]
        if y.requires_grad:
            y.register_hook(lambda g: g * ratio)  # type: ignore[no-untyped-call]  # not the gradient of bias
        return (y + self.bias).to(x.dtype)

    @torch.no_grad()
    def _remember(self, v: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Pull]:
        """1 / √(what this step divides by), how much larger that is than the running one, and the rule of backward."""
        now, before = mean_square(v, padding), self.running_square.to(v.dtype)
        t, m = self.steps.add_(1).clone(), self.window_size
        here = torch.arange(m, device=v.device)[:, None] == t % m
        alone = torch.tensor(m == 1, device=v.device)
        spread = self.window.sqrt().var() if self.outlier_filtration and self.window.numel() > 1 else None
        self.window.copy_(torch.where(here, now, self.window))
        if spread is not None:
            far = self.window.mean(0) - geometric(self.window) > m * spread
            alone = alone | (far.any() & (t >= self.warmup_iters))
            self.window.copy_(torch.where(here & alone, before, self.window))
        early = (t <= m) | (t < self.warmup_iters) | alone
        v2 = torch.where(early, now, geometric(self.window))
        ratio = ((v2 + self.eps) / (before + self.eps)).sqrt().clamp(0.2, 5.0)
        ratio = torch.where((t <= max(1000, self.warmup_iters)) | alone, 1.0, ratio)
        self.running_square.copy_(self.momentum * before + (1 - self.momentum) * v2)

        def pull(g: Tensor, z: Tensor, inverse: Tensor) -> Tensor:
            p, kept = token_mean(g * z), self.gradient.to(g.dtype)
            self.gradients.copy_(torch.where(here, torch.where(alone, kept, p), self.gradients))
            recent = torch.where(early, p, self.gradients.mean(0))
            smooth = self.momentum * kept + (1 - self.momentum) * recent
            self.gradient.copy_(smooth)
            return (g - torch.where(alone, recent, smooth) * z) * inverse

        return (v2 + self.eps).rsqrt(), ratio, pull


@method("Yang et al. 2022, Unified Normalization for Accelerating and Stabilizing Transformers, arXiv:2208.01313")
def unified_norm(
    d: int,
    window_size: int = 4,
    warmup_iters: int = 4000,
    outlier_filtration: bool = False,
    momentum: float = 0.9,
    eps: float = 1e-5,
) -> UnifiedNorm:
    """weight · x / √(v + eps) + bias, v the geometric mean over ``window_size`` batches of mean x². x: [..., d].

    Until the window is full, for ``warmup_iters`` steps, and when ``outlier_filtration`` (advised for images, not for
    text) finds a batch whose arithmetic mean lies far above the geometric one, v is the batch's own. Backward smooths
    the gradient's part along x̂ over as many batches, then with ``momentum``, the weight of the old value; from step
    1000 on it makes up for the change of v. In eval a fixed scale per channel, which folds into the next linear.
    """
    return UnifiedNorm(d, window_size, warmup_iters, outlier_filtration, momentum, eps)
