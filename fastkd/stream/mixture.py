"""One stream of sequences from several orders: which source each place of the stream takes from, and what is there.

The stream has no end. Every source is gone through epoch after epoch, each in an order of its own, and how far it is
follows from the place in the stream alone. Places are dealt in blocks, and in every block each source has its share,
to within one. With one source the stream is its epochs, one after another.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .epoch_order import DEAL, Epoch, order, permutation

Ints = NDArray[np.int64]
_BLOCK = 64  # places a block; more where a share is smaller than that
SMALLEST_SHARE = Fraction(1, 2**20)


class Sequences(NamedTuple):
    """Sequences of several sources, `[m]` each: which source, and as in `Taken`."""

    source: Ints
    shard: Ints
    sequence: Ints
    lane: Ints


class Stream:
    """The stream over sources of these sizes. For one thread.

    sizes: the sequences of each shard, `[shards]`, for each source. shares: the part of the places that each source
    takes; their sum is 1, none is below SMALLEST_SHARE.
    """

    def __init__(
        self, sizes: Sequence[Ints], shares: Sequence[Fraction], seed: int, *, shards_open: int, shuffle: bool
    ) -> None:
        self._sizes, self._seed, self._open, self._shuffle = sizes, seed, shards_open, shuffle
        self.totals = [int(s.sum()) for s in sizes]
        self._until = [sum(shares[:j], Fraction(0)) for j in range(len(sizes) + 1)]
        self.block = max(_BLOCK, *(-(-share.denominator // share.numerator) for share in shares))
        self._epochs: dict[tuple[int, int], Epoch] = {}

    def __len__(self) -> int:
        """Sequences an epoch of the stream: as many as the sources have together."""
        return sum(self.totals)

    def take(self, start: int, stop: int) -> Sequences:
        """The sequences at the places from start to below stop."""
        source = self._deal(start, stop)
        found = Sequences(source, *(np.empty(len(source), np.int64) for _ in range(3)))
        for j, begin in enumerate(self._before(start)):
            here = np.flatnonzero(source == j)
            done = 0
            while done < len(here):  # a source may turn to its next epoch
                number, place = divmod(begin + done, self.totals[j])
                count = min(len(here) - done, self.totals[j] - place)
                for column, values in zip(found[1:], self._epoch(j, number).take(place, place + count), strict=True):
                    column[here[done : done + count]] = values
                done += count
        return found

    def open_at(self, place: int) -> set[tuple[int, int]]:
        """The shards (source, place in its table) that are open where the sequence at this place is taken."""
        found = set()
        for j, begin in enumerate(self._before(place)):
            number, at = divmod(begin, self.totals[j])
            found |= {(j, shard) for shard in self._epoch(j, number).open_at(at).tolist()}
        return found

    def weight_before(self, place: int, weights: Sequence[Ints], lengths: Callable[[int, int], Ints]) -> int:
        """The weight of all sequences of the stream before a place.

        weights: of each shard, `[shards]`, for each source. lengths: the weight of each sequence of a shard, `[m]`,
        from the source and the shard's place in its table.
        """
        found = 0
        for j, begin in enumerate(self._before(place)):
            number, at = divmod(begin, self.totals[j])
            found += number * int(weights[j].sum())
            if at:
                found += self._epoch(j, number).weight_before(at, weights[j], partial(lengths, j))
        return found

    def _epoch(self, source: int, number: int) -> Epoch:
        key = source, number
        if key not in self._epochs:
            for old in [k for k in self._epochs if k[0] == source and k[1] != number - 1]:
                del self._epochs[old]
            # sources differ by their seeds, so that two of equal sizes have different orders
            self._epochs[key] = order(
                self._sizes[source],
                (self._seed + (source << 48)) % 2**64,
                number,
                shards_open=self._open,
                shuffle=self._shuffle,
            )
        return self._epochs[key]

    def _quotas(self, block: int) -> list[int]:
        """The places that each source has in all blocks before this one."""
        ends = [int(until * self.block * block) for until in self._until]
        return [b - a for a, b in pairwise(ends)]

    def _labels(self, block: int) -> Ints:
        """The source of each place of a block."""
        before, after = self._quotas(block), self._quotas(block + 1)
        counts = [b - a for a, b in zip(before, after, strict=True)]
        return np.repeat(np.arange(len(counts)), counts)[permutation(self.block, self._seed, DEAL, block)]

    def _deal(self, start: int, stop: int) -> Ints:
        """The source of each place."""
        if len(self._sizes) == 1:
            return np.zeros(stop - start, np.int64)
        first, last = start // self.block, (stop - 1) // self.block
        labels = np.concatenate([self._labels(b) for b in range(first, last + 1)])
        return labels[start - first * self.block : stop - first * self.block]

    def _before(self, place: int) -> list[int]:
        """How many places each source has before this one."""
        if len(self._sizes) == 1:
            return [place]
        block, rest = divmod(place, self.block)
        some = np.bincount(self._labels(block)[:rest], minlength=len(self._sizes)).tolist()
        return [a + b for a, b in zip(self._quotas(block), some, strict=True)]
