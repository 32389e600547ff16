"""Sequences through a linear state: the same layer as one long convolution and as a recurrence."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method

Spectrum = Literal["lin", "inv"]
Rule = Literal["zoh", "bilinear"]


class S4D(nn.Module):
    """GLU(linear(gelu(2 Re Σₙ C[n] s[n] + D u))) with s′ = A s + u, A: [d, n / 2] diagonal, one system per feature."""

    _role = "vector"  # of what the system itself is made of; the matrix after it is a linear layer of its own

    def __init__(self, d: int, n: int, spectrum: Spectrum, rule: Rule, dt: tuple[float, float], dropout: float):
        super().__init__()
        self.rule = rule
        self.log_dt = nn.Parameter(torch.empty(d).uniform_(*map(math.log, dt)))
        self.log_decay = nn.Parameter(torch.full((d, n // 2), math.log(0.5)))
        k = torch.arange(n // 2)
        frequency = math.pi * k if spectrum == "lin" else n / math.pi * (n / (2 * k + 1) - 1)
        self.frequency = nn.Parameter(frequency.expand(d, -1).clone())
        self.c = nn.Parameter(torch.randn(d, n // 2, 2) / math.sqrt(2))  # E |C|² = 1
        self.D = nn.Parameter(torch.randn(d))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(d, 2 * d)

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """log Ā, B̄ and C of s ← Ā s + B̄ u, each complex [d, n / 2]."""
        wide = torch.promote_types(self.c.dtype, torch.float32)
        log_dt, log_decay, frequency, c = (p.to(wide) for p in (self.log_dt, self.log_decay, self.frequency, self.c))
        a, dt = torch.complex(-log_decay.exp(), frequency), log_dt.exp()[:, None]
        if self.rule == "zoh":
            log_a, b = dt * a, torch.expm1(dt * a) / a
        else:
            log_a, b = ((1 + dt * a / 2) / (1 - dt * a / 2)).log(), dt / (1 - dt * a / 2)
        return log_a, b, torch.complex(c[..., 0], c[..., 1])

    def kernel(self, length: int) -> Tensor:
        """What an impulse makes of the output, 2 Re Σₙ C B̄ Āˡ for l = 0 … length − 1. [d, length]"""
        log_a, b, c = self.discrete()
        powers = (log_a[..., None] * torch.arange(length, device=c.device)).exp()
        return 2 * torch.einsum("dn,dnl->dl", b * c, powers).real

    def forward(self, u: Tensor) -> Tensor:
        if u.ndim != 3:
            raise ValueError(f"s4d takes sequences [b, t, d], got shape {list(u.shape)}")
        if not u.numel():  # which the Fourier transform does not take
            return self._out(u, u)
        t, x = u.shape[1], u.mT.to(torch.promote_types(u.dtype, torch.float32))
        spectrum = torch.fft.rfft(x, 2 * t) * torch.fft.rfft(self.kernel(t).to(x.dtype), 2 * t)  # 2 t: no wrapping
        y = torch.fft.irfft(spectrum, 2 * t)[..., :t].mT
        return self._out(y.to(u.dtype), u)

    def step(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One position: (u [b, d], state [b, d, n / 2] or None at the start) → (y [b, d], the next state)."""
        log_a, b, c = self.discrete()
        state = b * u[..., None] + (0 if state is None else log_a.exp() * state)
        y = 2 * torch.einsum("dn,bdn->bd", c, state).real
        return self._out(y.to(u.dtype), u), state

    def _out(self, y: Tensor, u: Tensor) -> Tensor:
        return F.glu(self.linear(self.dropout(F.gelu(y + self.D.to(u.dtype) * u))))

    def extra_repr(self) -> str:
        return f'states={2 * self.frequency.shape[1]}, rule="{self.rule}"'


@method(
    "Gu et al. 2022, On the Parameterization and Initialization of Diagonal State Space Models, arXiv:2206.11893",
    note="log_dt, log_decay and frequency want no weight decay and often a smaller lr, e.g. 1e-3 (the authors' code)",
)
def s4d(
    d: int,
    n: int = 64,
    spectrum: Spectrum = "lin",
    rule: Rule = "zoh",
    dt: tuple[float, float] = (0.001, 0.1),
    dropout: float = 0.0,
) -> S4D:
    """y = GLU(W gelu(k ∗ u + D u)), k[l] = 2 Re Σ C B̄ Āˡ of s′ = A s + u, sampled every dt. u: [b, t, d].

    A = −½ + iω for n / 2 of n states, the others their conjugates: ω = π k ("lin") or n/π (n/(2k+1) − 1) ("inv").
    ``rule``: how time becomes discrete, Ā = exp(dt A), u held between samples ("zoh"), or (1 + dt A/2) / (1 − dt A/2).
    dt is drawn log-uniformly from its range, one per feature, in units of one position. ``step`` is the recurrence.
    """
    if n < 2 or n % 2 or not 0 < dt[0] <= dt[1]:
        raise ValueError(f"s4d needs an even n and 0 < dt[0] ≤ dt[1], got n={n} and dt={dt}")
    return S4D(d, n, spectrum, rule, dt, dropout)
