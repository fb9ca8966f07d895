"""95% intervals of measures on sequences. A sequence is the unit: positions within one are not independent.

Means have intervals by Student's t: a percentile bootstrap of a dozen sequences is too narrow, and draws at random.
Other measures (the calibration error) get their standard error from a bootstrap over sequences with a fixed seed, so
that two measures of the same sequences have the same resamples and can be subtracted.
"""

import math
from collections.abc import Callable
from statistics import NormalDist, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 1000
_SEED = 0


class Interval(NamedTuple):
    """A mean, and half the width of its 95% interval (infinite for a single sequence)."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def ratio_interval(sums: Floats, counts: Floats) -> Interval:
    """Σ sums / Σ counts over sequences `[n]`, and its 95% interval.

    The mean over positions, of sequences of unequal counts: the ratio estimator with its linearised variance (Cochran,
    Sampling Techniques, 1977, chapter 6), and Student's t. With equal counts it is that of the mean of their means.
    """
    n, total = len(sums), float(counts.sum())
    mean = float(sums.sum()) / total
    if n < 2:
        return Interval(mean, math.inf)
    residual = sums - mean * counts
    return Interval(mean, t_quantile(n - 1) * math.sqrt(n / (n - 1) * float(residual @ residual)) / total)


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


def to_json(found: Interval) -> dict[str, float | None]:
    """Mean and ends in values that JSON can hold; null for the ends of an infinite interval."""
    known = math.isfinite(found.half)
    return {"mean": found.mean, "low": found.low if known else None, "high": found.high if known else None}


def t_quantile(df: int) -> float:
    """The 97.5% quantile of Student's t."""
    z = NormalDist().inv_cdf(0.975)
    if df < 3:
        return {1: 12.706, 2: 4.303}[df]
    # Cornish-Fisher: right to 0.02 at 3 degrees of freedom, to 1e-3 from 6 on
    series = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(sum(term / df**power for power, term in enumerate(series)))
