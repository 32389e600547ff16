"""Adapters W Q that turn the input of a frozen weight, Q orthogonal or nearly so: [in, in], built from few numbers.

A weight counts as a matrix [out, in], however stored; a kernel as [out, in · kh · kw]. Each Q is born the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from etude._linalg import compact_wy
from etude._method import method
from etude.weights._factors import (
    GROUP,
    Blocks,
    Butterfly,
    Factor,
    Padded,
    Product,
    Shuffle,
    Update,
    eye,
    multiplied_out,
    skew,
    wide,
)
from etude.weights._factors import cayley as rotation
from etude.weights._factors import cayley_neumann as nearly_rotation
from etude.weights._map import Adapter


class Turn(Adapter):
    """W Q, or, on the activations, W (Q x); a subclass makes the factor Q of its θ."""

    def turn(self) -> Factor:
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """What the paper adds to the loss, times a strength of its own."""
        return None

    def forward(self, w: Tensor) -> Tensor:
        return self.stored(self.turn()(self.matrix(w)), w)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return base(self.turn().T(x))

    def _fan_in(self, w: Tensor) -> int:
        d = w.numel() // w.shape[self.axis]
        if d < 2:
            raise ValueError(f"a fan-in of {d} leaves nothing to turn; shape {list(w.shape)}")
        return d


class HRA(Turn):
    """W H₁ … H_r, Hᵢ = I − 2 uᵢ uᵢᵀ / ‖uᵢ‖²; u: [in, r]."""

    u: nn.Parameter

    def __init__(self, r: int) -> None:
        super().__init__()
        self.r = _whole("hra", "r", r)
        if r % 2:
            raise ValueError(f"hra: r={r} must be even: reflections are born in pairs that cancel")

    def born(self, w: Tensor) -> None:
        half = nn.init.kaiming_uniform_(w.new_empty(self._fan_in(w), self.r // 2), a=math.sqrt(5))
        self.u = nn.Parameter(half.repeat_interleave(2, dim=1))

    def turn(self) -> Factor:
        return Update(self.u, -compact_wy(wide(self.u)).to(self.u.dtype))

    def penalty(self) -> Tensor:
        u = self.u / self.u.norm(dim=0)
        return torch.dist(u.mT @ u, eye(self.r, u))


class OFT(Turn):
    """W Rᵀ with R = R_m … R₁ block-diagonal, over neighbours in R₁, over ever further half blocks in the rest.

    q: what stands above the diagonal of the skew Q of each block, [m · in · (b − 1) / 2] where the blocks divide the
    fan-in; where they reach beyond it, Q is zero there.
    """

    q: nn.Parameter

    def __init__(self, name: str, block_size: int, m: int = 1, k: int | None = None) -> None:
        super().__init__()
        self.b, self.m, self.k = _whole(name, "block_size", block_size, 2), _whole(name, "m", m), k
        if m > 1 and block_size % 2:
            raise ValueError(f"{name}: block_size={block_size} must be even, so that m={m} factors can exchange halves")

    def born(self, w: Tensor) -> None:
        self.d = self._fan_in(w)
        self.b = min(self.b, self.d + self.d % 2 if self.m > 1 else self.d)
        self.group = self.b if self.m == 1 else self.b // 2 * 2**self.m
        self.width = -(-self.d // self.group) * self.group
        self.places = self._free()  # no buffer: it follows from the shape
        self.q = nn.Parameter(w.new_zeros(len(self.places)))

    def turn(self) -> Factor:
        flat = wide(self.q).new_zeros(self.m * self.width * self.b)
        q = flat.index_copy(0, self.places.to(flat.device), wide(self.q)).view(self.m, -1, self.b, self.b)
        q = q - q.mT
        r = (rotation(q) if self.k is None else nearly_rotation(q, self.k)).to(self.q.dtype)
        whole: Factor = Product(tuple(Butterfly(r[i], 2**i) for i in reversed(range(self.m))))
        if self.m == 1:
            whole = Blocks(r[0])
        elif self.group <= GROUP:
            whole = multiplied_out(whole, self.group, self.width, r)
        return (Padded(whole, self.width) if self.width > self.d else whole).T

    def _free(self) -> Tensor:
        """Where in the blocks Q [m, blocks, b, b] the numbers of θ stand: above the diagonal, both coordinates real."""
        real = (torch.arange(self.width, device="cpu") < self.d).view(1, -1, self.b)
        if self.m > 1:
            each = [Shuffle(2, 2**i, self.b // 2)(real.view(-1, 2**i * self.b)) for i in range(self.m)]
            real = torch.stack([e.view(-1, self.b) for e in each])
        return (real[..., None] & real[..., None, :]).triu(1).flatten().nonzero().flatten()


class PSOFT(Turn):
    """W (I + Aᵀ (M − I) A), M = diag(b) R diag(a), R from the skew q; A: [r, in] the leading right singular vectors."""

    A: Tensor
    q: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, r: int) -> None:
        super().__init__()
        self.r = _whole("psoft", "r", r)

    def born(self, w: Tensor) -> None:
        rows = wide(self.matrix(w))
        self.r = min(self.r, *rows.shape)
        self.register_buffer("A", torch.linalg.svd(rows, full_matrices=False)[2][: self.r].to(w.dtype).contiguous())
        self.q = nn.Parameter(w.new_zeros(self.r * (self.r - 1) // 2))
        self.a, self.b = nn.Parameter(w.new_ones(self.r)), nn.Parameter(w.new_ones(self.r))

    def blank(self, w: Tensor, state: Mapping[str, Tensor]) -> None:
        self.born(w.to("meta"))
        self.to_empty(device=w.device)

    def turn(self) -> Factor:
        r = rotation(skew(wide(self.q), self.r)).to(self.q.dtype)
        m = self.b[:, None] * r * self.a
        return Update(self.A.mT, m @ self.A - self.A)


def orthogonality(model: nn.Module) -> Tensor:
    """What the papers of the model's adapters add to the loss, summed over them; the strength λ is the caller's.

    hra: ‖ÛᵀÛ − I‖ (Frobenius), the columns of Û of length 1; its authors take λ = 1e-4 on language models. qgoft:
    Σ ⟨α, β⟩² over the columns α, β of its planes, with λ from 1e-3 to 0.1.
    """
    found = [p for m in model.modules() if isinstance(m, Turn) and (p := m.penalty()) is not None]
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter whose paper has a penalty: hra or qgoft")
    return torch.stack(found).sum()


def _whole(name: str, knob: str, value: int, least: int = 1) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {knob}={value!r} must be a whole number, and at least {least}")
    return value


@method(
    "Yuan et al. 2024, Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection "
    "Adaptation, arXiv:2405.17484"
)
def hra(r: int = 8) -> Adapter:
    """W H₁ … H_r with Hᵢ = I − 2 uᵢ uᵢᵀ / ‖uᵢ‖²: orthogonal, and W' − W of rank r at most.

    u: [in, r], born in equal pairs, whose reflections cancel: r must be even. ``weights.orthogonality`` is its penalty.
    The variant with Gram–Schmidt is left out: no reflections in orthogonal u are the identity.
    """
    return HRA(r)


@method("Qiu et al. 2023, Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv:2306.07280")
def oft(block_size: int = 32) -> Adapter:
    """W Rᵀ, R block-diagonal with Cayley blocks (I + Q) (I − Q)⁻¹, Q skew: angles between output units are kept.

    The last block is smaller where ``block_size`` does not divide the fan-in. Without the paper's constrained variant.
    """
    return OFT("oft", block_size)


@method("Qiu et al. 2025, Orthogonal Finetuning Made Scalable, arXiv:2506.19847")
def oft_v2(block_size: int = 32, k: int = 3) -> Adapter:
    """W Rᵀ, R block-diagonal with Cayley–Neumann blocks (I + Q) (I + Q + … + Qᵏ), always applied to the activations.

    R is Cayley's to O(‖Q‖ᵏ⁺¹), and for even k orthogonal to O(‖Q‖²ᵏ⁺²). peft counts k + 2 terms of the polynomial.
    """
    return OFT("oft_v2", block_size, k=_whole("oft_v2", "k", k))


@method(
    "Liu et al. 2023, Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv:2311.06243",
    off=lambda: (boft(block_size=4, m=1), oft(block_size=4)),
)
def boft(block_size: int = 8, m: int = 2) -> Adapter:
    """W (R_m … R₁)ᵀ, butterfly factors: Rᵢ has Cayley blocks over half blocks that lie 2ⁱ⁻¹ half blocks apart.

    m = log₂(2 in / block_size) factors reach from every input to every other. The authors' code also trains a gain per
    output unit, which the paper does not have.
    """
    return OFT("boft", block_size, m)


@method("Wu et al. 2025, Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, arXiv:2505.11235")
def psoft(r: int = 32) -> Adapter:
    """W + W Aᵀ (diag(b) R diag(a) − I) A, R a rotation of the subspace A of W's leading singular vectors.  A: [r, in].

    R = (I + Q) (I − Q)⁻¹; r (r − 1) / 2 + 2 r numbers train. A smaller weight is turned in all its directions.
    """
    return PSOFT(r)
