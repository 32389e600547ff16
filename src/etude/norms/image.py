"""Norms of images: those that are an activation too, and those that keep the phase of the spectrum. x: [b, c, ...]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.norms._affine import Affine, var_mean

_EVONORM = "Liu et al. 2020, Evolving Normalization-Activation Layers, arXiv:2004.02967"
_DAC = (
    "Lee et al. 2023, Decompose, Adjust, Compose: Effective Normalization by Playing with Frequency for Domain "
    "Generalization, arXiv:2303.02328"
)


class EvoNormB0(Affine):
    """x / max(√(var of the batch + eps), v · x + √(var of the image + eps)) · weight + bias, per channel."""

    _shown = ("eps", "momentum")
    running_var: Tensor

    def __init__(self, features: int, eps: float, momentum: float) -> None:
        super().__init__(features, 1, eps)
        self.momentum = momentum
        self.v = nn.Parameter(torch.ones(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        z = self.checked(x, at_least=3)
        var, mean = var_mean(z.flatten(2))
        batch = self._batch(var, mean, z.numel() // self.features) if self.training and x.numel() else self.running_var
        own = self.along(self.v, z) * z + self.along((var + self.eps).sqrt(), z)
        return self.affine(z / torch.maximum(self.along((batch + self.eps).sqrt(), z), own)).to(x.dtype)

    def _batch(self, var: Tensor, mean: Tensor, n: int) -> Tensor:
        """The variance over images and places, [c], from that within the images and that between them."""
        if n == 1:
            raise ValueError("EvoNormB0 needs more than one value per channel in training")
        both = var.mean(0) + mean.var(0, correction=0)
        self.running_var.lerp_((both.detach() * (n / (n - 1))).to(self.running_var.dtype), self.momentum)
        return both


@method(_EVONORM)
def evonorm_b0(d: int, eps: float = 1e-3, momentum: float = 0.1) -> EvoNormB0:
    """x / max(√(batch var + eps), v · x + √(instance var + eps)) · weight + bias: norm and activation in one.

    Per channel; in eval the batch's variance is the running one, the instance's is always its own. No activation
    follows it. x: [b, c, ...].
    """
    return EvoNormB0(d, eps, momentum)


class EvoNormS0(Affine):
    """x · σ(v · x) / √(var of the group + eps) · weight + bias, var over a group of channels of one image."""

    _shown = ("groups", "eps")

    def __init__(self, features: int, groups: int, eps: float) -> None:
        super().__init__(features, 1, eps)
        if features % groups:
            raise ValueError(f"EvoNormS0: {features} features do not divide into {groups} groups")
        self.groups = groups
        self.v = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        z = self.checked(x)
        share = self.features // self.groups
        var, _ = var_mean(z.reshape(len(z), self.groups, share, *z.shape[2:]).flatten(2))
        inverse = (var + self.eps).rsqrt().repeat_interleave(share, 1)
        gated = z * torch.sigmoid(self.along(self.v, z) * z)
        return torch.addcmul(self.along(self.bias, z), gated, self.along(inverse * self.weight, z)).to(x.dtype)


@method(_EVONORM)
def evonorm_s0(d: int, groups: int = 32, eps: float = 1e-5) -> EvoNormS0:
    """x · σ(v · x) / √(group var + eps) · weight + bias: norm and activation in one, each image by itself.

    var over neighbouring channels and all places, as in group_norm. No activation follows it. x: [b, c, ...].
    """
    return EvoNormS0(d, groups, eps)


class PhaseNorm(Affine):
    """Batch norm that leaves the phase of each image's spectrum, channel by channel, as it was.

    A norm with one mean and one scale per channel changes the phase at frequency 0 alone, by the sign of the image's
    mean: so no transform is taken, and where the sign has changed the mean of the normalised image is turned back.
    """

    _shown: tuple[str, ...] = ("eps", "momentum")
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, features: int, eps: float, momentum: float) -> None:
        super().__init__(features, 1, eps)
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        z = self.checked(x, at_least=3)
        means = z.flatten(2).mean(2)
        signed = self.signed(means)
        if self.training:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(x, self.running_mean, self.running_var, None, None, self.training, self.momentum, self.eps)
        y = y.to(z.dtype)
        mean = y.flatten(2).mean(2)
        shift = self.bias + self.weight * (torch.copysign(mean, signed) - mean)
        return torch.addcmul(self.along(shift, z), y, self.along(self.weight, z)).to(x.dtype)

    def signed(self, means: Tensor) -> Tensor:
        """Whose sign is the phase at frequency 0. means of the images: [b, c]."""
        return means


@method(_DAC)
def pcnorm(d: int, eps: float = 1e-5, momentum: float = 0.1) -> PhaseNorm:
    """F⁻¹(|F(batch_norm(x))| · e^{i∠F(x)}) · weight + bias, F over the places of each channel of each image.

    Content is the phase and style the amplitude, say the authors; yet only frequency 0 has another phase in
    batch_norm(x) than in x, so pcnorm is batch_norm(x) with the sign of each channel's mean put back. Their code keeps
    both parts of F from 0 by 1e-5 on the way, which we need not. x: [b, c, ...].
    """
    return PhaseNorm(d, eps, momentum)


class CenteredPhaseNorm(PhaseNorm):
    """The phase is that of x − λ · mean of the batch, λ the first entry of softmax(w / T)."""

    _shown = ("T", "eps", "momentum")

    def __init__(self, features: int, T: float, eps: float, momentum: float) -> None:
        super().__init__(features, eps, momentum)
        self.T = T
        self.w = nn.Parameter(torch.zeros(2))

    def signed(self, means: Tensor) -> Tensor:
        batch = means.mean(0) if self.training else self.running_mean
        return means - torch.softmax(self.w / self.T, 0)[0] * batch


@method(_DAC, note="T: 1e-6 in the authors' code, 1e-4 in a copy of it")
def ccnorm(d: int, T: float = 1e-6, eps: float = 1e-5, momentum: float = 0.1) -> CenteredPhaseNorm:
    """pcnorm whose phase is that of x − λ · mean of the batch, or the running one in eval; λ = softmax(w / T)₁.

    λ is ½ at the start. The phase at frequency 0 is 0 or π, so no gradient ever reaches w, here and in the authors'
    code alike: λ stays where it is put. x: [b, c, ...].
    """
    return CenteredPhaseNorm(d, T, eps, momentum)


class SpectrumNorm(Affine):
    """a · instance_norm(x) + (1 − a) · x, a the first entry of softmax(h / T)."""

    _shown = ("T", "eps")

    def __init__(self, features: int, T: float, eps: float) -> None:
        super().__init__(features, 1, eps)
        self.T = T
        self.h = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        z = self.checked(x, at_least=3)
        y = torch.group_norm(z, self.features, None, None, self.eps)
        return self.affine(torch.lerp(z, y, torch.softmax(self.h / self.T, 0)[0].to(z.dtype))).to(x.dtype)


@method(_DAC)
def scnorm(d: int, T: float = 0.1, eps: float = 1e-5) -> SpectrumNorm:
    """F⁻¹((a |F(instance_norm(x))| + (1 − a) |F(x)|) · e^{i∠F(x)}) · weight + bias, a = softmax(h / T)₁, h learned.

    Both spectra have the phase of x, so this is a · instance_norm(x) + (1 − a) · x; a starts at ½. x: [b, c, ...].
    """
    return SpectrumNorm(d, T, eps)
