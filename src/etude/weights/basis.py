"""Maps that train the weight in a basis of its gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from etude._method import method
from etude.weights._birth import Watch
from etude.weights._map import Map


class TopGradient(torch.autograd.Function):
    """w ↦ w; of the gradient only the k entries largest in size come back, as a sparse tensor if that is asked for."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, k: int, sparse: bool) -> Tensor:
        ctx.k, ctx.sparse = k, sparse
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        flat = g.flatten()
        at = flat.abs().topk(ctx.k).indices
        if not ctx.sparse:
            return torch.zeros_like(flat).scatter(0, at, flat[at]).view_as(g), None, None
        places = torch.stack(torch.unravel_index(at, g.shape))
        return torch.sparse_coo_tensor(places, flat[at], g.shape, check_invariants=False), None, None


class Moments(Watch):
    """Σ G Gᵀ and Σ Gᵀ G over batches, then of all weights of one shape; G: [out, in]."""

    needs = "gradient"

    def __init__(self) -> None:
        self.left, self.right = torch.zeros(()), torch.zeros(())

    def see(self, x: Tensor) -> None:
        self.left, self.right = self.left + x @ x.mT, self.right + x.mT @ x


class SparseGrad(Map):
    """W = V θ Uᵀ with V: [out, out] and U: [in, in] orthogonal and fixed; θ's gradient is cut to its largest."""

    V: Tensor
    U: Tensor

    def __init__(self, share: float, sparse: bool) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"sparsegrad: share={share}, of the entries that train in a step, must be in (0, 1]")
        self.share, self.sparse = share, sparse

    def watch(self) -> Watch:
        return Moments()

    def allot(self, watches: list[Watch]) -> None:
        kinds: dict[tuple[int, int], list[Moments]] = {}
        for watch in (cast(Moments, w) for w in watches):
            kinds.setdefault((len(watch.left), len(watch.right)), []).append(watch)
        for kind in kinds.values():
            left = torch.stack([watch.left for watch in kind]).sum(0)
            right = torch.stack([watch.right for watch in kind]).sum(0)
            for watch in kind:
                watch.left, watch.right = left, right

    def born(self, w: Tensor, seen: Watch | None = None) -> None:
        for name, n, of in (("V", len(self.matrix(w)), "left"), ("U", self.matrix(w).shape[1], "right")):
            q = w.new_empty(n, n) if seen is None else torch.linalg.eigh(getattr(seen, of))[1].flip(1)
            self.register_buffer(name, q.to(w).contiguous())

    def forward(self, theta: Tensor) -> Tensor:
        k = max(1, round(self.share * theta.numel()))
        if k < theta.numel() or self.sparse:
            theta = cast(Tensor, TopGradient.apply(theta, k, self.sparse))  # type: ignore[no-untyped-call]
        return self.stored(self.V @ self.matrix(theta) @ self.U.mT, theta)

    def right_inverse(self, w: Tensor) -> Tensor:
        return self.stored(self.V.mT @ self.matrix(w) @ self.U, w)


@method(
    "Chekalina et al. 2024, SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers, arXiv:2410.07383",
    note="the authors keep 28,000 entries of each layer of BERT (1.2%) and 100,000 of LLaMa's",
)
def sparsegrad(share: float = 0.01, sparse: bool = False) -> Map:
    """W = V θ Uᵀ, where the gradient G̃ = Vᵀ G U of θ keeps only its ``share`` of largest entries in each step.

    Put with ``batches=`` and ``loss=``, some 30 batches: V and U are the singular vectors of all gradients stacked
    (HOSVD), one pair for all chosen weights of one shape, in which few entries hold most of a gradient. ``sparse``
    gives the gradient as a sparse tensor, for torch.optim.SparseAdam, which leaves the other entries' moments alone, as
    the paper. The authors' code has Uᵀ for U, and so cuts in another basis than that of the gradients.
    """
    return SparseGrad(share, sparse)
