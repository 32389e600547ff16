"""What adaptive rules remember of the gradient and its square, and how they divide by it. u, g: [k, …], or flat [n]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from etude.rules._rule import Context, Part, State, begin_, debias, mix_, mix_square_


def zeros(w: Tensor, *names: str) -> dict[str, Tensor]:
    """State like w under these names, at step 0."""
    return {name: torch.zeros_like(w) for name in names}


@dataclass(frozen=True)
class Debias(Part):
    """u / (1 − βᵗ): an average of u that began at 0, freed of that."""

    beta: float = 0.9

    def clock(self, t: int) -> dict[str, float]:
        return {"debias": debias(self.beta, t)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return torch.mul(u, c.debias)


@dataclass(frozen=True)
class RootSum(Part):
    """u / (√(v₀ + Σ g²) + ε): nothing of the past is forgotten."""

    eps: float = 1e-10
    initial: float = 0.0

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "sum")

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        s.sum.addcmul_(g, g)
        return torch.div(u, (s.sum + c.initial).sqrt_().add_(c.eps))


@dataclass(frozen=True)
class Deviation(Part):
    """u / (√(v − n²) + ε), v and n the averages of g² and g: divides by the gradient's standard deviation."""

    beta: float = 0.99
    eps: float = 1e-8

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "square_avg", "grad_avg")

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        v, n = mix_square_(s.square_avg, g, c.beta), mix_(s.grad_avg, g, c.beta)
        return torch.div(u, torch.addcmul(v, n, n, value=-1).clamp_(min=0).sqrt_().add_(c.eps))


@dataclass(frozen=True)
class Largest(Part):
    """u / v with v ← max(β v, |g| + ε): an infinity norm that fades."""

    beta: float = 0.999
    eps: float = 1e-8

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "exp_inf")

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return torch.div(u, s.exp_inf.copy_(torch.maximum(s.exp_inf * c.beta, g.abs() + c.eps)))


@dataclass(frozen=True)
class Belief(Part):
    """u / (√(v / (1 − βᵗ)) + ε) with v ← β v + (1 − β)(g − u)² + ε, u the average of g: how far g was expected."""

    beta: float = 0.999
    eps: float = 1e-16

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "exp_avg_var")

    def clock(self, t: int) -> dict[str, float]:
        return {"debias": debias(self.beta, t)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        v = mix_square_(s.exp_avg_var, g - u, c.beta).add_(c.eps)
        return torch.div(u, (v * c.debias).sqrt_().add_(c.eps))


@dataclass(frozen=True)
class Rectified(Part):
    """r u / (√v̂ + ε) once the average of g² is worth more than ``threshold`` gradients (ρ), before that u; r from ρ."""

    beta: float = 0.999
    eps: float = 1e-8
    threshold: float = 4.0

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "exp_avg_sq")

    def clock(self, t: int) -> dict[str, float]:
        most, bias = 2 / (1 - self.beta) - 1, 1 - self.beta**t
        rho = most - 2 * t * (1 - bias) / bias
        known = rho > max(self.threshold, 4.0)
        square = (rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho) if known else 0.0
        return {"debias": 1 / bias, "adaptive": square**0.5, "plain": float(not known)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        v = mix_square_(s.exp_avg_sq, g, c.beta)
        return torch.mul(u, c.adaptive / (v * c.debias).sqrt_().add_(c.eps) + c.plain)


@dataclass(frozen=True)
class Rooted(Part):
    """clip(u / max(√v, ε), ±(t − 1)^¼), and only then v ← β v + (1 − β) g²: v never holds the g it divides.

    At the first step v is g² and the result 0.
    """

    beta: float = 0.9999
    eps: float = 1e-6

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "exp_avg_sq")

    def clock(self, t: int) -> dict[str, float]:
        return {"most": (t - 1) ** 0.25, "keep": self.beta if t > 1 else 0.0}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        x = torch.div(u, s.exp_avg_sq.sqrt().clamp_(min=c.eps))
        mix_square_(s.exp_avg_sq, g, c.keep)
        return x.clamp_(-c.most, c.most)


