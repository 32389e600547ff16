"""An adapter whose rank follows the timestep of a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from etude._method import method
from etude.weights._factored import Factored, check_finite, check_rank
from etude.weights._host import held
from etude.weights._map import Adapter


class TLora(Factored):
    """W + B diag(λ) M A − B0 diag(λ0) M A0, where the mask M leaves the first r(t) of r ranks."""

    A: nn.Parameter
    lam: nn.Parameter
    B: nn.Parameter
    mask: Tensor

    def __init__(self, r: int, min_rank: int, alpha: float) -> None:
        super().__init__()
        check_rank("t_lora", r=r, min_rank=min_rank)
        check_finite("t_lora", alpha=alpha)
        if min_rank > r:
            raise ValueError(f"t_lora: min_rank={min_rank} must be at most r={r}")
        self.r, self.min_rank, self.alpha = r, min_rank, alpha

    def born(self, w: Tensor) -> None:
        m = self.matrix(w)
        r = min(self.r, *m.shape)
        wide = m if m.dtype == torch.float64 else m.float()
        random = wide.new_empty(m.shape).normal_()
        u, s, v = torch.linalg.svd(random / self.r, full_matrices=False)
        for name, f in {"A": v[-r:], "lam": s[-r:], "B": u[:, -r:]}.items():
            f = f.to(w.dtype).contiguous()
            self.register_parameter(name, nn.Parameter(f))
            self.register_buffer(f"{name}0", f.clone())
        self.register_buffer("mask", w.new_ones(r))

    def blank(self, w: Tensor, state: Mapping[str, Tensor]) -> None:
        self.born(w.to("meta"))
        self.to_empty(device=w.device)

    def at(self, t: int, of: int = 1000) -> None:
        """Leave the first ⌊((T − t) / T)^alpha (r − min_rank)⌋ + min_rank ranks, in the same memory."""
        live = int(((of - t) / of) ** self.alpha * (self.r - self.min_rank)) + self.min_rank
        self.mask.copy_(torch.arange(len(self.mask), device=self.mask.device) < live)

    def factors(self) -> tuple[Tensor, Tensor]:
        a = torch.cat([self.A * self.mask[:, None], self.get_buffer("A0") * self.mask[:, None]])
        return a, torch.cat([self.B * self.lam, self.get_buffer("B0") * -self.get_buffer("lam0")], 1)


def at_timestep(model: nn.Module, t: int, of: int = 1000, name: str | None = None) -> nn.Module:
    """Set the rank of every ``t_lora`` of the model for timestep ``t`` of ``of``, 0 ≤ t < of: the noisier, the fewer.

    Before each forward, while training (one timestep for all of the batch) and at each step of sampling.
    """
    if not 0 <= t < of:
        raise ValueError(f"at_timestep: t={t} must lie in 0 ≤ t < {of}")
    for _, maps in held(model, name, TLora):
        for m in maps:
            if isinstance(m, TLora):
                m.at(t, of)
    return model


@method(
    "Soboleva et al. 2025, T-LoRA: Single Image Diffusion Model Customization Without Overfitting, arXiv:2507.05964"
)
def t_lora(r: int = 64, min_rank: int = 32, alpha: float = 1.0) -> Adapter:
    """W + B Λ M(t) A − B0 Λ0 M(t) A0 with M(t) the first ⌊((T − t) / T)^alpha (r − min_rank)⌋ + min_rank of r ranks.

    A and B start orthonormal, Λ: [r] as the least singular values of noise. ``weights.at_timestep(model, t)`` sets t;
    until then all ranks live.
    """
    return TLora(r, min_rank, alpha)
