"""In which order an epoch takes the sequences of a cache: a pure function of the shards' sizes, seed and epoch.

The shards are permuted, and a window of `shards_open` of them slides over that order, one shard further at a time. Each
place of the window is a *slot*. A shard deals its sequences, permuted, evenly to the slots that it is open in, and the
sequences of a slot are permuted. So every shard is read once, at no time are more than `shards_open` needed, and where
a sequence stands depends on the window it falls into alone:

    shards      3 0 4 1 2           (permuted; shards_open = 3)
    slot 0      3 0 4               all of 3, half of 0, a third of 4
    slot 1        0 4 1             half of 0, a third of 4, half of 1
    slot 2          4 1 2           a third of 4, half of 1, all of 2

How good a shuffle that is, of 256 shards of 256 sequences (`bench/bench_loader.py`; all open is a full shuffle):

    shards open                                            1      2      4      8     16     64    256
    two in a row are of one shard, share                1.00   0.50   0.25   0.12   0.06   0.02   0.00
    different shards among 64 in a row                   1.0    2.0    4.0    8.0   15.8   40.7   56.6
    neighbours in the data, mean distance in the order    86    171    343    683   1358   5207  21905
    neighbours in the data, within 64, share            0.43   0.23   0.12   0.06   0.03   0.01   0.00

Nothing here is random: keys are splitmix64 of (seed, epoch, what is permuted, number), so that an order is the same on
every machine and under every version of NumPy. Only what is asked for is worked out.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..utils.splitmix import mixed

Ints = NDArray[np.int64]
_SHARDS, _SEQUENCES, _SLOT, DEAL = range(4)  # what is permuted
_KEPT = 2  # slots worked out that are kept


class Taken(NamedTuple):
    """Sequences, one after another, `[m]` each.

    shard: the place of its shard in the table. sequence: its place in the shard.
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
    # no two keys are equal, so every way of sorting finds the same order
    keys: NDArray[np.uint64] = np.arange(count, dtype=np.uint64) + key
    return np.argsort(mixed(keys)).astype(np.int64, copy=False)


def order(sequences: Ints, seed: int, epoch: int, *, shards_open: int = 8, shuffle: bool = True) -> "Epoch":
    """The order of an epoch. sequences: how many each shard has, `[shards]`, at least one shard.

    shards_open: shards that the window holds. shuffle: False for the order of the data (one shard open).
    """
    return Epoch(sequences, seed, epoch, shards_open if shuffle else 1, shuffle)


class Epoch:
    """The sequences of all shards in the order of one epoch; made by `order`. For one thread."""

    def __init__(self, sequences: Ints, seed: int, epoch: int, shards_open: int, shuffle: bool) -> None:
        shards = len(sequences)
        self._numbers, self._shuffle = (seed, epoch), shuffle
        self.open = min(shards_open, shards)
        self.slots = shards - self.open + 1
        self.shards = self._permutation(shards, _SHARDS, 0)  # table places, in the order of the epoch
        self._sizes = np.asarray(sequences, np.int64)[self.shards]
        begins = np.zeros(self.slots + 1, np.int64)
        for berth in range(self.open):
            place = np.arange(berth, berth + self.slots)
            begin, end = self._part(place, place - berth)
            begins[1:] += end - begin
        np.cumsum(begins, out=begins)
        self.begins = begins  # [slots + 1]: the place of each slot's first sequence
        self._worked_out: dict[int, Taken] = {}
        self._permuted: dict[int, Ints] = {}

    def __len__(self) -> int:
        return int(self.begins[-1])

    def take(self, start: int, stop: int) -> Taken:
        """The sequences at the places from start to below stop."""
        first, last = (int(np.searchsorted(self.begins, place, side="right")) - 1 for place in (start, stop - 1))
        whole = [self._slot(m) for m in range(first, last + 1)]
        begin = int(self.begins[first])
        if len(whole) == 1:
            return Taken(*(column[start - begin : stop - begin] for column in whole[0]))
        return Taken(*(np.concatenate(columns)[start - begin : stop - begin] for columns in zip(*whole, strict=True)))

    def open_at(self, place: int) -> Ints:
        """The table places of the shards that are open where the sequence at this place is taken, `[open]`."""
        slot = int(np.searchsorted(self.begins, place, side="right")) - 1
        return self.shards[slot : slot + self.open]

    def weight_before(self, place: int, weights: Ints, lengths: Callable[[int], Ints]) -> int:
        """The weight of all sequences before a place. Asks for the lengths of the shards that are open there alone.

        weights: of each shard, `[shards]`. lengths: the weight of each sequence of a shard, by its place in the table.
        """
        slot = int(np.searchsorted(self.begins, place, side="right")) - 1
        # of the shards in the order, those before the window are used up, and those behind it have not begun
        found = int(weights[self.shards[:slot]].sum())
        for at in range(slot, slot + self.open):
            begin, _ = self._part(np.array(at), np.array(slot))
            if begin:
                found += int(lengths(int(self.shards[at]))[self._shuffled(at)[:begin]].sum())
        taken = self._slot(slot)
        shards, sequences = (column[: place - int(self.begins[slot])] for column in taken[:2])
        for shard in np.unique(shards).tolist():
            found += int(lengths(shard)[sequences[shards == shard]].sum())
        return found

    def _part(self, place: Ints, slot: Ints) -> tuple[Ints, Ints]:
        """Which of its permuted sequences the shard at each place deals to a slot: from, to."""
        first = np.maximum(place - self.open + 1, 0)
        slots = np.minimum(place, self.slots - 1) - first + 1
        number, size = slot - first, self._sizes[place]
        return number * size // slots, (number + 1) * size // slots

    def _slot(self, slot: int) -> Taken:
        if slot not in self._worked_out:
            places = np.arange(slot, slot + self.open)
            begins, ends = self._part(places, np.full(self.open, slot))
            for gone in self._permuted.keys() - set(places.tolist()):
                del self._permuted[gone]
            parts = []
            for place, begin, end in zip(places.tolist(), begins.tolist(), ends.tolist(), strict=True):
                parts.append(self._shuffled(place)[begin:end])
            by = self._permutation(int((ends - begins).sum()), _SLOT, slot)
            at = np.repeat(places, ends - begins)[by]
            taken = Taken(self.shards[at], np.concatenate(parts)[by], at % self.open)
            while len(self._worked_out) >= _KEPT:
                del self._worked_out[next(iter(self._worked_out))]
            self._worked_out[slot] = taken
        return self._worked_out[slot]

    def _shuffled(self, place: int) -> Ints:
        """The sequences of the shard at a place of the order, permuted."""
        if place not in self._permuted:
            self._permuted[place] = self._permutation(int(self._sizes[place]), _SEQUENCES, place)
        return self._permuted[place]

    def _permutation(self, count: int, what: int, which: int) -> Ints:
        if not self._shuffle:
            return np.arange(count)
        return permutation(count, *self._numbers, what, which)
