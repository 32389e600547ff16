"""Adapters inside the singular vectors of W: what trains are the numbers between them, or the vectors themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.weights._birth import Birth, Watch
from etude.weights._factored import Factored, check_finite, check_rank, singular
from etude.weights._map import Adapter
from etude.weights.low_rank import Core


class Sorsa(Factored):
    """W + s (B diag(S) A − B0 diag(S0) A0) from the r leading singular triples of W, all of them trained."""

    A: nn.Parameter
    S: nn.Parameter
    B: nn.Parameter
    A0: Tensor
    S0: Tensor
    B0: Tensor

    def __init__(self, r: int, alpha: float | None) -> None:
        super().__init__()
        check_rank("sorsa", r=r)
        if alpha is not None:
            check_finite("sorsa", alpha=alpha)
        self.r, self.scale = r, 1.0 if alpha is None else alpha / r

    def born(self, w: Tensor) -> None:
        for name, f in zip("BSA", singular(self.matrix(w), self.r), strict=True):
            self.register_parameter(name, nn.Parameter(f))
            self.register_buffer(f"{name}0", f.clone())

    def blank(self, w: Tensor, state: Mapping[str, Tensor]) -> None:
        self.born(w.to("meta"))
        self.to_empty(device=w.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.A, self.A0]), torch.cat([self.B * self.S, self.B0 * -self.S0], 1)


def orthonormality(model: nn.Module) -> Tensor:
    """The mean of ‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ (Frobenius) over the trained factors A: [r, in], B: [out, r] of adapters.

    The regulariser of SORSA (its authors add 4e-4 / lr of its gradient after clipping), AdaLoRA (0.5), ElaLoRA (0.1).
    """
    found = [m for m in model.modules() if isinstance(m, Factored) and {"A", "B"} <= m._parameters.keys()]
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter with trained factors A and B, such as sorsa(r=4)")
    a = [f for m in found for f in (m.get_parameter("A"), m.get_parameter("B").mT)]
    return torch.stack([torch.dist(f @ f.mT, torch.eye(len(f), dtype=f.dtype, device=f.device)) for f in a]).mean()


class Svft(Adapter):
    """W + σ(g) U M V with U: [out, k] and V: [k, in] singular vectors of W, and M sparse on a fixed pattern."""

    additive = True
    U: Tensor
    V: Tensor
    row: Tensor
    column: Tensor
    M: nn.Parameter
    gate: nn.Parameter

    def __init__(self, off_diag: int, pattern: str, rank: int | None) -> None:
        super().__init__()
        if not isinstance(off_diag, int) or off_diag < 0:
            raise ValueError(f"svft: off_diag={off_diag!r} must be a whole number, 0 or more")
        if pattern not in get_args(Pattern):
            raise ValueError(f"svft: pattern={pattern!r}: choose one of {', '.join(get_args(Pattern))}")
        if rank is not None:
            check_rank("svft", rank=rank)
        self.off_diag, self.pattern, self.rank = off_diag, pattern, rank

    def born(self, w: Tensor) -> None:
        m = self.matrix(w)
        k = min(*m.shape, self.rank or len(m))
        for name, f in zip("UV", singular(m, k)[::2], strict=True):
            self.register_buffer(name, f)
        far = min(self.off_diag, k - 1)
        n = k * (2 * far + 1) - far * (far + 1)
        if self.pattern == "random":
            at = torch.randint(k, (2, n), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        else:
            i = torch.arange(k, device="cpu")
            at = ((i[:, None] - i).abs() <= far).nonzero().mT
        self.register_buffer("row", at[0].to(w.device))
        self.register_buffer("column", at[1].to(w.device))
        self.M, self.gate = nn.Parameter(w.new_zeros(n)), nn.Parameter(w.new_zeros(1))

    def blank(self, w: Tensor, state: Mapping[str, Tensor]) -> None:
        self.born(w.to("meta"))
        self.to_empty(device=w.device)

    def _between(self) -> Tensor:
        k = self.U.shape[1]
        values = self.M * torch.sigmoid(self.gate)
        return self.M.new_zeros(k, k).index_put((self.row, self.column), values, accumulate=True)

    def forward(self, w: Tensor) -> Tensor:
        return self.stored(torch.addmm(self.matrix(w), self.U @ self._between(), self.V), w)

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        h, k = F.linear(x, self.V), self.U.shape[1]
        if len(self.M) > 8 * k:  # where M is no longer thin, one dense product is cheaper
            return base(x) + F.linear(F.linear(h, self._between()), self.U)
        moved = h[..., self.column] * (self.M * torch.sigmoid(self.gate))
        return base(x) + F.linear(torch.zeros_like(h).index_add(-1, self.row, moved), self.U)


Pattern = Literal["banded", "random"]


class Clover(Adapter):
    """R_b R0_b⁺ W_b for every block of d output units: W_b = R0_b Q_b with orthonormal rows Q_b, and R_b trains."""

    R: nn.Parameter
    R0: Tensor
    inverse: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        check_rank("clover", head_dim=head_dim)
        self.d = head_dim

    def born(self, w: Tensor) -> None:
        m = self.matrix(w)
        self.d = min(self.d, len(m))
        blocks = self._blocks(m.mT).movedim(0, -1)
        u, s, _ = torch.linalg.svd(blocks if m.dtype == torch.float64 else blocks.float(), full_matrices=False)
        small = s <= s[:, :1] * torch.finfo(s.dtype).eps * max(blocks.shape[1:])
        over = torch.where(small, 0.0, 1 / torch.where(small, 1.0, s))
        self.register_buffer("R0", (u * s[:, None]).to(w.dtype))
        self.register_buffer("inverse", (over[:, :, None] * u.mT).to(w.dtype))
        self.R = nn.Parameter(self.R0.clone())

    def blank(self, w: Tensor, state: Mapping[str, Tensor]) -> None:
        self.born(w.to("meta"))
        self.to_empty(device=w.device)

    def forward(self, w: Tensor) -> Tensor:
        m = self.matrix(w)
        blocks = self._blocks(m.mT).movedim(0, -1)
        change = (self.R - self.R0) @ (self.inverse @ blocks)
        return self.stored(m + change.flatten(0, 1)[: len(m)], w)

    def _blocks(self, y: Tensor) -> Tensor:
        """y: [..., out] as [..., blocks, d], the last block filled up with zeros."""
        return torch.unflatten(F.pad(y, (0, -y.shape[-1] % self.d)), -1, (-1, self.d))

    def linear(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        y = base(x)
        q = torch.einsum("...nd,nkd->...nk", self._blocks(y), self.inverse)
        return y + torch.einsum("...nk,ndk->...nd", q, self.R - self.R0).flatten(-2)[..., : y.shape[-1]]


@torch.no_grad()
def orthonormal_pair(first: nn.Linear, second: nn.Linear, heads: int, r: int | None = None) -> None:
    """CLOVER's step across a pair: per head W1ᵀ W2 = U S V, then W1 ← (U S)ᵀ and W2 ← V, in place; W: [heads · d, in].

    For query and key without a rotation between them (and for value and the transposed output projection). What the
    pair makes is unchanged; ``r`` keeps the r largest singular directions per head and zeroes the others, in the order
    of their size. Then ``put`` ``clover(head_dim)`` on the first to train S. Biases would not survive, and are refused.
    """
    if any(bias is not None and bias.any() for bias in (first.bias, second.bias)):
        raise ValueError("orthonormal_pair: a bias of a pair does not survive the rotation; take layers without one")
    if first.out_features != second.out_features or first.out_features % heads:
        raise ValueError(
            f"orthonormal_pair: {first.out_features} and {second.out_features} output units must be equal, and a "
            f"multiple of heads={heads}"
        )
    one, two = (torch.unflatten(layer.weight, 0, (heads, -1)) for layer in (first, second))
    q1, r1 = torch.linalg.qr(one.mT)  # the product W1ᵀ W2 itself, [in, in], is never made
    q2, r2 = torch.linalg.qr(two.mT)
    u, s, v = torch.linalg.svd(r1 @ r2.mT)
    if r is not None:
        s = s * (torch.arange(s.shape[1], device=s.device) < r)
    scaled, plain = (q1 @ (u * s[:, None])).mT, v @ q2.mT
    if r is not None:
        plain = plain * (torch.arange(plain.shape[1], device=s.device) < r)[:, None]
    for layer, old, new in ((first, one, scaled), (second, two, plain)):
        layer.weight.copy_(F.pad(new, (0, 0, 0, old.shape[1] - new.shape[1])).flatten(0, 1))


def _leading(w: Tensor, r: int, _: float, __: Watch | None) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    r = min(r, len(s))
    return s[:r, None] * v[:r], u[:, :r], w.new_zeros(r, r)


@method("Balazy et al. 2024, LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv:2405.17604")
def lora_xs(r: int = 8, alpha: float = 16.0) -> Adapter:
    """W + (alpha / r) U R Σ V with U, Σ, V the r leading singular triples of W, and only R: [r, r] trained.

    R starts at zero, so that nothing changes; the authors draw it with deviation 1e-5. Files hold the vectors too,
    because their signs differ from machine to machine.
    """
    check_rank("lora_xs", r=r)
    check_finite("lora_xs", alpha=alpha)
    return Core(r, alpha, Birth(_leading))


@method(
    "Cao 2024, SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language "
    "Models, arXiv:2409.00055"
)
def sorsa(r: int = 4, alpha: float | None = None) -> Adapter:
    """W − s B0 S0 A0 + s B diag(S) A from the r leading singular triples of W, all three trained; s = alpha / r, or 1.

    Meant with its regulariser, ``weights.orthonormality(model)``, which keeps A and B near orthonormal.
    """
    return Sorsa(r, alpha)


@method("Lingam et al. 2024, SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors, arXiv:2405.19597")
def svft(off_diag: int = 0, pattern: Pattern = "banded", rank: int | None = None) -> Adapter:
    """U (Σ + σ(g) M) V with W = U Σ V, M sparse (the main diagonal and ``off_diag`` on either side), and a gate g.

    ``random`` places as many entries anywhere. M starts at zero, so that nothing changes; the authors' code draws it.
    """
    return Svft(off_diag, pattern, rank)


@method(
    "Meng et al. 2024, CLOVER: Constrained Learning with Orthonormal Vectors for Eliminating Redundancy, "
    "arXiv:2411.17426"
)
def clover(head_dim: int = 64) -> Adapter:
    """R_b Q_b for every head W_b = R_b Q_b of d output units: Q_b keeps its orthonormal rows, R_b: [d, d] trains.

    The paper's form for one layer (keys under rotation, MLPs in groups of 64). For query and key, or value and output,
    without rotation, ``weights.orthonormal_pair`` first gives both of a head one basis, and can prune it.
    """
    return Clover(head_dim)
