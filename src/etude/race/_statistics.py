"""The statistics of a race: functions of numbers alone, deterministic, exact where there is no spread."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Values = NDArray[np.float64]
Pair = tuple[float, float]

POWER = 0.8
RESAMPLES = 5_000
FAR = 1_000_000
"""More seeds than anyone will run: beyond it the answer is None."""


def spread(x: Values) -> float:
    """Sample standard deviation, exactly 0 when all values are equal."""
    return float(x.std(ddof=1)) if np.ptp(x) else 0.0


def t_interval(x: Values, level: float = 0.95) -> Pair:
    """mean ± t · sd / √n.  x: [n], n ≥ 2."""
    half = float(special.stdtrit(len(x) - 1, (1 + level) / 2)) * spread(x) / math.sqrt(len(x))
    return float(x.mean()) - half, float(x.mean()) + half


def t_test(x: Values) -> float:
    """Two-sided p of mean 0.  Without spread it is exact: 1 if every value is 0, else 0."""
    if not np.ptp(x):
        return float(x[0] == 0)
    return float(2 * special.stdtr(len(x) - 1, -abs(x.mean()) / (spread(x) / math.sqrt(len(x)))))


def bootstrap_t(x: Values, level: float = 0.95, resamples: int = RESAMPLES) -> Pair | None:
    """Studentised bootstrap interval of the mean, with fixed resamples; None below 5 values or when unbounded."""
    if len(x) < 5:
        return None
    draw = x[_resamples(len(x), resamples)]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (draw.mean(1) - x.mean()) / (np.where(np.ptp(draw, axis=1), draw.std(1, ddof=1), 0) / math.sqrt(len(x)))
        t[np.isnan(t)] = 0  # a resample without spread whose mean is the sample's
        low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    error = spread(x) / math.sqrt(len(x))
    found = float(x.mean() - high * error), float(x.mean() - low * error)
    return found if np.isfinite(found).all() else None


@functools.lru_cache(maxsize=64)
def _resamples(n: int, resamples: int) -> NDArray[np.int64]:
    return np.random.default_rng(n).integers(0, n, (resamples, n))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment, in the order given: p_(i) → max over j ≤ i of (m - j) p_(j), at most 1."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def welch(x: Values, y: Values, level: float = 0.95) -> tuple[float, Pair]:
    """Two-sided p of equal means without equal variances, and the interval of mean(x) - mean(y)."""
    difference = float(x.mean() - y.mean())
    if not np.ptp(x) and not np.ptp(y):
        return float(x[0] == y[0]), (difference, difference)
    test = stats.ttest_ind(x, y, equal_var=False)
    return float(test.pvalue), tuple(map(float, test.confidence_interval(level)))  # type: ignore[return-value]


def power(n: int, effect: float, alpha: float) -> float:
    """Chance that a paired t on n pairs finds an effect (in sd of the differences) on its right side: noncentral t."""
    return float(1 - special.nctdtr(n - 1, effect * math.sqrt(n), special.stdtrit(n - 1, 1 - alpha / 2)))


@functools.lru_cache(maxsize=256)
def detectable(n: int, alpha: float) -> float:
    """The smallest effect, in sd of the differences, that n pairs find with 80 % power."""
    top = 1.0
    while power(n, top, alpha) < POWER:
        top *= 2
    return float(optimize.brentq(lambda effect: power(n, effect, alpha) - POWER, 0.0, top))


@functools.lru_cache(maxsize=1024)
def seeds_needed(effect: float, alpha: float) -> int | None:
    """The fewest pairs that find this effect, in sd of the differences, with 80 % power; None beyond a million."""
    low, high = 1, 2
    while power(high, abs(effect), alpha) < POWER:
        low, high = high, high * 2
        if high > FAR:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, abs(effect), alpha) >= POWER else (middle, high)
    return high


def visible_effect(n: int, contenders: int, rho: float = 0.0, alpha: float = 0.05) -> float:
    """The smallest difference, in standard deviations of a seed, that a race will see with 80 % power.

    ``n``: final seeds. ``contenders``: how many meet the baseline (Holm's first step tests at alpha / contenders).
    ``rho``: correlation across seeds; a paired difference has sd √(2 (1 - rho)).
    """
    if n < 2 or contenders < 1:
        raise ValueError(
            f"a race needs at least 2 final seeds and 1 contender beside the baseline, got {n} and {contenders}"
        )
    return detectable(n, alpha / contenders) * math.sqrt(2 * (1 - rho))
