"""Projections: after each step the weights are put back where they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etude._method import method
from etude._roles import roles
from etude.after._after import After

AND = " + "
"""Joins the names of parameters that share one norm."""


@dataclass(frozen=True, repr=False)
class Rescale(After):
    """Every group of parameters is kept at one joint norm; what is kept of a group is that norm."""

    def begin(self, model: nn.Module) -> dict[str, Tensor]:
        weights, role = dict(model.named_parameters()), roles(model)
        norms: dict[str, Tensor] = {}
        for name, w in weights.items():
            layer, _, leaf = name.rpartition(".")
            if role.get(name) in ("hidden", "conv"):
                norms[name] = _norm([w])
                if not norms[name] > 0:
                    raise ValueError(f"{self} would hold {name} at its initial norm 0 for ever; initialise it first")
            elif role.get(name) == "norm" and leaf == "weight":
                offset = f"{layer}.bias".lstrip(".")
                joint = name + AND + offset if offset in weights else name
                norms[joint] = torch.full_like(_norm([w]), math.sqrt(w.numel()))
        return norms

    def step(self, weights: dict[str, nn.Parameter], kept: dict[str, Tensor], t: int) -> None:
        for names, target in kept.items():
            group = [weights[n] for n in names.split(AND)]
            now = _norm(group)
            factor = torch.where(now > 0, target / now, 1.0)  # what is zero has no direction to keep
            for w in group:
                w.mul_(factor)


def _norm(group: list[nn.Parameter]) -> Tensor:
    """The norm of all entries together, in at least float32."""
    norms = [torch.linalg.vector_norm(w.detach(), dtype=torch.promote_types(w.dtype, torch.float32)) for w in group]
    joint: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return joint


@method("Lyle et al. 2024, Normalization and effective learning rates in reinforcement learning, arXiv:2407.01800")
def normalize_and_project() -> Rescale:
    """W ← W ‖W₀‖_F / ‖W‖_F for each hidden matrix and convolution; (scale, offset) of each norm ← jointly to norm √d.

    W₀ is the weight when bound. Biases, embeddings and the head, which no norm follows, are left alone. The model must
    have the method's other half, a norm before each nonlinearity: it makes the rescaling invisible.
    """
    return Rescale()
