"""Losses for choosing one of C classes. Classes lie on the last axis: logits: [n, C] and target: [n], or
logits: [n, t, C] and target: [n, t]; the loss has the shape of the target. No target value is ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etude._method import method


@method("Good 1952, Rational Decisions, doi:10.1111/j.2517-6161.1952.tb00104.x")
def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """ℓ = −log softmax(f)_y in nats.

    logits f: [n, C] or [n, t, C]; target y: class numbers [n] or [n, t]; returns the shape of the target.
    """
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"the target holds class numbers of an integer dtype, got {target.dtype}")
    if logits.ndim == 0 or logits.shape[:-1] != target.shape:
        raise ValueError(
            f"logits [*, C] need a target [*]: got logits {list(logits.shape)} and target {list(target.shape)}; "
            "classes go on the last axis"
        )
    classes = logits.shape[-1]
    log_p = torch.log_softmax(logits, -1)
    try:
        return -log_p.gather(-1, target.long().unsqueeze(-1)).squeeze(-1)
    except RuntimeError as error:  # torch looks at every target: to look before it does would cost a pass
        if "out of bounds" not in str(error):
            raise
        raise ValueError(f"target classes must lie in 0 … {classes - 1} for logits of {classes} classes") from error


@method("Hui, Belkin and Wright 2023, Cut your Losses with Squentropy, arXiv:2302.03952")
def squentropy(logits: Tensor, target: Tensor) -> Tensor:
    """ℓ = −log softmax(f)_y + 1/(C−1) Σ_{j≠y} f_j²: cross-entropy plus the mean square of the wrong logits.

    logits f: [n, C] or [n, t, C]; target y: class numbers [n] or [n, t]; returns the shape of the target.
    """
    entropy = cross_entropy(logits, target)
    if logits.shape[-1] < 2:
        raise ValueError("squentropy needs at least 2 classes, got logits of 1 class")
    wrong = logits.scatter(-1, target.long().unsqueeze(-1), 0.0)
    return entropy + wrong.pow(2).sum(-1) / (logits.shape[-1] - 1)