@dataclass(frozen=True)
class Atan2(Part):
    """a · atan2(u, b √(v / (1 − βᵗ))) with v ← β v + (1 − β) g²: needs no ε and steps by at most a π / 2."""

    beta: float = 0.99
    a: float = 1.27
    b: float = 1.0

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "exp_avg_sq")

    def clock(self, t: int) -> dict[str, float]:
        return {"debias": debias(self.beta, t)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        v = mix_square_(s.exp_avg_sq, g, c.beta)
        return torch.atan2(u, (v * c.debias).sqrt_().mul_(c.b)).mul_(c.a)


@dataclass(frozen=True)
class Anticipate(Part):
    """μₜ₊₁ m / (1 − μ₁⋯μₜ₊₁) + (1 − μₜ) u / (1 − μ₁⋯μₜ) with m ← β m + (1 − β) u and μₜ = β (1 − ½ · 0.96^(ψ t)).

    Nesterov's momentum, whose weight μ rises from β / 2 to β at the pace ψ = ``momentum_decay``.
    """

    beta: float = 0.9
    momentum_decay: float = 4e-3

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "exp_avg")

    def clock(self, t: int) -> dict[str, float]:
        def mu(i: int) -> Any:
            return self.beta * (1 - 0.5 * 0.96 ** (i * self.momentum_decay))

        product: Any = 1.0
        for i in range(1, t + 1):
            product = product * mu(i)
            if (product.max() if isinstance(product, Tensor) else product) < 1e-18:
                break  # 1 − product is 1
        return {"now": (1 - mu(t)) / (1 - product), "next": mu(t + 1) / (1 - product * mu(t + 1))}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return torch.add(u * c.now, mix_(s.exp_avg, u, c.beta) * c.next)


@dataclass(frozen=True)
class SlowEma(Part):
    """u + α n with n ← β₃ n + (1 − β₃) g: an average over tens of thousands of steps beside the fast one.

    Over the first ``warmup`` steps α rises from 0 and β₃ from β₁, its half-life linearly.
    """

    alpha: float = 5.0
    beta3: float = 0.9999
    warmup: int = 0
    beta1: float = 0.9

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "exp_avg_slow")

    def clock(self, t: int) -> dict[str, float]:
        if t >= self.warmup:
            return {"share": self.alpha, "keep": self.beta3}
        done = t / self.warmup
        fast, slow = math.log(self.beta1), math.log(self.beta3)
        keep = math.exp(fast * slow / ((1 - done) * slow + done * fast))
        return {"share": done * self.alpha, "keep": min(keep, self.beta3)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        return torch.add(u, mix_(s.exp_avg_slow, g, c.keep) * c.share)


@dataclass(frozen=True)
class Adan(Part):
    """(m̂ + β₂ d̂) / (√n̂ + ε): averages of g, of its change δ = g − g₋₁, and of (g + β₂ δ)²; Nesterov's gradient at
    no second pass."""

    reads: ClassVar[tuple[str, ...]] = ("t",)
    beta1: float = 0.98
    beta2: float = 0.92
    beta3: float = 0.99
    eps: float = 1e-8

    def init(self, w: Tensor) -> dict[str, Tensor]:
        return zeros(w, "exp_avg", "exp_avg_diff", "exp_avg_sq", "previous")

    def clock(self, t: int) -> dict[str, float]:
        return {f"debias{i}": debias(beta, t) for i, beta in enumerate((self.beta1, self.beta2, self.beta3), 1)}

    def __call__(self, u: Tensor, g: Tensor, w: Tensor, s: State, c: Context) -> Tensor:
        change = g - begin_(s.previous, g, c.t)
        s.previous.copy_(g)
        m, d = mix_(s.exp_avg, g, c.beta1), mix_(s.exp_avg_diff, change, c.beta2)
        n = mix_square_(s.exp_avg_sq, change.mul_(c.beta2).add_(g), c.beta3)
        return torch.add(m * c.debias1, d * (c.beta2 * c.debias2)).div_((n * c.debias3).sqrt_().add_(c.eps))
