"""Conditional norms: scale and shift are supplied by a style, a label map, a mask or a coordinate."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.norms._broadcast import over, wide
from etude.norms._norm import Modulation, Norm

Statistics = Literal["batch", "instance"]


class Conditional(nn.Module):
    """norm(x) · scale + shift with (scale, shift) = supplier(x, condition), both broadcastable to x."""

    _role = "norm"

    def __init__(self, norm: nn.Module, supplier: nn.Module, features: int, axis: int = 1, ndim: int = 3):
        super().__init__()
        self.norm, self.supplier, self.features, self.axis, self._ndim = norm, supplier, features, axis, ndim

    def forward(self, x: Tensor, condition: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if not len(x):
            return x
        scale, shift = self.supplier(x, condition)
        y: Tensor = self.norm(x) * scale + shift
        return y.to(x.dtype)


class LabelMap(nn.Module):
    """A label map, resized to x by nearest neighbour, through two convolutions: scale 1 + gamma and shift beta."""

    def __init__(self, d: int, labels: int, hidden: int, kernel_size: int):
        super().__init__()
        self.shared = nn.Conv2d(labels, hidden, kernel_size, padding="same")
        self.gamma = nn.Conv2d(hidden, d, kernel_size, padding="same")
        self.beta = nn.Conv2d(hidden, d, kernel_size, padding="same")

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        resized = F.interpolate(labels.to(self.shared.weight.dtype), size=x.shape[2:], mode="nearest")
        hidden = F.relu(self.shared(resized))
        return 1 + self.gamma(hidden), self.beta(hidden)


class Moments(nn.Module):
    """The style's own deviation and mean, per example and channel. y: [b, c, ...]."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if y.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"adain: x has shape {tuple(x.shape)}, its style {tuple(y.shape)}: [b, c] must be the same"
            )
        var, mean = torch.var_mean(wide(y).flatten(2), 2, correction=0)
        return over(x, (var + self.eps).sqrt()), over(x, mean)


class Given(nn.Module):
    """Scale and shift as they come, each [b, c]."""

    def forward(self, x: Tensor, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if len(given) != 2 or any(t.shape != x.shape[:2] for t in given):
            shapes = [tuple(t.shape) for t in given]
            raise ValueError(f"the condition is (scale, shift), each {list(x.shape[:2])}; got shapes {shapes}")
        return over(x, given[0]), over(x, given[1])


class Grid(nn.Module):
    """Two grids, of scale and of shift, one number a node, interpolated at each point's coordinate."""

    _role = "norm"

    def __init__(self, *nodes: int):
        super().__init__()
        if len(nodes) not in (1, 2):
            raise ValueError(f"a grid has one or two axes, got {nodes}")
        self.nodes = nodes
        self.scale = nn.Parameter(torch.ones(nodes))
        self.shift = nn.Parameter(torch.zeros(nodes))

    def forward(self, x: Tensor, coordinate: Tensor) -> tuple[Tensor, Tensor]:
        n = len(self.nodes)
        if coordinate.shape != (*x.shape[:-1], n):
            raise ValueError(
                f"x of shape {tuple(x.shape)} needs coordinates of shape {(*x.shape[:-1], n)} for a grid of {n} axes; "
                f"got {tuple(coordinate.shape)}"
            )
        grid = torch.stack([wide(self.scale), wide(self.shift)]).view(1, 2, -1, self.nodes[-1])
        at = coordinate.to(grid.dtype).reshape(1, -1, 1, n)
        at = at if n == 2 else torch.cat([at, torch.zeros_like(at)], -1)
        found = F.grid_sample(grid, at, padding_mode="border", align_corners=True)
        scale, shift = found.view(2, *x.shape[:-1], 1)
        return scale, shift

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.nodes))


