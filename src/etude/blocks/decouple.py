"""Linear layers whose scale is learned apart from their directions, by a norm of what they make."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method


class Decoupled(nn.Linear):
    """alpha ⊙ z / √(mean z² + eps) with z = V x + b; alpha: [out]."""

    def __init__(self, d: int, out: int, bias: bool, alpha: float, eps: float):
        super().__init__(d, out, bias)
        self.eps = eps
        self.alpha = nn.Parameter(torch.full((out,), alpha))

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return F.rms_norm(z, (self.out_features,), self.alpha.to(z.dtype), self.eps)


@method(
    "Wang et al. 2025, Scale-Distribution Decoupling: Enabling Stable and Effective Training of Large Language Models, "
    "arXiv:2502.15499"
)
def sdd(d: int, out: int | None = None, bias: bool = False, alpha: float = 1.0, eps: float = 1e-6) -> Decoupled:
    """alpha ⊙ z / √(mean z² + eps), z = V x: V sets the distribution of the output, alpha: [out] its scale.

    In the place of every linear layer of a transformer, also one with its norms after the sum: the output does not feel
    the size of V. ``alpha``: where it starts; the authors take 1 / √(2 L) in the two layers of each of L blocks that
    write to the residual stream. A bias stands inside the norm. [..., d] → [..., out].
    """
    return Decoupled(d, out or d, bias, alpha, eps)
