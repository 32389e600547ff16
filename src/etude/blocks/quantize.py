"""Vectors replaced by the nearest of a learned list."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method

Affine = Literal["learned", "running", "none"]


class VectorQuantizer(nn.Module):
    """x: [..., d] → the nearest of ``codes`` vectors, the loss that trains them, and which it was: [...]."""

    _role = "embedding"
    _no_gradcheck = "the gradient skips the choice of a code, whose own gradient is zero"
    mean_x: Tensor
    var_x: Tensor
    mean_c: Tensor
    var_c: Tensor
    begun: Tensor

    def __init__(self, d: int, codes: int, beta: float, nu: float, affine: Affine, affine_lr: float, groups: int):
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"affine_vq shares its loss by beta and 1 − beta, so beta={beta} must be in [0, 1]")
        if affine not in get_args(Affine):
            raise ValueError(f"affine_vq: affine={affine!r} is none of {', '.join(get_args(Affine))}")
        if codes % groups:
            raise ValueError(f"affine_vq: {codes} codes do not divide into {groups} groups")
        self.beta, self.nu, self.affine, self.affine_lr, self.groups = beta, nu, affine, affine_lr, groups
        self.codebook = nn.Parameter(torch.randn(codes, d))
        if affine == "learned":
            self.scale, self.shift = nn.Parameter(torch.zeros(groups, d)), nn.Parameter(torch.zeros(groups, d))
        if affine == "running":
            for name in ("mean_x", "var_x", "mean_c", "var_c"):
                self.register_buffer(name, torch.zeros(d) if name.startswith("mean") else torch.ones(d))
            self.register_buffer("begun", torch.tensor(False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = self.codes(x)
        flat = x.detach().flatten(0, -2)
        chosen = (codes.detach().square().sum(1) - 2 * flat @ codes.detach().mT).argmin(1).view(x.shape[:-1])
        q = F.embedding(chosen, codes)
        loss = (1 - self.beta) * F.mse_loss(x, q.detach()) + self.beta * F.mse_loss(q, x.detach())
        y = x + (q - x).detach()
        if self.nu:
            y = y + self.nu * (q - q.detach())
        return y, loss, chosen

    def codes(self, x: Tensor) -> Tensor:
        """The codebook after its affine map, whose statistics follow x in training.  [codes, d]"""
        c = self.codebook
        if self.affine == "learned":
            parts = c.view(self.groups, -1, c.shape[1])
            parts = parts * (1 + self.affine_lr * self.scale[:, None]) + self.affine_lr * self.shift[:, None]
            return parts.view_as(c)
        if self.affine == "running":
            if self.training:
                self._follow(x.detach().flatten(0, -2), c.detach())
            s = (self.var_x / (self.var_c + 1e-8)).sqrt()
            return s * c + (self.mean_x - s * self.mean_c)
        return c

    def _follow(self, x: Tensor, c: Tensor) -> None:
        for rows, mean, var in ((x, self.mean_x, self.var_x), (c, self.mean_c, self.var_c)):
            new_var, new_mean = torch.var_mean(rows, 0, correction=0)
            momentum = torch.where(self.begun, 0.1, 1.0).to(mean)
            mean.lerp_(new_mean, momentum)
            var.lerp_(new_var, momentum)
        self.begun.fill_(True)

    def extra_repr(self) -> str:
        n, d = self.codebook.shape
        return f"{d}, codes={n}, beta={self.beta}, nu={self.nu}, affine={self.affine!r}, groups={self.groups}"


@method(
    "Huh et al. 2023, Straightening Out the Straight-Through Estimator: Overcoming Optimization Challenges in Vector "
    "Quantized Networks, arXiv:2305.08842",
    note="affine_lr, beta and nu as the authors' example has them; their classes' defaults are 0, 0.95 and 0",
)
def affine_vq(
    d: int, codes: int = 512, beta: float = 0.98, nu: float = 0.2, affine: Affine = "learned",
    affine_lr: float = 10.0, groups: int = 1,
) -> VectorQuantizer:  # fmt: skip
    """x + sg(q − x) + nu (q − sg q), q the nearest of s ⊙ c + t over all codes c: those that are not chosen move too.

    ``learned``: s = 1 + affine_lr · scale and t = affine_lr · shift, one pair for each of ``groups`` runs of codes;
    ``running``: s and t carry the codebook's running mean and variance to those of x. nu lets the task's gradient reach
    the chosen codes (the synchronised update). The second result is to be added to the loss:
    (1 − beta) mean (x − sg q)² + beta mean (q − sg x)². Without affine and nu it is a plain vector quantiser. The
    paper's alternating update is a second optimizer's step and not part of the layer. x: [..., d].
    """
    return VectorQuantizer(d, codes, beta, nu, affine, affine_lr, groups)
