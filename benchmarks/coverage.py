"""How often the race's statistics are right, by simulation: ``python -m benchmarks.coverage`` (docs/statistics.md)."""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from etude.race._statistics import POWER, bootstrap_t, power, t_interval, visible_effect
from etude.race.looks import looks_of, split

NS = (6, 10, 20)
DRAWS = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
    "log-normal": (lambda rng, shape: rng.lognormal(size=shape), math.exp(0.5)),
    "difference of two exponentials": (lambda rng, shape: rng.exponential(size=shape) - rng.exponential(size=shape), 0.0),
}  # fmt: skip
"""What is drawn, and its mean."""


def coverage(samples: int = 4_000) -> list[tuple[str, ...]]:
    """Share of samples whose 95 % interval holds the mean: by t, and by bootstrap-t."""
    rows = []
    for name, (draw, mean) in DRAWS.items():
        cells = []
        for n in NS:
            x = draw(np.random.default_rng(n), (samples, n))
            by_t = [low <= mean <= high for low, high in map(t_interval, x)]
            boot = [found[0] <= mean <= found[1] for row in x if (found := bootstrap_t(row, resamples=999))]
            cells += [f"{np.mean(by_t):.3f}", f"{np.mean(boot):.3f}"]
        rows.append((name, *cells))
    return rows


def p_values(d: np.ndarray) -> np.ndarray:
    """Paired t.  d: [races, contenders, n]."""
    n = d.shape[-1]
    return 2 * special.stdtr(n - 1, -np.abs(d.mean(-1) / (d.std(-1, ddof=1) / math.sqrt(n))))


def false_words(races: int = 40_000) -> list[tuple[str, ...]]:
    """Share of races of contenders that all are the baseline in which any gets a word, by one look and by four."""
    rows = []
    for contenders in (1, 3, 9):
        x = np.random.default_rng(contenders).normal(size=(races, contenders + 1, 30))
        d = x[:, 1:] - x[:, :1]
        smallest = {n: p_values(d[..., :n]).min(1) * contenders for n in looks_of(30)}
        planned = [smallest[n] <= a for n, a in zip(looks_of(30), split(looks_of(30), 0.05))]
        peeking = [smallest[n] <= 0.05 for n in looks_of(30)]
        shares = (smallest[10] <= 0.05, np.logical_or.reduce(planned), np.logical_or.reduce(peeking))
        rows.append((str(contenders), *(f"{share.mean():.3f}" for share in shares)))
    return rows


def achieved(races: int = 20_000) -> list[tuple[str, ...]]:
    """Power of the effect that the plan says a race can see: planned, and as simulated."""
    rows = []
    for n, contenders in ((6, 1), (10, 1), (10, 3), (20, 3), (30, 9)):
        x = np.random.default_rng(n).normal(size=(races, contenders + 1, n))
        effect = visible_effect(n, contenders)
        x[:, 1] -= effect
        d = x[:, 1:] - x[:, :1]
        found = (p_values(d)[:, 0] * contenders <= 0.05) & (d[:, 0].mean(-1) < 0)
        planned = power(n, effect / math.sqrt(2), 0.05 / contenders)
        assert abs(planned - POWER) < 1e-6
        rows.append((str(n), str(contenders), f"{effect:.2f}", f"{planned:.3f}", f"{found.mean():.3f}"))
    return rows


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(("data", *(f"{kind}, n = {n}" for n in NS for kind in ("t", "bootstrap-t"))), coverage()), end="\n\n")
    print(
        table(("contenders", "one look at 10", "four planned looks", "four looks at .05 each"), false_words()),
        end="\n\n",
    )
    print(table(("n", "contenders", "effect, sd of a seed", "planned", "simulated"), achieved()))
