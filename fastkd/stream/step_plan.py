"""What the steps of a loader are made of: the stream, cut, and a rank's share of each step. Lengths alone are read."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import StreamError
from .micro_batches import ranks, step_end
from .mixture import Sequences, Stream
from .split import Table

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Progress:
    """How far a loader is: in which epoch, how many sequences and positions of it all ranks together have taken.

    Positions are counted where steps are cut by them, else 0. number: steps taken of the epoch.
    """

    epoch: int = 0
    sequences: int = 0
    positions: int = 0
    number: int = 0


@dataclass(frozen=True)
class Batch:
    """What an optimizer step takes, of all ranks: sequences, or positions on the average."""

    sequences: int | None
    positions: int | None


@dataclass(frozen=True)
class Share:
    """One rank's share of a step. sequences: in the whole step. after: the progress once it is taken.

    shards: (source, place in its table), and the sequences that are taken of each, by their places in the shard. None
    are there where the rank has no share.
    """

    epoch: int
    number: int
    sequences: int
    shards: list[tuple[tuple[int, int], Ints]]
    still_open: set[tuple[int, int]]
    after: Progress


class Lengths:
    """Positions of sequences, read shard by shard; those of the shards that were looked at last are kept."""

    def __init__(self, tables: Sequence[Table], keep: int) -> None:
        self._tables, self._keep = tables, keep
        self._kept: OrderedDict[tuple[int, int], Ints] = OrderedDict()

    def of(self, some: Sequences) -> Ints:
        """The positions of each, `[m]`."""
        lengths = np.empty(len(some.source), np.int64)
        width = int(some.shard.max()) + 1
        for key in np.unique(some.source * width + some.shard).tolist():
            source, shard = divmod(key, width)
            here = np.flatnonzero((some.source == source) & (some.shard == shard))
            lengths[here] = self.shard(source, shard)[some.sequence[here]]
        return lengths

    def shard(self, source: int, shard: int) -> Ints:
        """The positions of each sequence of a shard, `[sequences]`."""
        key = source, shard
        if key not in self._kept:
            self._kept[key] = self._tables[source].lengths(shard)
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def shares(
    stream: Stream,
    tables: Sequence[Table],
    batch: Batch,
    progress: Progress,
    *,
    rank: int,
    world_size: int,
    epochs: int | None,
    lengths: Lengths,
) -> Iterator[Share]:
    """A rank's share of each step from `progress` on, to the end of that epoch and of epochs − 1 more (None: for ever).

    Raises StreamError for a sequence longer than a step.
    """
    total = len(stream)
    last = None if epochs is None else progress.epoch + epochs
    while last is None or progress.epoch < last:
        while progress.sequences < total:
            base = progress.epoch * total
            start = base + progress.sequences
            some, weights = _step(stream, batch, progress, start, base + total, tables, lengths)
            stop = start + len(weights)
            positions = progress.positions + (0 if batch.positions is None else int(weights.sum()))
            after = Progress(progress.epoch, stop - base, positions, progress.number + 1)
            mine = ranks(some.lane + (some.source << 32), weights, world_size)[rank]
            yield Share(
                epoch=progress.epoch,
                number=progress.number,
                sequences=len(weights),
                shards=_by_shard(tables, Sequences(*(column[mine] for column in some))),
                still_open=stream.open_at(stop),
                after=after,
            )
            progress = after
        progress = Progress(progress.epoch + 1)


def seek(stream: Stream, tables: Sequence[Table], batch: Batch, epoch: int, step: int, lengths: Lengths) -> Progress:
    """The progress of a loader that has taken `step` steps of an epoch.

    By positions, the place is found by bisection: the positions before any place follow from the tables and from the
    sequence lengths of the shards that are open there.

    Raises StreamError if the epoch has fewer steps.
    """
    total = len(stream)
    base = epoch * total
    if batch.positions is None:
        assert batch.sequences is not None
        _check_step(step, -(-total // batch.sequences))
        return Progress(epoch, min(step * batch.sequences, total), 0, step)
    positions = [t.positions for t in tables]
    before = stream.weight_before(base, positions, lengths.shard)
    end = stream.weight_before(base + total, positions, lengths.shard) - before
    _check_step(step, -(-end // batch.positions))
    low, high, at_low = 0, total, 0  # the last place with at most step · batch.positions before it
    if step * batch.positions >= end:
        low, at_low = total, end
    while high - low > 1:
        middle = (low + high) // 2
        found = stream.weight_before(base + middle, positions, lengths.shard) - before
        if found <= step * batch.positions:
            low, at_low = middle, found
        else:
            high = middle
    return Progress(epoch, low, at_low, step)


def _check_step(step: int, steps: int) -> None:
    if step > steps:
        raise StreamError(f"step: got {step}; expected at most {steps}, the steps of the epoch.")


def _step(
    stream: Stream, batch: Batch, progress: Progress, start: int, end: int, tables: Sequence[Table], lengths: Lengths
) -> tuple[Sequences, Ints]:
    """The sequences of the step that begins at a place, and the weight of each: its positions, where they are known."""
    if batch.positions is None:
        assert batch.sequences is not None
        some = stream.take(start, min(start + batch.sequences, end))
        return some, np.ones(len(some.source), np.int64)
    mean = sum(int(t.positions.sum()) for t in tables) / len(stream)
    count = int(1.1 * batch.positions / mean) + 2
    while True:
        some = stream.take(start, min(start + count, end))
        found = lengths.of(some)
        if (found > batch.positions).any():
            at = int((found > batch.positions).argmax())
            raise StreamError(
                f"batch_tokens: got {batch.positions}, and a sequence of {found[at]} positions in shard "
                f"{tables[int(some.source[at])].shard[some.shard[at]]} of {tables[int(some.source[at])].cache!r}. Take "
                "at least as many as the longest sequence has, or batch_size."
            )
        taken = step_end(found, progress.positions, batch.positions)
        if taken is None and start + count < end:
            count *= 2
            continue
        return Sequences(*(column[:taken] for column in some)), found[:taken]


def _by_shard(tables: Sequence[Table], some: Sequences) -> list[tuple[tuple[int, int], Ints]]:
    """The sequences by their shards, in the order in which the shards come first."""
    keys = list(zip(some.source.tolist(), some.shard.tolist(), strict=True))
    found: dict[tuple[int, int], list[int]] = {}
    for key, sequence in zip(keys, some.sequence.tolist(), strict=True):
        found.setdefault(key, []).append(sequence)
    return [(key, np.array(some) + tables[key[0]].first[key[1]]) for key, some in found.items()]