class LayerInstance(nn.Module):
    """rho · instance norm + (1 − rho) · layer norm over channels and positions; rho per channel. x: [b, c, ...]."""

    _role = "norm"
    axis = 1

    def __init__(self, features: int, rho: float, eps: float, modulation: Modulation = "none"):
        super().__init__()
        self.features = features
        self.instance = Norm("b c ... -> b c", features, eps=eps, modulation="none")
        self.layer = Norm("b (g c) ... -> b g", features, eps=eps, modulation="none", g=1)
        self.rho = nn.Parameter(torch.full((features,), float(rho)))
        self.weight = None if modulation == "none" else nn.Parameter(torch.ones(features))
        self.bias = None if modulation == "none" else nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        rho = over(x, self.rho)
        y: Tensor = rho * self.instance(x) + (1 - rho) * self.layer(x)
        if self.weight is not None and self.bias is not None:
            y = y * over(x, self.weight) + over(x, self.bias)
        return y.to(x.dtype)

    @torch.no_grad()
    def clip_(self) -> None:
        """Put rho back into [0, 1], as the paper does after every step of the optimizer."""
        self.rho.clamp_(0, 1)


class RegionNorm(nn.Module):
    """Each of the two regions of a 0/1 mask by statistics of its own, then by a scale and shift of its own."""

    _role = "norm"
    _ndim = 4
    axis = 1

    def __init__(self, features: int, eps: float, statistics: Statistics):
        super().__init__()
        self.features, self.eps, self.statistics = features, eps, statistics
        self.weight = nn.Parameter(torch.ones(2, features))
        self.bias = nn.Parameter(torch.zeros(2, features))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.ndim != 4 or mask.shape[:2] != (len(x), 1):
            raise ValueError(f"x of shape {tuple(x.shape)} needs a mask [b, 1, h, w]; got {tuple(mask.shape)}")
        inside = F.interpolate(mask.detach().to(wide(x).dtype), size=x.shape[2:], mode="nearest")
        y = _by_region(x, inside, self.eps, self.statistics)
        pick = torch.cat([inside, 1 - inside], 1)
        scale, shift = (torch.einsum("brhw,rc->bchw", pick, p.to(pick.dtype)) for p in (self.weight, self.bias))
        return (y * scale + shift).to(x.dtype)


class LearnableRegionNorm(nn.Module):
    """Region norm that finds its mask: where a convolution of the channels' mean and maximum exceeds the threshold."""

    _role = "norm"
    _ndim = 4
    axis = 1

    def __init__(self, features: int, threshold: float, kernel_size: int, eps: float, statistics: Statistics):
        super().__init__()
        self.features, self.threshold, self.eps, self.statistics = features, threshold, eps, statistics
        self.importance = nn.Conv2d(2, 1, kernel_size, padding="same", bias=False)
        self.gamma = nn.Conv2d(1, 1, kernel_size, padding="same")
        self.beta = nn.Conv2d(1, 1, kernel_size, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1).to(self.gamma.weight.dtype)
        soft = torch.sigmoid(self.importance(seen))
        y = _by_region(x, (soft.detach() >= self.threshold).to(wide(x).dtype), self.eps, self.statistics)
        modulated: Tensor = y * (1 + self.gamma(soft)) + self.beta(soft)
        return modulated.to(x.dtype)


@method("Park et al. 2019, Semantic Image Synthesis with Spatially-Adaptive Normalization, arXiv:1903.07291")
def spade(
    d: int, labels: int, hidden: int = 128, kernel_size: int = 3, statistics: Statistics = "batch", eps: float = 1e-5
) -> Conditional:
    """x̂ · (1 + gamma(m)) + beta(m), gamma and beta at each pixel by convolutions of a label map m.

    x: [b, d, h, w], m: [b, labels, h', w'], resized to x. The paper writes gamma x̂ + beta; 1 + gamma is its code's.
    """
    norm = (
        Norm("b c ... -> c", d, eps=eps, modulation="none", momentum=0.1)
        if statistics == "batch"
        else Norm("b c ... -> b c", d, eps=eps, modulation="none")
    )
    return Conditional(norm, LabelMap(d, labels, hidden, kernel_size), d, ndim=4)


