"""Maps by a fixed mask: weights that stay zero, and entries that train alone."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from etude._method import method
from etude.weights._birth import Watch
from etude.weights._map import Adapter, Map


class Mask(Map):
    """W = m ∘ V, with m from the smallest entries of the weight it was put on; m: as W, True where an entry is kept."""

    changes = "its smallest entries become 0"
    drops = "its mask is fixed, so what is assigned to its zeros is lost"
    m: Tensor

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        if not 0 < sparsity < 1:
            raise ValueError(f"magnitude_mask: sparsity={sparsity}, the share of zeros, must be between 0 and 1")
        self.sparsity = sparsity

    def born(self, w: Tensor) -> None:
        cut = round(self.sparsity * w.numel())
        if not cut:
            raise ValueError(f"a sparsity of {self.sparsity} leaves all {w.numel()} entries of this weight")
        least = w.detach().abs().flatten().topk(cut, largest=False).indices
        kept = torch.ones(w.numel(), dtype=torch.bool, device=w.device).scatter(0, least, False)
        self.register_buffer("m", kept.view(w.shape))

    def forward(self, w: Tensor) -> Tensor:
        return torch.where(self.m, w, 0.0)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.clone()  # torch trains what it is given, and the values of the start may be wanted again


class Importance(Watch):
    """Σ over examples of the gradient's squares, or sizes; then ``index``: [k], the entries that ``allot`` chose."""

    needs = "gradient"

    def __init__(self, grad: str) -> None:
        self.square, self.sum, self.index = grad == "square", torch.zeros(()), torch.empty(0)

    def see(self, x: Tensor) -> None:
        self.sum = self.sum + (x.square() if self.square else x.abs())


class Fish(Adapter):
    """W but for k of its entries, which are θ: [k]; index: [k], their places in the weight as [out, …], flattened."""

    theta: Tensor
    index: Tensor

    def __init__(self, keep: float, grad: str, whole: int) -> None:
        super().__init__()
        if not 0 < keep <= 1 or whole < 0:
            raise ValueError(f"fish_mask: keep={keep} must be in (0, 1], and whole={whole} at least 0")
        if grad not in ("square", "absolute"):
            raise ValueError(f'fish_mask: grad={grad!r} must be "square" or "absolute"')
        self.keep, self.grad, self.whole = keep, grad, whole

    def takes(self, w: Tensor) -> bool:
        return w.ndim > 0 and w.numel() > 0

    def watch(self) -> Watch:
        return Importance(self.grad)

    def allot(self, watches: list[Watch]) -> None:
        sums = [cast(Importance, watch).sum.flatten() for watch in watches]
        sizes = [len(s) for s in sums]
        k = self.keep * (sum(sizes) + self.whole) - self.whole
        if k < 0:
            raise ValueError(f"fish_mask: the {self.whole} that train anyway are more than keep={self.keep} allows")
        chosen = torch.zeros(sum(sizes), dtype=torch.bool).scatter(
            0, torch.cat(sums).cpu().topk(max(1, int(k))).indices, True
        )
        for watch, mine in zip(watches, torch.split(chosen, sizes)):
            cast(Importance, watch).index = mine.nonzero()[:, 0]

    def born(self, w: Tensor, seen: Watch | None = None) -> None:
        index = w.new_empty(0, dtype=torch.long) if seen is None else cast(Importance, seen).index.to(w.device)
        self._hold(index, self._rows(w).flatten()[index].clone())

    def _hold(self, index: Tensor, theta: Tensor) -> None:
        self.register_buffer("index", index)
        if len(index):
            self.theta = nn.Parameter(theta)
        else:  # a weight without chosen entries is frozen whole
            self.register_buffer("theta", theta)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        index = state_dict.get(f"{prefix}index")
        if index is not None and index.shape != self.index.shape:  # how many there are is known from the data alone
            held = self.theta
            del self.theta
            self._hold(self.index.new_empty(len(index)), held.new_empty(len(index)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, w: Tensor) -> Tensor:
        rows = self._rows(w)
        rows = rows.flatten().scatter(0, self.index, self.theta).view(rows.shape)
        return (rows.movedim(0, self.axis) if w.ndim > 1 else rows).contiguous()

    def _rows(self, w: Tensor) -> Tensor:
        return w.movedim(self.axis, 0) if w.ndim > 1 else w


@method(
    "Frankle and Carbin 2019, The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks, "
    "arXiv:1803.03635"
)
def magnitude_mask(sparsity: float = 0.5) -> Map:
    """W = m ∘ V with m = 0 at the ``sparsity`` share of entries of each weight that were smallest in size, for good.

    Put on a trained model it prunes, and the rest trains on. A winning ticket: put it, then assign the values of the
    start (``layer.weight = w0``), and train again. To prune in rounds, ``merge`` and put it anew.
    """
    return Mask(sparsity)


@method("Sung et al. 2021, Training Neural Networks with Fixed Sparse Masks, arXiv:2111.09839")
def fish_mask(keep: float = 0.005, grad: Literal["square", "absolute"] = "square", whole: int = 0) -> Adapter:
    """W with only k of all weights' entries trained, those of largest Fisher information Σₙ (∂ log p(yₙ|xₙ) / ∂w)².

    Put on all but the head with ``batches=`` of one example each (of several, the gradients would cancel before they
    are squared) and ``loss=``, some 1,024 examples; then only those entries, and the head, train. k is
    keep · (n + whole) − whole, of n entries: ``whole`` is the size of the head, which the paper counts in its budget.
    For the paper's expectation over labels, give each x with each y and the loss √p(y|x) · log p(y|x), p detached.
    """
    return Fish(keep, grad, whole)
