"""Where the statistics of a model's batch norms come from: recomputed, mixed, matched, and given back.

``calibrate(model, source)`` puts a source into every batch norm, ``restore(model)`` takes it out again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.norms._calibrate import Source, batch_norms, calibrate, restore
from etude.norms._sources import Balanced, BatchStatistics, Mixed, Pooled, Unmixed


@method("Wang et al. 2021, Tent: Fully Test-time Adaptation by Entropy Minimization, arXiv:2006.10726")
def tent() -> Source:
    """Statistics of the test batch itself, and only the norms' weight and bias train, on the predictions' entropy.

    ``calibrate(model, tent())`` freezes the rest. Then for each batch: ``logits = model(x)``,
    ``entropy(logits).mean().backward()``, a step of an optimizer made from the model; the logits are the prediction.
    """
    return BatchStatistics()


def entropy(logits: Tensor) -> Tensor:
    """−Σ p log p with p = softmax(logits), in nats, one value per example: what Tent lowers. logits: [b, k, ...]."""
    log_p = F.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1)


@method(
    "You, Li and Zhao 2021, Test-time Batch Statistics Calibration for Covariate Shift, arXiv:2110.04065",
    note="no value of the paper could be read; .9 is what others use for it on single examples",
)
def alpha_bn(source_weight: float = 0.9) -> Source:
    """μ = a μ_source + (1 − a) μ_batch, and so the variance, a = source_weight; without training."""
    return Mixed(source_weight)


@method(
    "Tomar et al. 2024, Un-Mixing Test-Time Normalization Statistics: Combatting Label Temporal Correlation, "
    "arXiv:2401.08328",
    note="128 components for streams of mixed domains; batch_size 16 for ImageNet-C",
)
def unmix_tns(
    components: int = 16, temperature: float = 0.07, alpha: float = 0.5, momentum: float = 0.1, batch_size: int = 64
) -> Source:
    """Statistics of an example: a mixture of K components, each first moved to it by softmax(cos(μ, μ_k)/temperature).

    The components start around the source statistics, ``alpha`` of the variance among them, and follow the stream at
    the rate 1 − (1 − momentum)^(b / batch_size). Inputs without positions, [b, c], keep the source statistics.
    """
    return Unmixed(components, temperature, alpha, momentum, batch_size)


@method(
    "Lyu et al. 2023, Overcoming Recency Bias of Normalization Statistics in Continual Learning: Balance and "
    "Adaptation, arXiv:2310.08855",
    note="kappa from .1, .4, .7, 1; drift from .01 to 10, or 1e-5 to 1e-2 on mini-ImageNet",
)
def adab2n(tasks: int, kappa: float = 1.0) -> Source:
    """Batch statistics in which task k counts p_k ∝ exp(w_k) + n_k, w learned; momentum η ← η / (η + (1 − m)^κ).

    κ = 1 is BatchNorm's momentum m, κ = 0 the mean of all batches. Before a training batch ``tell_tasks(model, ids)``;
    the paper adds ``drift(model)`` times a weight to the loss. The running variance is the biased one.
    """
    return Balanced(tasks, kappa)


def tell_tasks(model: nn.Module, ids: Tensor) -> None:
    """Tell every adab2n layer which task each example of the next batch belongs to. ids: [b], from 0."""
    for source in _balanced(model):
        source.task = ids


def drift(model: nn.Module) -> Tensor:
    """Σ over layers of (batch − running)², of means and variances, at the last training pass: AdaB²N's regulariser."""
    seen = [source.drift for source in _balanced(model) if source.drift is not None]
    if not seen:
        raise ValueError("drift is measured in a forward pass in train mode: there was none")
    return torch.stack(seen).sum()


@method('Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv:2105.07576')
def precise_bn(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Running statistics ← mean and variance over all ``batches`` as one set, each normalised by its own on the way.

    A batch is an input, or a tuple that begins with it; all but the batch norms is in eval. Returns the old
    statistics: ``model.load_state_dict(old, strict=False)`` puts them back.
    """
    with _in_eval(model):
        return _pool(model, batches, None)


@method("Li et al. 2016, Revisiting Batch Normalization For Practical Domain Adaptation, arXiv:1603.04779")
def adabn(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Running statistics ← mean and variance over the whole target set, layer by layer: no matter how it is batched.

    Goes through ``batches`` once for each layer, in the order in which they are called. Batches and the result are
    those of `precise_bn`, which is one pass and close to it where batches are large.
    """
    if iter(batches) is batches:
        raise TypeError("adabn goes through the batches once for each layer: give a list or a DataLoader, no iterator")
    calls: list[str] = []
    with _in_eval(model):
        found = {id(norm): (name, norm) for name, norm in batch_norms(model).items()}
        hooks = [
            norm.register_forward_pre_hook(lambda m, _: calls.append(found[id(m)][0])) for _, norm in found.values()
        ]
        try:
            for batch in itertools.islice(batches, 1):
                model(_input(batch))
        finally:
            for hook in hooks:
                hook.remove()
        if twice := [name for name in calls if calls.count(name) > 1]:
            raise ValueError(f"adabn: {twice[0]} is called more than once in a pass, so it has no one set of inputs")
        if not calls:
            raise ValueError("adabn saw no batch norm called: there were no batches, or the model calls none")
        old: dict[str, Tensor] = {}
        for name in calls:
            old |= _pool(model, batches, name)
    return old


def _pool(model: nn.Module, batches: Iterable[Any], where: str | None) -> dict[str, Tensor]:
    """Let the batch norms learn the statistics of all batches; returns what they had."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in calibrate(model, Pooled(), where)}
    try:
        for batch in batches:
            model(_input(batch))
    finally:
        restore(model)
    old = {}
    for name, layer in layers.items():
        norm, pool = layer.norm, layer.source
        if pool.n:  # a layer that is not called keeps what it has
            old[f"{name}.running_mean"], old[f"{name}.running_var"] = (
                norm.running_mean.clone(),
                norm.running_var.clone(),
            )
            norm.running_mean.copy_(pool.mean)
            norm.running_var.copy_(pool.var)
    if not old:
        raise ValueError(f"{', '.join(layers)} saw no input: there were no batches, or the model does not call it")
    return old


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    training = [(m, m.training) for m in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for m, was in training:
            m.training = was


def _input(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _balanced(model: nn.Module) -> list[Balanced]:
    found = [m for m in model.modules() if isinstance(m, Balanced)]
    if not found:
        raise ValueError(
            f"no adab2n layer in {type(model).__name__}: norms.calibrate(model, norms.adab2n(tasks)) first"
        )
    return found
