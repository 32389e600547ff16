"""Adapters that learn scales: of units, of frozen random directions, of a change apart from its direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.weights._factored import Factored, check_finite, check_rank, uniform
from etude.weights._map import Adapter
from etude.weights.low_rank import LoRA, lora


class DoRA(LoRA):
    """m (W + s B A) / ‖W + s B A‖ per output unit, the norm a constant of the gradient; m: [out]."""

    additive = False
    m: nn.Parameter

    def born(self, w: Tensor, seen: object = None) -> None:
        super().born(w)
        self.m = nn.Parameter(torch.linalg.vector_norm(self.matrix(w), dim=1))

    def forward(self, w: Tensor) -> Tensor:
        v = self.matrix(super().forward(w))
        return self.stored(v * self._gain(torch.linalg.vector_norm(v.detach(), dim=1))[:, None], w)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return super().linear(x, base) * self._gain(self._length(base))

    def _gain(self, length: Tensor) -> Tensor:
        return self.m / length.clamp_min(torch.finfo(length.dtype).tiny)

    @torch.no_grad()
    def _length(self, base: Callable[[Tensor], Tensor]) -> Tensor:
        """‖W + s B A‖ per output unit without that matrix: ‖W‖² + 2 s ⟨B, W Aᵀ⟩ + s² ⟨B, B A Aᵀ⟩."""
        a, b = self.factors()
        if isinstance(base, partial) and "weight" in base.keywords:
            w = base.keywords["weight"]
        else:
            w = base(torch.eye(a.shape[1], dtype=a.dtype, device=a.device)).mT  # another adapter lies beneath
        cross, own = (b * base(a).mT).sum(1), (b * (b @ (a @ a.mT))).sum(1)
        square = torch.linalg.vector_norm(w, dim=1).square() + 2 * self.scale * cross + self.scale**2 * own
        length: Tensor = square.clamp_min(0).sqrt()
        return length


class IA3(Adapter):
    """l ∘ W, one factor per output unit, or per input unit."""

    l: nn.Parameter  # noqa: E741

    def __init__(self, inputs: bool) -> None:
        super().__init__()
        self.inputs = inputs

    def born(self, w: Tensor) -> None:
        self.l = nn.Parameter(w.new_ones(w.movedim(self.axis, 0).shape[int(self.inputs)]))

    def forward(self, w: Tensor) -> Tensor:
        m = self.matrix(w)
        gain = self.l.repeat_interleave(m.shape[1] // len(self.l)) if self.inputs else self.l[:, None]
        return self.stored(m * gain, w)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return base(x * self.l) if self.inputs else base(x) * self.l


_BASES: WeakValueDictionary[object, Tensor] = WeakValueDictionary()


def shared(w: Tensor, seed: int, draw: Callable[[torch.Generator], Tensor], *key: object) -> Tensor:
    """A frozen random tensor of w's dtype and device: drawn from a seed, and held once for all weights that ask."""
    full = (*key, seed, w.dtype, w.device)
    found = _BASES.get(full)
    if found is None:
        found = _BASES[full] = draw(torch.Generator("cpu").manual_seed(seed)).to(w)
    return found


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(shape, generator=generator, device="cpu") - 1) * math.sqrt(6 / shape[1])


class VeRA(Adapter):
    """W + b ∘ B (d ∘ A) with A: [r, in] and B: [out, r] frozen and random; b: [out] and d: [r]."""

    additive = True
    remade = ("A", "B")
    A: Tensor
    B: Tensor
    b: nn.Parameter
    d: nn.Parameter

    def __init__(self, r: int, d_initial: float, seed: int) -> None:
        super().__init__()
        check_rank("vera", r=r)
        check_finite("vera", d_initial=d_initial)
        self.r, self.d_initial, self.seed = r, d_initial, seed

    def born(self, w: Tensor) -> None:
        out, into = self.matrix(w).shape
        for name, shape in (("A", (self.r, into)), ("B", (out, self.r))):
            draw = partial(_kaiming, shape)
            self.register_buffer(name, shared(w, self.seed, draw, "vera", name, shape))
        self.b = nn.Parameter(w.new_zeros(out))
        self.d = nn.Parameter(w.new_full((self.r,), self.d_initial))

    def forward(self, w: Tensor) -> Tensor:
        return self.stored(torch.addmm(self.matrix(w), self.b[:, None] * self.B, self.d[:, None] * self.A), w)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.addcmul(base(x), F.linear(F.linear(x, self.A) * self.d, self.B), self.b)


