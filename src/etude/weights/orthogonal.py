"""Maps whose weight is orthogonal: the rows of [out, in], or its columns where it is tall, are orthonormal.

A kernel counts as [out, in · kh · kw]. A weight is first replaced by the orthogonal one nearest to it. θ is stored as
the weight, and what stands below its diagonal (on it too, for reflections) is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from etude._linalg import compact_wy
from etude._method import method
from etude.weights._factors import eye, wide
from etude.weights._map import Map

BLOCK = 64
"""Reflections per block: enough for fast products, few enough that the Gram matrices stay cheap."""


class Orthogonal(Map):
    """W, or its transpose where it is wide, is Q(θ) diag(sign): [n, k] with n ≥ k, sign: ±1."""

    changes = "it becomes the nearest orthogonal one"
    sign: Tensor

    def born(self, w: Tensor) -> None:
        self.register_buffer("sign", w.new_ones(min(self.matrix(w).shape)))

    def forward(self, theta: Tensor) -> Tensor:
        return self._as(theta, self.q(wide(self._tall(theta))) * self.sign)

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> Tensor:
        if w.is_meta:
            return w
        u, _, vh = torch.linalg.svd(wide(self._tall(w)), full_matrices=False)
        theta, sign = self.theta(u @ vh)
        self.sign.copy_(sign)
        return self._as(w, theta)

    def product(self, theta: Tensor, x: Tensor) -> Tensor:
        """x Wᵀ, without W where the rows of x are few."""
        if x.numel() > theta.numel():
            return F.linear(x, self.matrix(self(theta)))
        rows, v = wide(x.reshape(-1, x.shape[-1])), wide(self._tall(theta))
        tall = v.shape == self.matrix(theta).shape
        y = self.back(rows * self.sign, v) if tall else self.through(rows, v) * self.sign
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    def q(self, v: Tensor) -> Tensor:
        """Q: [n, k] of θ: [n, k]."""
        raise NotImplementedError

    def through(self, x: Tensor, v: Tensor) -> Tensor:
        """x Q; x: [rows, n]."""
        return x @ self.q(v)

    def back(self, x: Tensor, v: Tensor) -> Tensor:
        """x Qᵀ; x: [rows, k]."""
        return x @ self.q(v).mT

    def theta(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """θ: [n, k] and sign: [k] with Q(θ) diag(sign) = q."""
        raise NotImplementedError

    def _tall(self, w: Tensor) -> Tensor:
        m = self.matrix(w)
        return m if m.shape[0] >= m.shape[1] else m.mT

    def _as(self, w: Tensor, tall: Tensor) -> Tensor:
        m = tall if tall.shape == self.matrix(w).shape else tall.mT
        return self.stored(m.contiguous().to(w.dtype), w)


class Householder(Orthogonal):
    """Q = H₁ … H_k, the first k columns; column i of θ, from its diagonal on, is uᵢ."""

    def q(self, v: Tensor) -> Tensor:
        v = v.tril()
        q = v.new_zeros(v.shape[0] - v.shape[1], 0)
        for _, u in reversed(self._blocks(v)):  # Q of the reflections from j on, which leave the first j coordinates
            z, b = compact_wy(u), u.shape[1]
            zq = torch.cat([z[:, :b], z[:, b:] @ q], 1)
            q = torch.addmm(torch.block_diag(eye(b, u), q), u, zq, alpha=-1)  # type: ignore[no-untyped-call]
        return q

    def through(self, x: Tensor, v: Tensor) -> Tensor:
        k = v.shape[1]
        for j, u in self._blocks(v.tril()):
            rest = x[:, j:]
            x = torch.cat([x[:, :j], torch.addmm(rest, rest @ u, compact_wy(u), alpha=-1)], 1)
        return x[:, :k]

    def back(self, x: Tensor, v: Tensor) -> Tensor:
        x = F.pad(x, (0, v.shape[0] - v.shape[1]))
        for j, u in reversed(self._blocks(v.tril())):
            rest = x[:, j:]
            x = torch.cat([x[:, :j], torch.addmm(rest, rest @ compact_wy(u).mT, u.mT, alpha=-1)], 1)
        return x

    def theta(self, q: Tensor) -> tuple[Tensor, Tensor]:
        a, tau = torch.geqrf(q)
        k = q.shape[1]
        # where tau is 0 the reflection is left out, and ours, of uᵢ = eᵢ, turns the sign
        sign = a.diagonal().sign() * torch.where(tau == 0, -1, 1)
        return a.tril(-1) + F.pad(eye(k, q), (0, 0, 0, q.shape[0] - k)), sign

    def _blocks(self, v: Tensor) -> list[tuple[int, Tensor]]:
        return [(j, v[j:, j : j + BLOCK]) for j in range(0, v.shape[1], BLOCK)]


class Cayley(Orthogonal):
    """Q = (I + A)⁻¹ (I − A), the first k columns; A = [[S, −Bᵀ], [B, 0]], S: [k, k] skew, B: [n − k, k]."""

    def q(self, v: Tensor) -> Tensor:
        k = v.shape[1]
        top = torch.linalg.inv(self._schur(v))
        return torch.cat([2 * top - eye(k, v), -2 * v[k:] @ top])

    def through(self, x: Tensor, v: Tensor) -> Tensor:
        k = v.shape[1]
        top = x[:, :k]
        y: Tensor = torch.linalg.solve(self._schur(v).mT, (top - x[:, k:] @ v[k:]).mT).mT
        return 2 * y - top

    def back(self, x: Tensor, v: Tensor) -> Tensor:
        z = 2 * torch.linalg.solve(self._schur(v), x.mT).mT
        return torch.cat([z - x, -z @ v[v.shape[1] :].mT], 1)

    def theta(self, q: Tensor) -> tuple[Tensor, Tensor]:
        k = q.shape[1]
        a, tau = torch.geqrf(q)  # the signs with which no pivot of I + q diag(sign) is small
        sign = a.diagonal().sign() * torch.where(tau == 0, 1, -1)
        schur = torch.linalg.inv((q[:k] * sign + eye(k, q)) / 2)
        below = -0.5 * (q[k:] * sign) @ schur
        rest = schur - below.mT @ below
        return torch.cat([((rest - rest.mT) / 2).tril(-1), below]), sign

    def _schur(self, v: Tensor) -> Tensor:
        """I + S + BᵀB, whose inverse is the first block of (I + A)⁻¹."""
        k = v.shape[1]
        s = v[:k].tril(-1)
        return eye(k, v) + s - s.mT + v[k:].mT @ v[k:]


class MatrixExp(Orthogonal):
    """Q = base exp(A), the first k columns; A as for Cayley. base: [n, n] is the weight as it was put, with A = 0."""

    base: Tensor

    def born(self, w: Tensor) -> None:
        super().born(w)
        self.register_buffer("base", eye(max(self.matrix(w).shape), w))

    def q(self, v: Tensor) -> Tensor:
        n, k = v.shape
        a = F.pad(v.tril(-1), (0, n - k))
        turned: Tensor = torch.linalg.matrix_exp(a - a.mT)[:, :k]
        return self.base.to(v.dtype) @ turned

    def theta(self, q: Tensor) -> tuple[Tensor, Tensor]:
        full, r = torch.linalg.qr(q, mode="complete")
        k = q.shape[1]
        self.base.copy_(torch.cat([q, full[:, k:]], 1))
        return torch.zeros_like(q), torch.ones_like(r.diagonal())


@method(
    "Mhammedi et al. 2017, Efficient Orthogonal Parametrisation of Recurrent Neural Networks Using Householder "
    "Reflections, arXiv:1612.00188"
)
def householder() -> Map:
    """W = H₁ … H_k diag(±1) with Hᵢ = I − 2 uᵢ uᵢᵀ / ‖uᵢ‖², uᵢ zero above i: every orthogonal W; k ≤ n are its sides.

    The fastest of the three: products of blocks of reflections, and of them with x where its rows are few.
    """
    return Householder()


@method("Helfrich et al. 2018, Orthogonal Recurrent Neural Networks with Scaled Cayley Transform, arXiv:1707.09520")
def cayley() -> Map:
    """W = (I + A)⁻¹ (I − A) diag(±1), A skew: every orthogonal W, the signs being fixed when the map is put."""
    return Cayley()


@method("Lezcano-Casado 2019, Trivializations for Gradient-Based Optimization on Manifolds, arXiv:1909.09501")
def matrix_exp() -> Map:
    """W = W0 exp(A), A skew and 0 at first: geodesics from the weight W0 that the map was put on.

    Costs two orders of magnitude more than a product; ``householder`` reaches the same weights for a few products.
    """
    return MatrixExp()
