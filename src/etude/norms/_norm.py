"""One norm: a pattern says which axes share statistics, the modulation what is learned after them."""

from __future__ import annotations

import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude.norms._kernels import rms

Modulation = Literal["scale and shift", "scale", "none"]


class Norm(nn.Module):
    """x̂ = (x − mean) / √(var + eps) · weight + bias, statistics over the axes that the pattern drops.

    ``Norm("b (g c) h w -> b g", 64, g=8)``: left the axes of x, right those that keep statistics of their own; ``...``
    is any number of axes. The axis that holds the features, and so weight and bias, is the one called ``c`` or ``d``.
    With ``center=False`` var is the mean square. ``momentum`` keeps running averages for eval; without it the
    statistics always come from x.
    """

    _role = "norm"
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        pattern: str,
        features: int,
        center: bool = True,
        eps: float = 1e-5,
        modulation: Modulation = "scale and shift",
        momentum: float | None = None,
        **sizes: int,
    ):
        super().__init__()
        self.pattern, self.features, self.center, self.eps = pattern, features, center, eps
        self.modulation, self.momentum, self.sizes = modulation, momentum, sizes
        self._axes, self._kept = _parse(pattern)
        self._check_sizes()
        at = self._feature_axis()
        self.axis = at - len(self._axes) if ("...",) in self._axes[:at] else at
        self._route = self._fused_route(at)
        if modulation not in ("scale and shift", "scale", "none"):
            raise ValueError(f'{self._called}: modulation must be "scale and shift", "scale" or "none"')
        self.weight = nn.Parameter(torch.ones(features)) if modulation != "none" else None
        self.bias = nn.Parameter(torch.zeros(features)) if modulation == "scale and shift" else None
        if momentum is not None and self._kept != set(self._axes[at]):
            raise ValueError(
                f"{self._called}: running averages need a pattern that keeps the feature axis and no other"
            )
        running = momentum is not None
        self.register_buffer("running_mean", torch.zeros(features) if running and center else None)
        self.register_buffer("running_var", torch.ones(features) if running else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0) if running else None)

    def forward(self, x: Tensor) -> Tensor:
        self._check_shape(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        w, b, d = self.weight, self.bias, self.features
        if self._route == "layer":
            return F.layer_norm(x, (d,), w, b, self.eps)
        if self._route == "rms":
            y = rms(x, x.new_ones(d) if w is None else w, self.eps)
            return y if b is None else y + b
        if self._route == "batch":
            fresh = self.training or self.momentum is None
            return F.batch_norm(x, self.running_mean, self.running_var, w, b, fresh, self.momentum or 0.0, self.eps)
        if self._route == "instance" and x.numel():  # torch's kernel does not take an empty batch
            return F.instance_norm(x, weight=w, bias=b, eps=self.eps)
        if self._route == "group":
            return F.group_norm(x, self.sizes[self._axes[1][0]], w, b, self.eps)
        return self.by_pattern(x)

    def by_pattern(self, x: Tensor) -> Tensor:
        """The same x̂ written out from the pattern: what the fused kernels must equal, and the route of the rest."""
        self._check_shape(x)
        names, shape = self._expand(x)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        split = wide.reshape(shape)
        over = [i for i, name in enumerate(names) if name not in self._kept]
        if not over:
            raise ValueError(f"{self._called} leaves no axis to average over when x has shape {tuple(x.shape)}")
        if self.training or self.momentum is None:
            mean = split.mean(over, keepdim=True) if self.center else None
            centred = split if mean is None else split - mean
            var = centred.square().mean(over, keepdim=True)
            self._remember(mean, var, split.numel() // max(1, var.numel()))
        else:
            kept = [n if name in self._kept else 1 for name, n in zip(names, shape, strict=True)]
            centred = split if self.running_mean is None else split - self.running_mean.view(kept)
            var = _there(self.running_var).view(kept)
        y = (centred * (var + self.eps).rsqrt()).reshape(x.shape)
        along = [1] * x.ndim
        along[self.axis] = self.features
        y = y if self.weight is None else y * self.weight.view(along)
        y = y if self.bias is None else y + self.bias.view(along)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        rest = [f"{k}={v}" for k, v in self.sizes.items()]
        rest += ["center=False"] * (not self.center) + [f"eps={self.eps}"]
        rest += [f'modulation="{self.modulation}"'] * (self.modulation != "scale and shift")
        rest += [f"momentum={self.momentum}"] * (self.momentum is not None)
        return ", ".join([f'"{self.pattern}"', str(self.features), *rest])

    @property
    def _called(self) -> str:
        return f'Norm("{self.pattern}")'

    def _remember(self, mean: Tensor | None, var: Tensor, n: int) -> None:
        if self.momentum is None:
            return
        if n == 1:
            raise ValueError(f"{self._called} needs more than one value per statistic in training")
        with torch.no_grad():
            if mean is not None:
                _there(self.running_mean).lerp_(mean.flatten(), self.momentum)
            # As torch: the running variance is the unbiased one; a mean square has no such correction.
            _there(self.running_var).lerp_(var.flatten() * (n / (n - 1) if self.center else 1.0), self.momentum)

    def _expand(self, x: Tensor) -> tuple[list[str], list[int]]:
        """One name and one size for each axis of x once its composed axes are split."""
        names: list[str] = []
        shape: list[int] = []
        axis = 0
        for group in self._axes:
            if group == ("...",):
                more = x.ndim - len(self._axes) + 1
                names += ["..."] * more
                shape += x.shape[axis : axis + more]
                axis += more
            else:
                names += group
                shape += [self.sizes.get(name, -1) for name in group] if len(group) > 1 else [x.shape[axis]]
                if len(group) > 1 and -1 in shape:
                    known = torch.Size(n for n in shape[-len(group) :] if n != -1).numel()
                    shape[shape.index(-1)] = x.shape[axis] // known
                axis += 1
        return names, shape

    def _check_shape(self, x: Tensor) -> None:
        any_number = ("...",) in self._axes
        if x.ndim < len(self._axes) - 1 if any_number else x.ndim != len(self._axes):
            at_least = "at least " if any_number else ""
            named = len(self._axes) - any_number
            raise ValueError(f"{self._called} names {at_least}{named} axes but x has shape {tuple(x.shape)}")
        if x.shape[self.axis] != self.features:
            raise ValueError(
                f"{self._called} has {self.features} features on axis {self.axis} but x has shape {tuple(x.shape)}"
            )

    def _check_sizes(self) -> None:
        """Each composed axis has exactly one size left to infer, and nothing else is given a size."""
        composed = [group for group in self._axes if len(group) > 1]
        inner = {name for group in composed for name in group}
        if unknown := sorted(set(self.sizes) - inner):
            raise TypeError(
                f"{self._called} got a size for {', '.join(unknown)}, which is no part of a composed axis (x y)"
            )
        for group in composed:
            if len(open_ := [name for name in group if name not in self.sizes]) != 1:
                raise ValueError(f"{self._called}: give a size to all but one of ({' '.join(group)}); open: {open_}")
            known = torch.Size(self.sizes.get(name, 1) for name in group).numel()
            if {"c", "d"} & set(group) and (known < 1 or self.features % known):
                raise ValueError(f"{self._called}: {self.features} features do not divide into {known} groups")

    def _feature_axis(self) -> int:
        found = [i for i, group in enumerate(self._axes) if {"c", "d"} & set(group)]
        if len(found) != 1:
            raise ValueError(f"{self._called}: exactly one axis, that of the features, must be called c or d")
        return found[0]

    def _fused_route(self, at: int) -> str:
        """Which torch kernel computes this pattern, or none."""
        group, others = self._axes[at], [g for i, g in enumerate(self._axes) if i != at]
        first, rest = others[0] if others else (), others[1:]
        kept = [set(g) <= self._kept for g in others]
        if any(len(g) > 1 for g in others):
            return "pattern"
        if at == len(self._axes) - 1 and all(kept) and not set(group) & self._kept:
            return "layer" if self.center else "rms"
        if at != 1 or not self.center or first == ("...",):
            return "pattern"
        if len(group) == 1 and self._kept == set(group):
            return "batch"
        if rest and self._kept == {*first, *group} and len(group) == 1:
            return "instance"
        if len(group) == 2 and self._kept == {*first, group[0]} and group[0] in self.sizes:
            return "group"
        return "pattern"


def _parse(pattern: str) -> tuple[tuple[tuple[str, ...], ...], frozenset[str]]:
    """The axes left of the arrow, composed ones as tuples of several names, and the names right of it."""
    left, arrow, right = pattern.partition("->")
    token = r"\(\s*[a-z]\w*(?:\s+[a-z]\w*)+\s*\)|\.\.\.|[a-z]\w*"
    axes = tuple(tuple(re.findall(r"\.\.\.|\w+", t)) for t in re.findall(token, left))
    names, kept = [name for group in axes for name in group], right.split()
    if not arrow or not axes or re.sub(token, "", left).strip() or len(set(names)) < len(names):
        raise ValueError(f'Norm pattern "{pattern}" must read like "b t d -> b t", each axis named once')
    if strange := [name for name in kept if name not in names]:
        raise ValueError(f'Norm pattern "{pattern}" keeps {" ".join(strange)}, which is not left of the arrow')
    return axes, frozenset(kept)


def _there(t: Tensor | None) -> Tensor:
    assert t is not None
    return t
