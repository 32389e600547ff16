"""Exact conversions: a model that computes the same with cheaper norms, or with fewer of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from etude._method import method
from etude.norms._fold import affine, affine_on, fold_back, fold_forward, matrices_after, matrix_before, resize
from etude.norms._norm import Norm
from etude.norms._stream import Graph, Written
from etude.norms._swap import _twin, layers
from etude.norms._trial import Trial, refuse_optimizers, tried
from etude.norms.named import crms_norm

_PRE_RMS = (
    "Jiang et al. 2023, Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers, "
    "arXiv:2305.14858"
)


@method(_PRE_RMS)
def pre_rms_norm(model: nn.Module, inputs: Any) -> list[str]:
    """LN(x) = RMSNorm(x − mean x): all that is written to the stream is centred, and its norms need not centre.

    ``inputs``: an example batch, by which the model is known. Parameters keep shape and identity, each norm its weight
    and bias; returns the names of the norms. A layer norm that reads something else stays. Training goes on as with
    RMSNorm: what later steps write need not have mean 0. A stream that is read, or written to, by anything but norms,
    matrices, embeddings and biases of its own (a head tied to the embedding) is refused. Before the optimizer is made.
    """
    refuse_optimizers(model, "pre_rms_norm")
    found = _streams(model, inputs)
    with tried(model, inputs) as trial:
        _centre(found, trial)
        for name, (old, new) in found.norms.items():
            trial.put(model, name, _rms(new, new.features, old))
    return [*found.norms]


@method(_PRE_RMS)
def pre_crms_norm(model: nn.Module, inputs: Any) -> list[str]:
    """The stream without its last entry, which is −Σ of the others: its norms are crms_norm, its writers one row less.

    As `pre_rms_norm`, which is its first half. A norm's weight and bias, and the missing entry, are folded into the
    matrices that read it; where something else reads it (the attention of torch, the output), the norm restores them.
    Parameters keep their identity but not their shape.
    """
    refuse_optimizers(model, "pre_crms_norm")
    found = _streams(model, inputs)
    with tried(model, inputs) as trial:
        _centre(found, trial)
        for p, axis in found.leaves.items():
            trial.set(p, "data", p.data.narrow(axis, 0, p.shape[axis] - 1).clone())
            resize(model, p, axis, trial)
        for name, (old, new) in found.norms.items():
            scale, shift = affine(old)
            readers = found.graph.readers(name, -1)
            slim = crms_norm(new.features - 1, eps=new.eps).train(old.training)
            matrices = None if readers is None else matrices_after(model, found.graph, readers, shift, own=True)
            if matrices is None:
                trial.put(model, name, Restored(slim, old))
                continue
            fold_forward(matrices, scale, shift, trial)
            for weight, axis in ((m.weight, m.axis) for m in matrices):
                last = weight.shape[axis] - 1
                trial.set(weight, "data", weight.data.narrow(axis, 0, last) - weight.data.narrow(axis, last, 1))
                resize(model, weight, axis, trial)
            trial.put(model, name, slim)
    return [*found.norms]


def fold(model: nn.Module, inputs: Any, where: str | None = None) -> list[str]:
    """Put what norms multiply and add into the matrices beside them, so that the model computes the same with less.

    The weight and bias of a layer norm or RMSNorm go into the linear layers that read it. A BatchNorm and a
    unified_norm, in eval nothing but a scale and a shift, go into the layer before or after them and are gone: their
    statistics learn no more. ``inputs``: an example batch. ``where``: an fnmatch pattern of module names. Returns the
    names of the norms that could be folded; none is an error, which says why.
    """
    refuse_optimizers(model, "fold")
    norms = {n: m for n, m in _distinct(model).items() if where is None or fnmatchcase(n, where)}
    norms = {n: m for n, m in norms.items() if affine_on(m) is not None}
    graph = Graph(model, inputs, norms)
    plans = {name: _beside(model, graph, name, m) for name, m in norms.items()}
    if not any(plans.values()):
        named = "" if where is None else f" named {where!r}"
        alone = next((f"{n} has no linear layer of its own beside it" for n in plans), f"no norm with a weight{named}")
        raise ValueError(f"fold found nothing to fold in {type(model).__name__}: {alone}")
    with tried(model, inputs) as trial:
        for name, beside in plans.items():
            if beside:
                _, left = affine_on(norms[name]) or (-1, norms[name])
                scale, shift = affine(norms[name])
                beside(scale, shift, trial)
                trial.put(model, name, left.to(scale.device).train(norms[name].training))
    return [name for name, beside in plans.items() if beside]


def _beside(model: nn.Module, graph: Graph, name: str, m: nn.Module) -> Callable[[Tensor, Tensor, Trial], None] | None:
    """What puts a norm's scale and shift into the layers beside it, if they can take them."""
    axis, left = affine_on(m) or (-1, m)
    _, shift = affine(m)
    if isinstance(left, nn.Identity) and (before := matrix_before(model, graph, name, axis, shift)):
        return partial(fold_back, before)
    readers = graph.readers(name, axis)
    matrices = matrices_after(model, graph, readers, shift) if readers else None
    return partial(fold_forward, matrices) if matrices else None


