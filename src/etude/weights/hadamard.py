"""Adapters of high rank from few numbers: products of small matrices entry by entry, by blocks, or tile by tile."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.weights._factored import Factored, check_finite, check_rank, uniform
from etude.weights._map import Adapter


class LoHa(Factored):
    """W + (alpha / r) (B1 A1) ∘ (B2 A2), of rank up to r²; A1, A2: [r, in], B1, B2: [out, r]."""

    A1: nn.Parameter
    A2: nn.Parameter
    B1: nn.Parameter
    B2: nn.Parameter

    def __init__(self, r: int, alpha: float) -> None:
        super().__init__()
        check_rank("loha", r=r)
        check_finite("loha", alpha=alpha)
        self.r, self.scale = r, alpha / r

    def born(self, w: Tensor) -> None:
        out, into = self.matrix(w).shape
        self.A1, self.B1 = nn.Parameter(uniform(w, self.r, into)), nn.Parameter(uniform(w, out, self.r))
        self.A2, self.B2 = nn.Parameter(w.new_zeros(self.r, into)), nn.Parameter(uniform(w, out, self.r))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The entrywise product of two products is one product of rank r²."""
        return (self.A1[:, None] * self.A2).flatten(0, 1), (self.B1[:, :, None] * self.B2[:, None]).flatten(1)

    def forward(self, w: Tensor) -> Tensor:
        change = (self.B1 @ self.A1) * (self.B2 @ self.A2)
        return self.stored(torch.add(self.matrix(w), change, alpha=self.scale), w)


def halves(n: int) -> tuple[int, int]:
    """n as the product of two whole numbers, the smaller first, as near to each other as can be."""
    small = next(i for i in range(math.isqrt(n), 0, -1) if n % i == 0)
    return small, n // small


class LoKr(Adapter):
    """W + (alpha / r) C ⊗ D, out and in split as near their roots as can be; D, the large one, or D E of rank r."""

    additive = True
    C: nn.Parameter
    D: nn.Parameter
    E: nn.Parameter | None

    def __init__(self, r: int, alpha: float) -> None:
        super().__init__()
        check_rank("lokr", r=r)
        check_finite("lokr", alpha=alpha)
        self.r, self.scale = r, alpha / r

    def born(self, w: Tensor) -> None:
        out, into = w.movedim(self.axis, 0).shape[:2]
        (l, k), (m, n) = halves(out), halves(into)  # noqa: E741
        self.C = nn.Parameter(w.new_zeros(l, m))
        low = self.r < max(k, n) / 2
        n *= self.matrix(w).shape[1] // into  # a kernel goes with the large factor
        self.D = nn.Parameter(uniform(w, k, self.r if low else n))
        self.register_parameter("E", nn.Parameter(uniform(w, self.r, n)) if low else None)

    def _large(self) -> Tensor:
        return self.D if self.E is None else self.D @ self.E

    def forward(self, w: Tensor) -> Tensor:
        change = torch.kron(self.C, self._large())
        return self.stored(torch.add(self.matrix(w), change, alpha=self.scale), w)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        y, h = base(x), torch.unflatten(x, -1, (self.C.shape[1], -1))
        h = F.linear(h, self.D) if self.E is None else F.linear(F.linear(h, self.E), self.D)
        return torch.add(y, (self.C @ h).flatten(-2), alpha=self.scale)


