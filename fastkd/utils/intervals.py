"""Intervals of measures on sequences, of 95% unless another share is given. A sequence is the unit: positions within
one are not independent.

Means have intervals by Student's t: a percentile bootstrap of a dozen sequences is too narrow, and draws at random.
Other measures (the calibration error) get their standard error from a bootstrap over sequences with a fixed seed, so
that two measures of the same sequences have the same resamples and can be subtracted.
"""

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 1000
TAIL = 0.025
"""The share outside an interval of 95%, at either end."""
_SEED = 0


NO_INTERVAL = "no interval, as fewer than two held-out windows (in a mixture, of one cache) have positions that count"
"""Why the half of an interval is infinite."""


class Interval(NamedTuple):
    """A mean, and half the width of its interval (infinite for a single sequence)."""

    mean: float
    half: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.half)

    @property
    def excludes_zero(self) -> bool:
        """Whether the mean is further from zero than the interval is wide."""
        return self.known and abs(self.mean) > self.half

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def ratio_interval(sums: Floats, counts: Floats, *, tail: float = TAIL) -> Interval:
    """Σ sums / Σ counts over sequences `[n]`, and its interval, outside of which lies `tail` at either end.

    The mean over positions, of sequences of unequal counts: the ratio estimator with its linearised variance (Cochran,
    Sampling Techniques, 1977, chapter 6), and Student's t. With equal counts it is that of the mean of their means.
    """
    n, total = len(sums), float(counts.sum())
    mean = float(sums.sum()) / total
    if n < 2:
        return Interval(mean, math.inf)
    residual = sums - mean * counts
    return Interval(mean, t_quantile(n - 1, tail) * math.sqrt(n / (n - 1) * float(residual @ residual)) / total)


def bootstrap_interval(statistic: Callable[[Floats], Floats], sequences: int) -> Interval:
    """A statistic of all sequences, and its 95% interval: Student's t times the bootstrap's standard error.

    statistic: maps how often each sequence is taken, `[resamples, sequences]`, to values `[resamples]`. The resamples
    depend only on the number of sequences.
    """
    mean = float(statistic(np.ones((1, sequences)))[0])
    if sequences < 2:
        return Interval(mean, math.inf)
    random = np.random.default_rng(_SEED)
    values: list[float] = []
    at_once = max(1, min(RESAMPLES, 2**22 // sequences))
    while len(values) < RESAMPLES:
        size = min(at_once, RESAMPLES - len(values))
        taken = random.integers(0, sequences, (size, sequences)) + sequences * np.arange(size)[:, None]
        times = np.bincount(taken.ravel(), minlength=size * sequences).reshape(size, sequences)
        values += statistic(times.astype(np.float64)).tolist()
    return Interval(mean, t_quantile(sequences - 1) * stdev(values))


def to_json(found: Interval) -> dict[str, Any]:
    """Mean and ends in values that JSON can hold; null for the ends of an infinite interval, and why."""
    if found.known:
        return {"mean": found.mean, "low": found.low, "high": found.high}
    return {"mean": found.mean, "low": None, "high": None, "why": NO_INTERVAL}


@cache
def t_quantile(df: int, tail: float = TAIL) -> float:
    """The quantile of Student's t that a share of `tail` lies above.

    Up to 60 degrees of freedom from the distribution function in closed form (Abramowitz & Stegun, 26.7.3 and 26.7.4),
    by bisection; above by the Cornish-Fisher series (26.7.5), which is then right to 1e-5.
    """
    z = NormalDist().inv_cdf(1.0 - tail)
    if df > 60:
        series = (
            z,
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        )
        return float(sum(term / df**power for power, term in enumerate(series)))
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(df)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _above(middle, df) > tail else (low, middle)
    return math.sqrt(df) * math.tan(0.5 * (low + high))


def _above(angle: float, df: int) -> float:
    """The share of Student's t above sqrt(df) * tan(angle), for an angle from 0 to pi / 2."""
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2:
        term, total = cosine, 0.0
        for k in range(1, df - 1, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        within = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(0, df, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        within = sine * total
    return 0.5 * (1.0 - within)
