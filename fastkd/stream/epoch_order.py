"""The order in which an epoch takes the sequences of a cache: a pure function of the shards' sizes, seed and epoch.

The shards are permuted, and a window of `shards_open` of them slides over that order, one shard at a time. Each
position of the window is a *slot*. A shard deals its sequences, permuted, evenly to the slots that it is open in, and
the sequences of a slot are permuted. So every shard is read once, at most `shards_open` are needed at a time, and the
sequences of a slot can be computed without those of any other:

    shards      3 0 4 1 2           (permuted; shards_open = 3)
    slot 0      3 0 4               all of 3, half of 0, a third of 4
    slot 1        0 4 1             half of 0, a third of 4, half of 1
    slot 2          4 1 2           a third of 4, half of 1, all of 2

With 8 of 256 shards open, 12% of neighbours in the order come from one shard (all open: none); `bench/bench_loader.py`
measures that.

No random generator is used: keys are splitmix64 of (seed, epoch, what is permuted, number), so an order is the same on
every machine and with every version of NumPy. Only the slots that are needed are computed.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..utils.splitmix import mixed

Ints = NDArray[np.int64]
_SHARDS, _SEQUENCES, _SLOT, DEAL = range(4)  # what is permuted
_KEPT = 2  # computed slots that are kept


class Sequences(NamedTuple):
    """Sequences of one cache, one after another, `[m]` each.

    shard: the row of its shard in the table of shards. sequence: its number in the shard.
    lane: below `shards_open`; shards that are open together have different ones.
    """

    shard: Ints
    sequence: Ints
    lane: Ints


def permutation(count: int, *numbers: int) -> Ints:
    """The numbers below `count` in an order that follows from `numbers` (each from 0 to 2^64 − 1)."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mixed(key ^ np.array([number], np.uint64))
    # no two keys are equal, so every sorting algorithm gives the same order
    keys: NDArray[np.uint64] = np.arange(count, dtype=np.uint64) + key
    return np.argsort(mixed(keys)).astype(np.int64, copy=False)


def order(sequences: Ints, seed: int, epoch: int, *, shards_open: int = 8, shuffle: bool = True) -> "Epoch":
    """The order of an epoch.

    sequences: of each shard, `[shards]`, at least one shard. shards_open: shards in the window.
    shuffle: False for the order of the data (one shard open).
    """
    return Epoch(sequences, seed, epoch, shards_open if shuffle else 1, shuffle)


class Epoch:
    """The sequences of all shards in the order of one epoch; made by `order`. Not thread-safe."""

    def __init__(self, sequences: Ints, seed: int, epoch: int, shards_open: int, shuffle: bool) -> None:
        shards = len(sequences)
        self._numbers, self._shuffle = (seed, epoch), shuffle
        self.open = min(shards_open, shards)
        self.slots = shards - self.open + 1
        self.shards = self._permutation(shards, _SHARDS, 0)  # rows of the table, in the order of the epoch
        self._sizes = np.asarray(sequences, np.int64)[self.shards]
        begins = np.zeros(self.slots + 1, np.int64)
        for lane in range(self.open):
            rank = np.arange(lane, lane + self.slots)
            begin, end = self._dealt(rank, rank - lane)
            begins[1:] += end - begin
        np.cumsum(begins, out=begins)
        self.begins = begins  # [slots + 1]: the number of each slot's first sequence
        self._slot = lru_cache(_KEPT)(self._compute_slot)
        self._shuffled = lru_cache(self.open + 1)(self._permute_shard)

    def __len__(self) -> int:
        return int(self.begins[-1])

    def take(self, start: int, stop: int) -> Sequences:
        """The sequences from number `start` to below `stop` of the epoch."""
        first, last = self._slot_of(start), self._slot_of(stop - 1)
        slots = [self._slot(m) for m in range(first, last + 1)]
        begin = int(self.begins[first])
        if len(slots) == 1:
            return Sequences(*(column[start - begin : stop - begin] for column in slots[0]))
        columns = zip(*slots, strict=True)
        return Sequences(*(np.concatenate(column)[start - begin : stop - begin] for column in columns))

    def open_at(self, number: int) -> Ints:
        """The rows of the shards that are open when sequence `number` of the epoch is taken, `[open]`."""
        slot = self._slot_of(number)
        return self.shards[slot : slot + self.open]

    def positions_before(self, number: int, positions: Ints, lengths: Callable[[int], Ints]) -> int:
        """The positions of all sequences before sequence `number` of the epoch.

        positions: of each shard, `[shards]`. lengths: positions of each sequence of a shard, by its row; called only
        for the shards that are open there.
        """
        slot = self._slot_of(number)
        # the shards before the window are used up, those after it have not begun
        total = int(positions[self.shards[:slot]].sum())
        for rank in range(slot, slot + self.open):
            begin, _ = self._dealt(np.array(rank), np.array(slot))
            if begin:
                total += int(lengths(int(self.shards[rank]))[self._shuffled(rank)[:begin]].sum())
        taken = self._slot(slot)
        shards, sequences = (column[: number - int(self.begins[slot])] for column in taken[:2])
        for shard in np.unique(shards).tolist():
            total += int(lengths(shard)[sequences[shards == shard]].sum())
        return total

    def _slot_of(self, number: int) -> int:
        return int(np.searchsorted(self.begins, number, side="right")) - 1

    def _dealt(self, rank: Ints, slot: Ints) -> tuple[Ints, Ints]:
        """Which of its permuted sequences the shard of each rank in the order deals to a slot: begin, end."""
        first = np.maximum(rank - self.open + 1, 0)
        slots = np.minimum(rank, self.slots - 1) - first + 1
        number, size = slot - first, self._sizes[rank]
        return number * size // slots, (number + 1) * size // slots

    def _compute_slot(self, slot: int) -> Sequences:
        ranks = np.arange(slot, slot + self.open)
        begins, ends = self._dealt(ranks, np.full(self.open, slot))
        dealt = zip(ranks.tolist(), begins.tolist(), ends.tolist(), strict=True)
        sequences = np.concatenate([self._shuffled(rank)[begin:end] for rank, begin, end in dealt])
        by = self._permutation(len(sequences), _SLOT, slot)
        at = np.repeat(ranks, ends - begins)[by]
        return Sequences(self.shards[at], sequences[by], at % self.open)

    def _permute_shard(self, rank: int) -> Ints:
        """The sequences of the shard of a rank in the order, permuted."""
        return self._permutation(int(self._sizes[rank]), _SEQUENCES, rank)

    def _permutation(self, count: int, what: int, which: int) -> Ints:
        if not self._shuffle:
            return np.arange(count)
        return permutation(count, *self._numbers, what, which)
