"""One stream of sequences from the orders of several sources (caches of a mixture).

The stream has no end. Every source goes through epoch after epoch, each in its own order; its progress follows from
the number of the sequence in the stream alone. Sequences are dealt in blocks, and in every block each source has its
share, to within one. With one source the stream is its epochs, one after another.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .epoch_order import DEAL, Epoch, order, permutation

Ints = NDArray[np.int64]
_BLOCK = 64  # sequences per block; more for a share smaller than that
SMALLEST_SHARE = Fraction(1, 2**20)


class MixedSequences(NamedTuple):
    """Sequences of several sources, `[m]` each: the number of the source, and as in `epoch_order.Sequences`."""

    source: Ints
    shard: Ints
    sequence: Ints
    lane: Ints


class SequenceStream:
    """The stream over sources of these sizes. Not thread-safe.

    sizes: the sequences of each shard, `[shards]`, of each source. shares: the part of the sequences from each source;
    their sum is 1, none is below SMALLEST_SHARE.
    """

    def __init__(
        self, sizes: Sequence[Ints], shares: Sequence[Fraction], seed: int, *, shards_open: int, shuffle: bool
    ) -> None:
        self._sizes, self._seed, self._open, self._shuffle = sizes, seed, shards_open, shuffle
        self.totals = [int(s.sum()) for s in sizes]
        self._until = [sum(shares[:j], Fraction(0)) for j in range(len(sizes) + 1)]
        self.block = max(_BLOCK, *(-(-share.denominator // share.numerator) for share in shares))
        self._epoch = lru_cache(2 * len(sizes))(self._make_epoch)

    def __len__(self) -> int:
        """Sequences per epoch of the stream: as many as the sources have together."""
        return sum(self.totals)

    def take(self, start: int, stop: int) -> MixedSequences:
        """The sequences from number `start` to below `stop` of the stream."""
        source = self._deal(start, stop)
        found = MixedSequences(source, *(np.empty(len(source), np.int64) for _ in range(3)))
        for j, begin in enumerate(self._before(start)):
            here = np.flatnonzero(source == j)
            done = 0
            while done < len(here):  # a source may begin its next epoch
                epoch, number = divmod(begin + done, self.totals[j])
                count = min(len(here) - done, self.totals[j] - number)
                taken = self._epoch(j, epoch).take(number, number + count)
                for column, values in zip(found[1:], taken, strict=True):
                    column[here[done : done + count]] = values
                done += count
        return found

    def open_at(self, number: int) -> set[tuple[int, int]]:
        """The shards (source, row in its table) that are open when sequence `number` of the stream is taken."""
        found = set()
        for j, begin in enumerate(self._before(number)):
            epoch, at = divmod(begin, self.totals[j])
            found |= {(j, shard) for shard in self._epoch(j, epoch).open_at(at).tolist()}
        return found

    def positions_before(self, number: int, positions: Sequence[Ints], lengths: Callable[[int, int], Ints]) -> int:
        """The positions of all sequences before sequence `number` of the stream.

        positions: of each shard, `[shards]`, of each source. lengths: positions of each sequence of a shard, from the
        source and the row of the shard.
        """
        total = 0
        for j, begin in enumerate(self._before(number)):
            epoch, at = divmod(begin, self.totals[j])
            total += epoch * int(positions[j].sum())
            if at:
                total += self._epoch(j, epoch).positions_before(at, positions[j], partial(lengths, j))
        return total

    def _make_epoch(self, source: int, number: int) -> Epoch:
        # a seed per source, so that two sources of equal sizes have different orders
        seed = (self._seed + (source << 48)) % 2**64
        return order(self._sizes[source], seed, number, shards_open=self._open, shuffle=self._shuffle)

    def _quotas(self, block: int) -> list[int]:
        """How many sequences each source has in all blocks before this one."""
        ends = [int(until * self.block * block) for until in self._until]
        return [b - a for a, b in pairwise(ends)]

    def _sources(self, block: int) -> Ints:
        """The source of each sequence of a block."""
        before, after = self._quotas(block), self._quotas(block + 1)
        counts = [b - a for a, b in zip(before, after, strict=True)]
        return np.repeat(np.arange(len(counts)), counts)[permutation(self.block, self._seed, DEAL, block)]

    def _deal(self, start: int, stop: int) -> Ints:
        """The source of each sequence from `start` to below `stop`."""
        if len(self._sizes) == 1:
            return np.zeros(stop - start, np.int64)
        first, last = start // self.block, (stop - 1) // self.block
        sources = np.concatenate([self._sources(b) for b in range(first, last + 1)])
        return sources[start - first * self.block : stop - first * self.block]

    def _before(self, number: int) -> list[int]:
        """How many sequences each source has before sequence `number`."""
        if len(self._sizes) == 1:
            return [number]
        block, rest = divmod(number, self.block)
        some = np.bincount(self._sources(block)[:rest], minlength=len(self._sizes)).tolist()
        return [a + b for a, b in zip(self._quotas(block), some, strict=True)]
