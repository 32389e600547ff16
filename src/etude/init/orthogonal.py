"""Random rotations: every singular value of the new weight is the same."""

from __future__ import annotations

import torch
from torch import Tensor

from etude._method import method


@method(
    "Saxe et al. 2013, Exact solutions to the nonlinear dynamics of learning in deep linear neural networks, "
    "arXiv:1312.6120"
)
def orthogonal(w: Tensor, gain: float = 1.0) -> Tensor:
    """W = gain·Q with Q uniform among orthogonal matrices (QᵀQ = I, or Q Qᵀ = I where w is wide).

    w: [out, in, *k], read as [out, in·k]. Draws from torch's global generator; half precision is drawn in float32.
    """
    if w.ndim < 2:
        raise ValueError(f"orthogonal needs a weight [out, in, …], got shape {list(w.shape)}; leave vectors out")
    fresh = torch.empty(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
    return torch.nn.init.orthogonal_(fresh, gain).to(w.dtype)
