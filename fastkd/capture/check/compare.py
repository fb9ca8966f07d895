"""Stored numbers beside those that a teacher says now: how far apart they are, and how far the codec lets them be."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...cache import CacheSpec
from ...cache.encoding.grid import steps_at
from .live import Live, Stored

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# What float32 adds to the codec's error: nats, for each nat of the number, and for each nat of the bound.
_ROUNDING = 1e-5, 1e-6, 2e-3


class Apart(NamedTuple):
    """e numbers of one kind: the row of each, how far it is from the teacher's, how far the codec lets it be, and how
    much further it is: nats, `[e]` each."""

    row: Ints
    difference: Floats
    bound: Floats
    excess: Floats


@dataclass(frozen=True)
class Difference:
    """How far the stored numbers of one kind lie from what the teacher says now; nats.

    compared: how many there are. largest: the largest difference; bound: what the codec may differ by, there.
    over: how many differ by more than their bound. excess: by how much more, at most.
    """

    compared: int = 0
    largest: float = 0.0
    bound: float = 0.0
    over: int = 0
    excess: float = 0.0

    def __add__(self, more: "Difference") -> "Difference":
        largest = self if self.largest > more.largest or not more.compared else more
        return Difference(
            self.compared + more.compared,
            largest.largest,
            largest.bound,
            self.over + more.over,
            max(self.excess, more.excess),
        )

    @classmethod
    def of(cls, apart: Apart) -> "Difference":
        """What there is to say of these numbers."""
        if not len(apart.row):
            return cls()
        at = int(apart.difference.argmax())
        return cls(
            len(apart.row),
            float(apart.difference[at]),
            float(apart.bound[at]),
            int(np.count_nonzero(apart.excess)),
            float(apart.excess.max()),
        )


def apart(spec: CacheSpec, stored: Stored, live: Live) -> dict[str, Apart]:
    """By kind: "head" and "drawn" (log-probabilities), "tail"; and "outside": by how much the entries of a head miss
    being among as many of the teacher's best, which the codec lets them by as much as it may hide."""
    codec = spec.settings
    now, then = live.logprobs.astype(np.float64), stored.logprobs.astype(np.float64)
    found = {}
    if spec.k:
        row, place = np.nonzero(stored.head)
        a, b = now[row, place], then[row, place]
        found["head"] = _apart(row, a - b, _half_steps(spec, np.minimum(a, b)), b)
        missed = np.maximum(live.last.astype(np.float64)[row] - a, 0)
        found["outside"] = _apart(row, missed, _half_steps(spec, a), b)
    if spec.draws:
        row, place = np.nonzero(stored.used & ~stored.head)
        a, b = now[row, place], then[row, place]
        found["drawn"] = _apart(row, a - b, np.full(len(row), codec.draw_step / 2), b)
    a, b = live.tail.astype(np.float64).reshape(-1), stored.tail.astype(np.float64).reshape(-1)
    row = np.repeat(np.arange(len(stored.tail)), stored.tail.shape[1])
    with np.errstate(invalid="ignore"):
        difference = np.where(a == b, 0.0, a - b)  # −inf from −inf is nothing
    found["tail"] = _apart(row, difference, np.full(len(row), codec.tail_step / 2), np.where(np.isfinite(b), b, 0.0))
    return found


def divergence(spec: CacheSpec, stored: Stored, live: Live) -> Floats:
    """KL(now || stored) `[m]`, all outside the stored head as one outcome; the stored one scaled to 1."""
    one = spec.temperatures.index(1.0)
    head = stored.head
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = (
            np.column_stack([np.where(head, logprobs, -np.inf), tail[:, one]]).astype(np.float64)
            for logprobs, tail in ((live.logprobs, live.tail), (stored.logprobs, stored.tail))
        )
        q -= np.log(np.exp(q).sum(1, keepdims=True))
        terms = np.where(p > -np.inf, np.exp(p) * (p - q), 0.0)
    found: Floats = terms.sum(1)
    return found


def _apart(row: Ints, difference: Floats, bound: Floats, value: Floats) -> Apart:
    difference = np.where(np.isnan(difference), np.inf, np.abs(difference))
    nats, of_value, of_bound = _ROUNDING
    allowed = bound * (1 + of_bound) + nats + of_value * np.abs(value)
    return Apart(row, difference, bound, np.maximum(difference - allowed, 0))


def _half_steps(spec: CacheSpec, logprobs: Floats) -> Floats:
    codec = spec.settings
    return steps_at(logprobs, codec.step, codec.growth, codec.cap) / 2
