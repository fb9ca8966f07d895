"""Compares stored numbers with recomputed ones: their distance, and the distance that the codec allows."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...cache import CacheSpec
from ...cache.encoding.grid import steps_at
from .recompute import Recomputed, Stored

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# What float32 adds to the codec's error: nats, nats per nat of the value, and nats per nat of the bound.
_ROUNDING = 1e-5, 1e-6, 2e-3


class Deviations(NamedTuple):
    """e numbers of one kind, in nats, `[e]` each: the row of each, its distance from the teacher's, the distance that
    the codec allows, and the excess of the one over the other."""

    row: Ints
    distance: Floats
    bound: Floats
    excess: Floats


@dataclass(frozen=True)
class Difference:
    """A summary of the deviations of one kind, in nats.

    compared: how many numbers. largest: the largest distance; bound: what the codec allows there. over: how many
    exceed their bound. excess: by how much, at most.
    """

    compared: int = 0
    largest: float = 0.0
    bound: float = 0.0
    over: int = 0
    excess: float = 0.0

    def __add__(self, other: "Difference") -> "Difference":
        largest = self if self.largest > other.largest or not other.compared else other
        return Difference(
            self.compared + other.compared,
            largest.largest,
            largest.bound,
            self.over + other.over,
            max(self.excess, other.excess),
        )

    @classmethod
    def of(cls, deviations: Deviations) -> "Difference":
        """The summary of some deviations."""
        row, distance, bound, excess = deviations
        if not len(row):
            return cls()
        at = int(distance.argmax())
        over = int(np.count_nonzero(excess))
        return cls(len(row), float(distance[at]), float(bound[at]), over, float(excess.max()))


def deviations(spec: CacheSpec, stored: Stored, now: Recomputed) -> dict[str, Deviations]:
    """By kind: "top_k", "draws" and "tail" (log-probabilities), and "rank": by how much top-k entries miss being among
    as many of the teacher's best, which the codec may hide to its own precision."""
    codec = spec.settings
    logprobs, before = now.logprobs.astype(np.float64), stored.logprobs.astype(np.float64)
    found = {}
    if spec.k:
        row, entry = np.nonzero(stored.top_k)
        a, b = logprobs[row, entry], before[row, entry]
        found["top_k"] = _deviations(row, a - b, _half_steps(spec, np.minimum(a, b)), b)
        missed = np.maximum(now.last.astype(np.float64)[row] - a, 0)
        found["rank"] = _deviations(row, missed, _half_steps(spec, a), b)
    if spec.draws:
        row, entry = np.nonzero(stored.used & ~stored.top_k)
        a, b = logprobs[row, entry], before[row, entry]
        found["draws"] = _deviations(row, a - b, np.full(len(row), codec.draw_step / 2), b)
    a, b = now.tail.astype(np.float64).reshape(-1), stored.tail.astype(np.float64).reshape(-1)
    row = np.repeat(np.arange(len(stored.tail)), stored.tail.shape[1])
    with np.errstate(invalid="ignore"):
        difference = np.where(a == b, 0.0, a - b)  # −inf and −inf are equal
    bound = np.full(len(row), codec.tail_step / 2)
    found["tail"] = _deviations(row, difference, bound, np.where(np.isfinite(b), b, 0.0))
    return found


def kl_divergence(spec: CacheSpec, stored: Stored, now: Recomputed) -> Floats:
    """KL(now || stored), `[m]`, everything outside the stored top-k entries as one outcome; the stored distribution
    normalized."""
    one = spec.temperatures.index(1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = (
            np.column_stack([np.where(stored.top_k, logprobs, -np.inf), tail[:, one]]).astype(np.float64)
            for logprobs, tail in ((now.logprobs, now.tail), (stored.logprobs, stored.tail))
        )
        q -= np.log(np.exp(q).sum(1, keepdims=True))
        terms = np.where(p > -np.inf, np.exp(p) * (p - q), 0.0)
    kl: Floats = terms.sum(1)
    return kl


def _deviations(row: Ints, difference: Floats, bound: Floats, value: Floats) -> Deviations:
    distance = np.where(np.isnan(difference), np.inf, np.abs(difference))
    nats, of_value, of_bound = _ROUNDING
    allowed = bound * (1 + of_bound) + nats + of_value * np.abs(value)
    return Deviations(row, distance, bound, np.maximum(distance - allowed, 0))


def _half_steps(spec: CacheSpec, logprobs: Floats) -> Floats:
    codec = spec.settings
    return steps_at(logprobs, codec.step, codec.growth, codec.cap) / 2