class Restored(nn.Module):
    """weight · [x̂, −Σ x̂] + bias with x̂ = norm(x): a token without its last entry, normalised and with it again."""

    _role = "norm"

    def __init__(self, norm: nn.Module, affine: nn.Module):
        super().__init__()
        self.norm = norm
        self.weight, self.bias = getattr(affine, "weight", None), getattr(affine, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        y = torch.cat([y, -y.sum(-1, keepdim=True)], -1)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


@dataclass
class Streams:
    """The layer norms of a model that read sums of parameters' making, and those parameters."""

    graph: Graph
    norms: dict[str, tuple[nn.Module, Norm]]
    leaves: dict[nn.Parameter, int]


def _streams(model: nn.Module, inputs: Any) -> Streams:
    twins = {n: (m, _twin(m)) for n, m in _distinct(model).items()}
    norms = {n: (m, t) for n, (m, t) in twins.items() if isinstance(t, Norm) and t._route == "layer"}
    if not norms:
        raise ValueError(f"there is no layer norm to convert in {type(model).__name__}")
    graph = Graph(model, inputs, {n: m for n, (m, _) in norms.items()})
    reasons = {name: _reason(graph, name) for name in norms}
    if all(reasons.values()):
        name, why = next(iter(reasons.items()))
        raise ValueError(
            f"no layer norm of {type(model).__name__} reads a stream that can be centred: at {name}, {why}"
        )
    norms = {name: pair for name, pair in norms.items() if not reasons[name]}
    written = Written(graph, dict.fromkeys(norms, -1))
    if leak := written.leak({id(p): n for n, p in model.named_parameters()}):
        raise ValueError(f"{leak}, and that is no norm of the stream that {next(iter(norms))} reads")
    return Streams(graph, norms, written.leaves)


def _distinct(model: nn.Module) -> dict[str, nn.Module]:
    """The norm layers of a model, a shared one once."""
    first = dict(model.named_modules())
    return {name: m for name, m in layers(model).items() if name in first}


def _reason(graph: Graph, name: str) -> str:
    """Why what this norm reads cannot be traced back to parameters, or ""."""
    try:
        Written(graph, {name: -1})
    except ValueError as error:
        return str(error)
    return ""


def _centre(found: Streams, trial: Trial) -> None:
    for p, axis in found.leaves.items():
        exact = p.data.double()
        trial.set(p, "data", (exact - exact.mean(axis, keepdim=True)).to(p.dtype))


def _rms(like: Norm, d: int, old: nn.Module) -> Norm:
    new = Norm("... d -> ...", d, center=False, eps=like.eps, modulation=like.modulation).train(old.training)
    new.weight, new.bias = getattr(old, "weight", None), getattr(old, "bias", None)
    return new
