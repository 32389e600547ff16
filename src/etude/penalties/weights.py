"""Penalties on the size of weights. Each takes a module, or weights by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from etude._method import method
from etude._roles import _is_transposed_linear


@method(
    "Georgiou et al. 2021, Preprint: Norm Loss: An efficient yet effective regularization method for deep neural "
    "networks, arXiv:2103.06583"
)
def norm_loss(weights: nn.Module | Mapping[str, Tensor], factor: float = 1e-4) -> Tensor:
    """factor · Σ (1 − ‖wᵤ‖₂)² over all units u: the weights [out, in, *k] steered towards rows of norm 1.

    A unit is one row along axis 0, also in a transposed convolution, or along axis 1 in a module that is Hugging Face's
    Conv1D; vectors (biases, gains) are left out. Half precision is summed in float32. At w = 0 the gradient is 0.
    """
    if not isinstance(weights, (nn.Module, Mapping)):
        raise TypeError(f"norm_loss takes a module, or a mapping of names to weights; got a {type(weights).__name__}")
    if not factor >= 0:
        raise ValueError(f"norm_loss: factor={factor} must be at least 0")
    named = _rows(weights) if isinstance(weights, nn.Module) else weights
    matrices = [w for w in named.values() if w.ndim >= 2]
    if not matrices:
        raise ValueError("norm_loss found no weight of ≥ 2 axes; give a model or a mapping of names to weights")
    return factor * torch.stack([_oblique(w).to(matrices[0].device) for w in matrices]).sum()


def _rows(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, output units first."""
    stored = ("weight", "parametrizations.weight.original")
    linears = [m for m in model.modules() if _is_transposed_linear(m)]
    transposed = {id(p) for m in linears for n, p in m.named_parameters() if n.startswith(stored)}
    return {n: w.mT if id(w) in transposed else w for n, w in model.named_parameters()}


def _oblique(w: Tensor) -> Tensor:
    """The squared distances of w's rows from the unit sphere, summed.  [out, in, *k] → []"""
    wide = torch.promote_types(w.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(w.flatten(1), dim=1, dtype=wide)
    return (1 - norm).square().sum()
