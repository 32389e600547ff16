"""Every batch norm of a model takes its statistics from a `Source`, until they are given back."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from etude._held import orphan, refuse_if_held
from etude._method import stamp
from etude.norms._broadcast import over, wide
from etude.norms._norm import Norm

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | Norm
_TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Source(nn.Module):
    """Where a batch norm's statistics come from: ``source(x, norm)`` → mean and variance, each [c] or [b, c].

    x: [b, c, ...], float32 or wider. ``norm`` keeps the running statistics it has learned. Each layer gets a copy of
    the source; ``bind`` lets that copy look at its layer once.
    """

    _role = "norm"
    _affine_only = False
    """Whether the affine of the norms is all that goes on training."""

    def bind(self, norm: BatchNorm) -> None: ...


class Calibrated(nn.Module):
    """A batch norm whose statistics come from a source; its own weight, bias and running statistics stay inside it."""

    _role = "norm"
    axis = 1

    def __init__(self, norm: BatchNorm, source: Source):
        super().__init__()
        self.norm, self.source = norm, source
        self.features = norm.features if isinstance(norm, Norm) else norm.num_features
        self._froze: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.features:
            raise ValueError(f"{self.norm} has {self.features} features on axis 1 but x has shape {tuple(x.shape)}")
        if not len(x):
            return x
        v, w, b = wide(x), self.norm.weight, self.norm.bias
        mean, var = self.source(v, self.norm)
        y = (v - over(x, mean)) * over(x, (var + self.norm.eps).rsqrt())
        y = y if w is None else y * over(x, w)
        return (y if b is None else y + over(x, b)).to(x.dtype)

    def __getattr__(self, name: str) -> Any:
        # What the source cannot do, the layer cannot do.
        return getattr(self.source, name) if name.startswith("_no_") else super().__getattr__(name)


def calibrate(model: nn.Module, source: Source, where: str | None = None) -> list[str]:
    """Let every batch norm of ``model`` take its statistics from a copy of ``source``; returns the names.

    Reached are torch's BatchNorm1d, 2d and 3d and etude's batch_norm, with the running statistics they have learned.
    ``where`` is an fnmatch pattern of module names. None found, and an optimizer that already trains what would freeze
    or that would miss new parameters, are errors. `restore` undoes it.
    """
    if not isinstance(source, Source):
        raise TypeError(f"calibrate takes a source of statistics, such as norms.alpha_bn(); got {source!r}")
    found = batch_norms(model, where)
    made: dict[int, Calibrated] = {}  # a shared layer stays shared
    for norm in found.values():
        if id(norm) not in made:
            own = copy.deepcopy(source).to(norm.running_mean.device if norm.running_mean is not None else None)
            own.bind(norm)
            made[id(norm)] = Calibrated(norm, own).train(norm.training)
    affine = {id(p) for norm in found.values() for p in norm.parameters()}
    frozen = {n: p for n, p in model.named_parameters() if source._affine_only and id(p) not in affine}
    if source._affine_only and not affine:
        raise ValueError(f"{_called(source)} trains the weights and biases of batch norms, but these have none")
    refuse_if_held((p for p in frozen.values() if p.requires_grad), "norms.calibrate")
    if any(True for _ in source.parameters()):
        try:
            refuse_if_held(model.parameters(), "norms.calibrate")
        except ValueError:
            raise ValueError(f"{_called(source)} adds parameters: calibrate before you make the optimizer") from None
    first = next(iter(made.values()))
    first._froze = tuple(n for n, p in frozen.items() if p.requires_grad)
    for p in frozen.values():
        p.requires_grad_(False)
    _put(model, {name: made[id(norm)] for name, norm in found.items()})
    return list(found)


def restore(model: nn.Module) -> list[str]:
    """Give the calibrated batch norms of ``model`` their own statistics back, and what was frozen its gradient."""
    named = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Calibrated)}
    if not named:
        raise ValueError(f"restore found no calibrated batch norm in {type(model).__name__}")
    _put(model, {name: m.norm for name, m in named.items()})
    for m in named.values():
        for name in m._froze:
            model.get_parameter(name).requires_grad_(True)
        orphan(m.source.parameters(), "norms.restore")
    return list(named)


def batch_norms(model: nn.Module, where: str | None = None) -> dict[str, BatchNorm]:
    """The batch norms of ``model`` by name, a shared one under each; none is an error, and so is a calibrated one."""
    if _is_batch_norm(model) or isinstance(model, Calibrated):
        raise ValueError(f"calibrate looks inside a model, but the model is itself a {type(model).__name__}")
    named = dict(model.named_modules(remove_duplicate=False))
    if done := [n for n, m in named.items() if isinstance(m, Calibrated) and (not where or fnmatchcase(n, where))]:
        raise ValueError(f"{', '.join(done[:8])} already calibrated: restore(model) first")
    found = {n: m for n, m in named.items() if _is_batch_norm(m) and (where is None or fnmatchcase(n, where))}
    if not found:
        asked = "batch norms" if where is None else f'batch norms named "{where}"'
        there = ", ".join(sorted({type(m).__name__ for m in named.values()} - {type(model).__name__})) or "nothing"
        raise ValueError(f"calibrate looked for {asked} and found none; the model holds {there}")
    for name, m in found.items():
        if type(m).forward is not nn.BatchNorm2d.forward and not isinstance(m, Norm):
            raise ValueError(f"{name} is a {type(m).__name__}, a batch norm with a forward of its own")
        if m.running_mean is None:
            raise ValueError(f"{name} keeps no running statistics, so there are none to calibrate")
    return found


def _is_batch_norm(m: nn.Module) -> bool:
    return isinstance(m, _TORCHS) or (isinstance(m, Norm) and m.pattern == "b c ... -> c" and m.center)


def _put(model: nn.Module, new: dict[str, Any]) -> None:
    for name, m in new.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, m)


def _called(source: Source) -> str:
    made = stamp(source)
    return made.name if made else type(source).__name__