class RandLoRA(Factored):
    """W + (alpha / r) Σ_n B_n Λ_n A Γ_n with A and B_n frozen and random: a change of full rank.

    The trained scales lie on the narrow side: λ: [r, n], γ: [n, min(out, in)], n = ⌈min(out, in) / r⌉.
    """

    remade = ("A", "B")
    A: Tensor
    B: Tensor
    lam: nn.Parameter
    gamma: nn.Parameter

    def __init__(self, r: int, alpha: float, seed: int) -> None:
        super().__init__()
        check_rank("randlora", r=r)
        check_finite("randlora", alpha=alpha)
        self.r, self.scale, self.seed = r, alpha / r, seed

    def born(self, w: Tensor) -> None:
        out, into = self.matrix(w).shape
        self.wide, (narrow, long) = out < into, sorted((out, into))
        n = -(-narrow // self.r)

        def draw(rows: int, columns: int, generator: torch.Generator) -> Tensor:
            x = 2 * torch.rand(rows, columns, generator=generator, device="cpu") - 1
            return x / x.std()

        for name, shape in (("A", (self.r, narrow)), ("B", (long, self.r * n))):
            make = partial(draw, *shape)
            self.register_buffer(name, shared(w, self.seed, make, "randlora", name, shape))
        self.lam = nn.Parameter(w.new_zeros(self.r, n))
        self.gamma = nn.Parameter(w.new_full((n, narrow), 1 / max(n, narrow)))

    def factors(self) -> tuple[Tensor, Tensor]:
        a = (self.lam[:, :, None] * self.A[:, None] * self.gamma).flatten(0, 1)
        return (self.B.mT, a.mT) if self.wide else (a, self.B)


class DeLoRA(Factored):
    """W + (λ / r) Σ_i b_i a_i / (‖b_i‖ ‖a_i‖) ∘ ‖W‖ per input unit: λ bounds the change, A and B give its direction."""

    A: nn.Parameter
    B: nn.Parameter
    lam: nn.Parameter
    size: Tensor

    def __init__(self, r: int, lam: float) -> None:
        super().__init__()
        check_rank("delora", r=r)
        check_finite("delora", lam=lam)
        self.r, self.start = r, lam

    def born(self, w: Tensor) -> None:
        m = self.matrix(w)
        self.A, self.B = nn.Parameter(uniform(w, self.r, m.shape[1])), nn.Parameter(w.new_zeros(len(m), self.r))
        self.lam = nn.Parameter(w.new_full((1,), self.start))
        self.register_buffer("size", torch.linalg.vector_norm(m, dim=0))

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = (torch.linalg.vector_norm(f, dim=i).clamp_min(1e-4) for i, f in ((1, self.A), (0, self.B)))
        return self.A * self.size, self.B * (self.lam / self.r / (a * b))


@method(
    "Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv:2312.03732",
    off=lambda: (rslora(r=1), lora(r=1)),
)
def rslora(r: int = 8, alpha: float = 16.0) -> Adapter:
    """W + (alpha / √r) B A, so that a higher rank learns no more slowly; LoRA divides by r."""
    check_rank("rslora", r=r)
    return LoRA(r, alpha * math.sqrt(r))


@method("Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353")
def dora(r: int = 8, alpha: float = 16.0) -> Adapter:
    """m (W + (alpha / r) B A) / ‖W + (alpha / r) B A‖ per output unit, m: [out] from ‖W‖.

    The norm is a constant of the gradient (the paper's 4.3), which saves memory and changes little.
    """
    return DoRA(r, alpha)


@method(
    "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, "
    "arXiv:2205.05638"
)
def ia3(inputs: bool = False) -> Adapter:
    """l ∘ W with l from one: a factor per output unit (keys, values), or per input unit (the second layer of an MLP).

    The paper scales the activations of layers without a bias; where there is one, it is not scaled here.
    """
    return IA3(inputs)


@method("Kopiczko et al. 2023, VeRA: Vector-based Random Matrix Adaptation, arXiv:2310.11454")
def vera(r: int = 256, d_initial: float = 0.1, seed: int = 0) -> Adapter:
    """W + b ∘ B (d ∘ A) with A: [r, in] and B: [out, r] random, frozen and shared; only b: [out] and d: [r] train.

    Layers of one shape share A and B; files hold b and d, since the seed gives the rest.
    """
    return VeRA(r, d_initial, seed)


@method("Albert et al. 2025, RandLoRA: Full-rank parameter-efficient fine-tuning of large models, arXiv:2502.00987")
def randlora(r: int = 32, alpha: float = 640.0, seed: int = 0) -> Adapter:
    """W + (alpha / r) Σ_n B_n Λ_n A Γ_n with A: [r, narrow], B_n: [long, r] random, and trained diagonals Λ_n, Γ_n.

    n = ⌈min(out, in) / r⌉ bases reach full rank; files hold the diagonals, since the seed gives the rest.
    """
    return RandLoRA(r, alpha, seed)


@method("Bini et al. 2025, Decoupling Angles and Strength in Low-rank Adaptation, arXiv:2503.18225")
def delora(r: int = 8, lam: float = 15.0) -> Adapter:
    """W + (λ / r) Σ_i b_i a_iᵀ / (‖b_i‖ ‖a_i‖) ∘ ‖W‖ per input unit: the learned λ bounds the change, B A turns it."""
    return DeLoRA(r, lam)