@method(
    "Huang & Belongie 2017, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, "
    "arXiv:1703.06868"
)
def adain(d: int, eps: float = 1e-5) -> Conditional:
    """σ(y) (x − μ(x)) / σ(x) + μ(y), σ = √(var + eps): x takes the statistics of a style y. x, y: [b, d, ...]."""
    return Conditional(Norm("b c ... -> b c", d, eps=eps, modulation="none"), Moments(eps), d)


_UGATIT = (
    "Kim et al. 2019, U-GAT-IT: Unsupervised Generative Attentional Networks with Adaptive Layer-Instance "
    "Normalization for Image-to-Image Translation, arXiv:1907.10830"
)


@method(_UGATIT)
def adalin(d: int, rho: float = 0.9, eps: float = 1e-5) -> Conditional:
    """(rho x̂_instance + (1 − rho) x̂_layer) · gamma + beta, with gamma and beta given for each example.

    x: [b, d, ...], gamma and beta: [b, d]. rho is learned per channel, here its start. The paper clips it to
    [0, 1] after every step: ``optimizer.register_step_post_hook(lambda *_: layer.norm.clip_())``.
    """
    return Conditional(LayerInstance(d, rho, eps), Given(), d)


@method(_UGATIT)
def lin(d: int, rho: float = 0.0, eps: float = 1e-5) -> LayerInstance:
    """(rho x̂_instance + (1 − rho) x̂_layer) · weight + bias; rho is to be clipped as in adalin. x: [b, d, ...]."""
    return LayerInstance(d, rho, eps, "scale and shift")


@method("Lee et al. 2023, Coordinate-Aware Modulation for Neural Fields, arXiv:2311.14993")
def coordinate_aware_modulation(d: int, grid: tuple[int, ...] = (32, 32), eps: float = 1e-5) -> Conditional:
    """gamma(p) x̂ + beta(p): x̂ over the features of a point, gamma and beta interpolated from grids at its coordinate p.

    x: [..., d], p: [..., len(grid)] in [−1, 1], clamped at the border. As in ``F.grid_sample``, the first number of p
    runs along the last axis of the grid, and −1 and 1 are its outermost nodes.
    """
    return Conditional(Norm("... d -> ...", d, eps=eps, modulation="none"), Grid(*grid), d, axis=-1)


_REGIONS = "Yu et al. 2019, Region Normalization for Image Inpainting, arXiv:1911.10375"


@method(_REGIONS)
def region_norm(d: int, eps: float = 1e-5, statistics: Statistics = "batch") -> RegionNorm:
    """(x − μ_r) / √(var_r + eps) · weight_r + bias_r, r the region of a 0/1 mask: RN-B.

    x: [b, d, h, w], mask: [b, 1, h', w'], resized to x. Statistics are pooled over the batch
    as in the authors' code, of which two accidents are left out: it divides eps by the region's share of the pixels,
    and adds both biases to every pixel.
    """
    return RegionNorm(d, eps, statistics)


@method(_REGIONS)
def learnable_region_norm(
    d: int, threshold: float = 0.8, kernel_size: int = 7, eps: float = 1e-5, statistics: Statistics = "batch"
) -> LearnableRegionNorm:
    """x̂_r · (1 + gamma(s)) + beta(s), s = σ(conv[mean_c x, max_c x]), r = s ≥ threshold: RN-L. x: [b, d, h, w]."""
    return LearnableRegionNorm(d, threshold, kernel_size, eps, statistics)


def _by_region(x: Tensor, inside: Tensor, eps: float, statistics: Statistics) -> Tensor:
    """x̂ of each region by its own mean and variance; a region without a pixel has neither. inside: [b, 1, h, w]."""
    x, axes = wide(x), (2, 3) if statistics == "instance" else (0, 2, 3)
    parts = []
    for region in (inside, 1 - inside):
        n = region.sum(axes, keepdim=True).clamp(min=1)
        centred = (x - (x * region).sum(axes, keepdim=True) / n) * region
        parts.append(centred * (centred.square().sum(axes, keepdim=True) / n + eps).rsqrt())
    return parts[0] + parts[1]
