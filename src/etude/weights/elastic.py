"""Adapters whose ranks are shared out between the weights while they train."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from etude._method import method
from etude.weights._factored import Factored, check_finite, check_rank
from etude.weights._host import following, held
from etude.weights._map import Adapter


class Triplets(Factored):
    """W + alpha / (r + 1e-5) B diag(E) A with A, B ~ N(0, 0.02²) and E: [r, 1] zero; r in the scale stays the first."""

    A: nn.Parameter
    E: nn.Parameter
    B: nn.Parameter

    def __init__(self, method: str, r: int, alpha: float) -> None:
        super().__init__()
        check_rank(method, r=r)
        check_finite(method, alpha=alpha)
        self.r, self.scale = r, alpha / (r + 1e-5)

    def born(self, w: Tensor) -> None:
        self._make(w, self.r)

    def blank(self, w: Tensor, state: Mapping[str, Tensor]) -> None:
        self._make(w, len(state["E"]) if "E" in state else self.r)

    def _make(self, w: Tensor, r: int) -> None:
        out, into = self.matrix(w).shape
        self.A = nn.Parameter(nn.init.normal_(w.new_empty(r, into), std=0.02))
        self.E = nn.Parameter(w.new_zeros(r, 1))
        self.B = nn.Parameter(nn.init.normal_(w.new_empty(out, r), std=0.02))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A * self.E, self.B


class _Importance:
    """Ī · Ū of |θ ∇θ| per triplet: that of its E, plus the means over its row of A and its column of B."""

    def __init__(self, model: nn.Module, betas: tuple[float, float], name: str | None) -> None:
        self.found = [(weight, m) for weight, maps in held(model, name, Triplets) for m in maps]
        self.maps = [m for _, m in self.found if isinstance(m, Triplets)]
        self.betas = betas
        self.mean = [{k: torch.zeros_like(p) for k, p in m.named_parameters()} for m in self.maps]
        self.doubt = [{k: torch.zeros_like(p) for k, p in m.named_parameters()} for m in self.maps]

    @torch.no_grad()
    def see(self) -> None:
        one, two = self.betas
        for m, mean, doubt in zip(self.maps, self.mean, self.doubt, strict=True):
            for k, p in m.named_parameters():
                if p.grad is None:
                    raise ValueError(f"{m!r} has no gradient: call step() after backward, before zero_grad()")
                now = (p * p.grad).abs()
                mean[k].lerp_(now, 1 - one)
                doubt[k].lerp_((now - mean[k]).abs(), 1 - two)

    def scores(self) -> list[Tensor]:
        """One score per triplet.  [r] for every adapter."""
        every = [{k: mean[k] * doubt[k] for k in mean} for mean, doubt in zip(self.mean, self.doubt, strict=True)]
        return [s["E"].flatten() + s["A"].mean(1) + s["B"].mean(0) for s in every]


class RankBudget:
    """AdaLoRA's allocation: ``step()`` after each backward prunes triplets to a budget that shrinks as a cube.

    From a first budget of r per adapter to ``target_r`` in the mean, between the first ``warmup[0]`` steps and the last
    ``warmup[1]``, in which nothing moves. Pruned triplets have E = 0, and may come back until then.
    """

    def __init__(
        self, model: nn.Module, steps: int, target_r: int = 8, warmup: tuple[int, int] = (0, 0), every: int = 1,
        betas: tuple[float, float] = (0.85, 0.85), name: str | None = None,
    ) -> None:  # fmt: skip
        check_rank("RankBudget", steps=steps, target_r=target_r, every=every)
        if sum(warmup) >= steps:
            raise ValueError(f"RankBudget: warmup={warmup!r} leaves none of the steps={steps}")
        self.seen = _Importance(model, betas, name)
        self.steps, self.warmup, self.every, self.t = steps, warmup, every, 0
        self.first = sum(len(m.E) for m in self.seen.maps)
        self.last = target_r * len(self.seen.maps)
        if self.last > self.first:
            raise ValueError(
                f"RankBudget: target_r={target_r} in the mean is more than the adapters have: {self.first}"
            )
        self.kept: list[Tensor] | None = None

    @property
    def budget(self) -> int:
        """How many triplets may live at this step."""
        start, end = self.warmup[0], self.steps - self.warmup[1]
        left = 1 - min(max(self.t - start, 0) / (end - start), 1)
        return int((self.first - self.last) * left**3 + self.last)

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        end = self.steps - self.warmup[1]
        if self.t < end:
            self.seen.see()
        if self.t == end or (self.warmup[0] < self.t < end and self.t % self.every == 0):
            self.kept = self._kept()
        elif self.t < end:
            return
        for m, keep in zip(self.seen.maps, self.kept or [], strict=True):
            m.E.mul_(keep[:, None])

    def _kept(self) -> list[Tensor]:
        scores, gone = self.seen.scores(), self.first - self.budget
        if not gone:
            return [torch.ones_like(s, dtype=torch.bool) for s in scores]
        limit = torch.cat(scores).kthvalue(gone).values
        return [s > limit for s in scores]


class RankMigration:
    """ElaLoRA's allocation: ``step()`` after each backward moves ranks from weak adapters to strong ones.

    Every adapter puts up its ``k`` weakest triplets, all but one at most. The ``b`` weakest of the pool are pruned, and
    those adapters gain one whose entries are among the ``b`` strongest: even their weak triplets matter. A new triplet
    is orthogonal to the others and starts with E of 1e-13. The parameters of adapters that change are new ones: hand in
    the ``optimizer``. The last ``warmup[1]`` steps, and the first ``warmup[0]``, move nothing.
    """

    def __init__(
        self, model: nn.Module, steps: int, k: int = 2, b: int = 4, warmup: tuple[int, int] = (0, 0), every: int = 1,
        betas: tuple[float, float] = (0.85, 0.85), name: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:  # fmt: skip
        check_rank("RankMigration", steps=steps, k=k, b=b, every=every)
        self.model, self.optimizer, self.seen = model, optimizer, _Importance(model, betas, name)
        if len(self.seen.maps) < 2:
            raise ValueError("RankMigration: ranks move between adapters, and there is only one")
        self.steps, self.k, self.b, self.warmup, self.every, self.t = steps, k, b, warmup, every, 0

    def step(self) -> None:
        self.t += 1
        end = self.steps - self.warmup[1]
        if self.t < end:
            self.seen.see()
            if self.t > self.warmup[0] and self.t % self.every == 0:
                self._move()

    @torch.no_grad()
    def _move(self) -> None:
        pool: list[tuple[float, int, int]] = []  # score, adapter, triplet
        for i, score in enumerate(self.seen.scores()):
            weak = score.argsort(stable=True)[: min(self.k, len(score) - 1)]
            pool += [(float(score[j]), i, int(j)) for j in weak]
        pool.sort()
        n = min(self.b, len(pool) // 2)  # an entry is never both
        maps = self.seen.maps
        lose: list[list[int]] = [[] for _ in maps]
        for _, i, j in pool[:n]:
            lose[i].append(j)
        gain = [sum(i == own for _, own, _ in pool[len(pool) - n :]) for i in range(len(maps))]
        changed = [i for i in range(len(maps)) if lose[i] or gain[i]]
        weights = [self.seen.found[i][0] for i in changed]
        gone = [p for i in changed for p in maps[i].parameters()]
        with following(self.optimizer, self.model, weights, gone, "weights.RankMigration"):
            for i in changed:
                self._resize(i, lose[i], gain[i])

    def _resize(self, i: int, lose: list[int], gain: int) -> None:
        m = self.seen.maps[i]
        keep = [j for j in range(len(m.E)) if j not in lose]
        small = min(float(m.E[keep].abs().min()), 1e-13)
        new = {
            "A": _beside(m.A[keep], gain),
            "E": m.E.new_full((gain, 1), small),
            "B": _beside(m.B[:, keep].mT, gain).mT,
        }
        for name, more in new.items():
            axis = 1 if name == "B" else 0
            at = torch.tensor(keep, device=m.E.device)
            old = getattr(m, name)
            setattr(m, name, nn.Parameter(torch.cat([old.index_select(axis, at), more], axis).contiguous()))
            for average in (self.seen.mean[i], self.seen.doubt[i]):
                average[name] = torch.cat([average[name].index_select(axis, at), torch.zeros_like(more)], axis)


def _beside(rows: Tensor, n: int) -> Tensor:
    """n random unit rows orthogonal to the span of ``rows`` and to each other, as far as there is room."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    q = torch.linalg.qr(wide.mT)[0]
    new = torch.randn(n, rows.shape[1], dtype=wide.dtype, device=wide.device)
    for i in range(n):
        left = new[i] - q @ (q.mT @ new[i])
        left = left - q @ (q.mT @ left)
        new[i] = left / left.norm()
        q = torch.cat([q, new[i, :, None]], 1)
    return new.to(rows.dtype)


@method("Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv:2303.10512")
def adalora(r: int = 12, alpha: float = 8.0) -> Adapter:
    """W + alpha / r B diag(E) A with E: [r, 1] from zero, in the form of an SVD, so that single ranks can be pruned.

    ``weights.RankBudget(model, steps, target_r)`` prunes them; ``weights.orthonormality(model)``, times 0.5, joins the
    loss. r in the scale is r + 1e-5, as in the authors' code.
    """
    return Triplets("adalora", r, alpha)


@method(
    "Chang et al. 2025, ElaLoRA: Elastic & Learnable Low-Rank Adaptation for Efficient Model Fine-Tuning, "
    "arXiv:2504.00254"
)
def elalora(r: int = 8, alpha: float = 8.0) -> Adapter:
    """W + alpha / r B diag(E) A with ranks that move between weights while their sum stays: AdaLoRA's map.

    ``weights.RankMigration(model, steps, optimizer=…)`` moves them; ``weights.orthonormality(model)``, times 0.1, joins
    the loss. r in the scale stays the first, as in the authors' code, which has r + 1e-5.
    """
    return Triplets("elalora", r, alpha)
