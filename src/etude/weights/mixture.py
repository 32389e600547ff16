"""Low-rank experts that every token chooses: no weight W → W, but a layer that stands where a linear layer stood."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.weights._factored import check_rank


class Mixture(nn.Module):
    """y = W x + b + s (Σ_k w_k(x) B_k A_k − 1/E Σ_e B0_e A0_e) x; W keeps its bits, and does not train.

    After each forward ``balance`` is E Σ_e (share of e) · (mean probability of e), for the loss; no token of a batch of
    shape [..., in] is treated apart.
    """

    balance: Tensor | None = None
    A0: Tensor
    B0: Tensor

    def __init__(self, linear: nn.Linear, r: int, num_experts: int, top_k: int, rho: float, eta: float) -> None:
        super().__init__()
        check_rank("goat", r=r, num_experts=num_experts, top_k=top_k)
        out, into = linear.weight.shape
        each, part = r // num_experts, min(out, into) // num_experts
        if not 1 <= each <= part or top_k > num_experts:
            raise ValueError(
                f"goat: r={r} must give each of num_experts={num_experts} a rank from 1 to {part} here, and "
                f"top_k={top_k} be at most num_experts"
            )
        self.experts, self.top_k, self.scale = num_experts, top_k, (3 * eta * into / each) ** 0.5
        w = linear.weight.detach()
        u, s, v = torch.linalg.svd(w if w.dtype == torch.float64 else w.float(), full_matrices=False)
        first = torch.arange(num_experts, device=w.device)[:, None] * part
        at = (first + torch.arange(each, device=w.device)).flatten()  # the head of each of E equal segments
        root = (s[at] / (self.scale * rho)).sqrt()
        self.base = linear.requires_grad_(False)
        self.gate = nn.Linear(into, num_experts, bias=False, dtype=w.dtype, device=w.device)
        self.A, self.B = nn.Parameter((root[:, None] * v[at]).to(w.dtype)), nn.Parameter((u[:, at] * root).to(w.dtype))
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        best, which = p.topk(self.top_k, -1)
        w = torch.zeros_like(p).scatter(-1, which, best / best.sum(-1, keepdim=True))
        share = (w > 0).flatten(0, -2).to(p.dtype).mean(0)
        self.balance = self.experts * (share * p.flatten(0, -2).mean(0)).sum()
        h = torch.unflatten(F.linear(x, torch.cat([self.A, self.A0])), -1, (2, self.experts, -1))
        h = torch.stack([h[..., 0, :, :] * w[..., None], h[..., 1, :, :] / -self.experts], -3).flatten(-3)
        y: Tensor = self.base(x) + self.scale * F.linear(h, torch.cat([self.B, self.B0], 1))
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "balance": None}  # a tensor on a graph can be neither copied nor pickled


@method(
    "Fan et al. 2025, Make LoRA Great Again: Boosting LoRA with Adaptive Singular Values and Mixture-of-Experts "
    "Optimization Alignment, arXiv:2502.16894"
)
def goat(
    linear: nn.Linear, r: int = 32, num_experts: int = 8, top_k: int = 2, rho: float = 10.0, eta: float = 1.0
) -> Mixture:
    """W x + s (Σ_k w_k(x) B_k A_k − 1/E Σ_e B_e A_e at birth) x, s = √(3 η in / d): experts of rank d = r / E.

    Expert e starts as the first d triplets of the e-th of E equal segments of W's singular values, divided by s ρ; a
    router gives each token its top_k. Every token chooses, so that no one weight W' exists, and nothing merges: put the
    layer where ``linear`` stood. Add 0.001 times each ``balance`` to the loss. With all experts on and weighed alike
    the layer starts as W; with a router it starts near it.
    """
    return Mixture(linear, r, num_experts, top_k, rho, eta)