class Bone(Adapter):
    """W + [Dᵀ Dᵀ … Dᵀ]: all inputs with one remainder mod r share a column; D: [r, out]."""

    additive = True
    D: nn.Parameter

    def __init__(self, r: int) -> None:
        super().__init__()
        check_rank("bone", r=r)
        self.r = r

    def born(self, w: Tensor) -> None:
        out, into = self.matrix(w).shape
        self.r = min(self.r, into)
        self.D = nn.Parameter(w.new_zeros(self.r, out))

    def forward(self, w: Tensor) -> Tensor:
        m = self.matrix(w)
        return self.stored(m + self.D.mT.repeat(1, -(-m.shape[1] // self.r))[:, : m.shape[1]], w)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        full = F.pad(x, (0, -x.shape[-1] % self.r))
        return base(x) + torch.unflatten(full, -1, (-1, self.r)).sum(-2) @ self.D


class Bat(Adapter):
    """W_ij + W_ij B_i + B_i for every r × r block of W; B: [out / r, r, r]."""

    B: nn.Parameter

    def __init__(self, r: int) -> None:
        super().__init__()
        check_rank("bat", r=r)
        self.r = r

    def born(self, w: Tensor) -> None:
        m = self.matrix(w)
        self.r = min(self.r, *m.shape)
        self.B = nn.Parameter(w.new_zeros(-(-len(m) // self.r), self.r, self.r))

    def forward(self, w: Tensor) -> Tensor:
        m, r = self.matrix(w), self.r
        (out, into), full = m.shape, F.pad(m, (0, -m.shape[1] % r, 0, -len(m) % r))
        blocks = full.view(len(full) // r, r, -1, r)  # [i, row, j, column]
        change = torch.einsum("iajb,ibc->iajc", blocks, self.B) + self.B[:, :, None]
        return self.stored((blocks + change).reshape(full.shape)[:out, :into].contiguous(), w)


class ConvLoRA(Adapter):
    """W + (alpha / r) (B A reshaped) with A: [r k, in k] and B: [out k, r k] for a k × k kernel [out, in, k, k]."""

    additive = True
    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, r: int, alpha: float) -> None:
        super().__init__()
        check_rank("conv_lora", r=r)
        check_finite("conv_lora", alpha=alpha)
        self.r, self.scale = r, alpha / r

    def born(self, w: Tensor) -> None:
        out, into, *kernel = w.movedim(self.axis, 0).shape
        high, wide = math.prod(kernel[:-1]), math.prod(kernel[-1:])
        rank = self.r * max(high, wide)
        self.A, self.B = nn.Parameter(uniform(w, rank, into * wide)), nn.Parameter(w.new_zeros(out * high, rank))

    def forward(self, w: Tensor) -> Tensor:
        m = self.matrix(w)
        return self.stored(torch.addmm(m.reshape(len(self.B), -1), self.B, self.A, alpha=self.scale).view_as(m), w)


@method(
    "Hyeon-Woo et al. 2022, FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning, "
    "arXiv:2108.06098"
)
def loha(r: int = 8, alpha: float = 8.0) -> Adapter:
    """W + (alpha / r) (B1 A1) ∘ (B2 A2), whose rank reaches r² with the numbers of rank 2 r; A2 starts at zero.

    The twin works at rank r²; where that is beyond the width, ``route="weight"`` is cheaper.
    """
    return LoHa(r, alpha)


@method(
    "Yeh et al. 2023, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, "
    "arXiv:2309.14859"
)
def lokr(r: int = 8, alpha: float = 8.0) -> Adapter:
    """W + (alpha / r) C ⊗ D, a Kronecker product: C small, from zero, and D large.

    out and in are split as evenly as they divide (a prime width gives C one row); D is of rank r where that is less
    than half its width.
    """
    return LoKr(r, alpha)


@method(
    "Kang 2024, Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language "
    "Models, arXiv:2409.15371"
)
def bone(r: int = 64) -> Adapter:
    """W + [Dᵀ Dᵀ … Dᵀ] with D: [r, out] from zero: y = W x + Dᵀ Σ_j x_j over the blocks x_j of r inputs.

    Later versions of the paper call it MiSS. The last block is filled up with zeros; r is at most the width.
    """
    return Bone(r)


@method(
    "Kang 2024, Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language "
    "Models, arXiv:2409.15371"
)
def bat(r: int = 64) -> Adapter:
    """W_ij + W_ij B_i + B_i for every r × r block of W, with one B_i: [r, r] per row of blocks, from zero.

    Where r does not divide a width, W is filled up with zeros and the result is cut; the authors refuse that.
    """
    return Bat(r)


@method("Aleem et al. 2024, ConvLoRA and AdaBN based Domain Adaptation via Self-Training, arXiv:2402.04964")
def conv_lora(r: int = 2, alpha: float = 2.0) -> Adapter:
    """W + (alpha / r) (B A reshaped), A: [r k, in k] random and B: [out k, r k] zero, for k × k kernels.

    B A: [out k, in k] is read in memory order as the kernel [out, in, k, k]. On a matrix it is LoRA. The paper trains
    the affine parameters of batch norms beside it, whose running statistics, in training mode, follow the new domain.
    """
    return ConvLoRA(r, alpha)
