"""Which sequences each optimizer step has, and each rank's share of it. Reads lengths of sequences, nothing else."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ..errors import StreamError
from .mixture import MixedSequences, SequenceStream
from .split import ShardTable

Ints = NDArray[np.int64]
LeaveOut = Callable[[int, MixedSequences], NDArray[np.bool_]]
"""Which of the sequences of an epoch are left out of the micro-batches, `[m]`; for any part of them alike."""
ShardKey = tuple[int, int]
"""The number of the source, and the row of the shard in its table."""


@dataclass(frozen=True)
class LoaderProgress:
    """The epoch, and what all ranks together have taken of it: sequences, positions (counted if steps are cut by them,
    else 0) and steps (number)."""

    epoch: int = 0
    sequences: int = 0
    positions: int = 0
    number: int = 0


@dataclass(frozen=True)
class RankShare:
    """One rank's share of a step.

    sequences: in the whole step. after: the progress once the step is taken.
    shards: the numbers of this rank's sequences in each shard; empty if the rank has none.
    still_open: shards that later steps may need.
    """

    sequences: int
    shards: dict[ShardKey, Ints]
    still_open: set[ShardKey]
    after: LoaderProgress


class StepPlan:
    """The steps of a loader. Not thread-safe.

    tables: of each source of the stream. batch_size: sequences per step on all ranks; or batch_tokens: positions.
    keep: shards whose sequence lengths are kept in memory.
    """

    def __init__(
        self,
        stream: SequenceStream,
        tables: Sequence[ShardTable],
        *,
        batch_size: int | None,
        batch_tokens: int | None,
        keep: int,
    ) -> None:
        self.stream, self._tables = stream, tables
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._lengths = lru_cache(keep)(lambda source, shard: tables[source].lengths(shard))

    def steps_per_epoch(self, shares: Sequence[Fraction]) -> int:
        """By batch_tokens for a mixture: about, from the mean lengths of its sequences.

        shares: the part of the sequences from each source.
        """
        if self._batch_size is not None:
            return -(-len(self.stream) // self._batch_size)
        assert self._batch_tokens is not None
        means = [Fraction(int(t.positions.sum()), int(t.sequences.sum())) for t in self._tables]
        mean = sum((mean * share for mean, share in zip(means, shares, strict=True)), Fraction(0))
        return ceil(mean * len(self.stream) / self._batch_tokens)

    def shares(
        self,
        progress: LoaderProgress,
        *,
        rank: int,
        world_size: int,
        epochs: int | None,
        leave_out: LeaveOut | None = None,
    ) -> Iterator[RankShare]:
        """A rank's share of each step from `progress` to the end of its epoch, and of epochs − 1 more (None: for ever).

        leave_out: which sequences are in no rank's share. Raises StreamError for a sequence longer than a step.
        """
        total = len(self.stream)
        for sequences, weights, after in self._steps(progress, None if epochs is None else progress.epoch + epochs):
            mine = split_over_ranks(sequences.lane + (sequences.source << 32), weights, world_size)[rank]
            if leave_out is not None:
                mine = mine[~leave_out(after.epoch, sequences)[mine]]
            still_open = self.stream.open_at(after.epoch * total + after.sequences)
            yield RankShare(len(weights), self._by_shard(sequences, mine), still_open, after)

    def upcoming(self, progress: LoaderProgress) -> Iterator[tuple[int, MixedSequences]]:
        """The epoch and the sequences of each step from `progress` on, without end."""
        for sequences, _, after in self._steps(progress, None):
            yield after.epoch, sequences

    def seek(self, epoch: int, step: int) -> LoaderProgress:
        """The progress after `step` steps of an epoch. Raises StreamError if the epoch has fewer.

        By batch_tokens it is found by bisection over the sequences of the epoch. The positions before a sequence follow
        from the tables and the lengths of the sequences in the shards that are open there.
        """
        total, base, tokens = len(self.stream), epoch * len(self.stream), self._batch_tokens

        def positions_before(number: int) -> int:
            return self.stream.positions_before(base + number, [t.positions for t in self._tables], self._lengths)

        before = positions_before(0) if tokens else 0
        steps = ceil((positions_before(total) - before) / tokens) if tokens else -(-total // (self._batch_size or 1))
        if step > steps:
            raise StreamError(f"step: got {step}; expected at most {steps}, the number of steps in epoch {epoch}.")
        if self._batch_size is not None:
            return LoaderProgress(epoch, min(step * self._batch_size, total), 0, step)
        assert tokens is not None
        # the largest number of sequences with at most step · tokens positions
        number = bisect_right(range(total + 1), before + step * tokens, key=positions_before) - 1
        return LoaderProgress(epoch, number, positions_before(number) - before, step)

    def _steps(
        self, progress: LoaderProgress, last: int | None
    ) -> Iterator[tuple[MixedSequences, Ints, LoaderProgress]]:
        """Of each step from `progress` on, to the end of the epoch before `last`: its sequences, the weight of each
        (see `_step`), and the progress once it is taken."""
        total = len(self.stream)
        while last is None or progress.epoch < last:
            while progress.sequences < total:
                sequences, weights = self._step(progress)
                stop = progress.sequences + len(weights)
                positions = progress.positions + (0 if self._batch_tokens is None else int(weights.sum()))
                progress = LoaderProgress(progress.epoch, stop, positions, progress.number + 1)
                yield sequences, weights, progress
            progress = LoaderProgress(progress.epoch + 1)

    def _step(self, progress: LoaderProgress) -> tuple[MixedSequences, Ints]:
        """The sequences of the step after `progress`, and the weight of each: its positions if they are known, or 1."""
        base, total = progress.epoch * len(self.stream), len(self.stream)
        start = base + progress.sequences
        if self._batch_size is not None:
            sequences = self.stream.take(start, min(start + self._batch_size, base + total))
            return sequences, np.ones(len(sequences.source), np.int64)
        assert self._batch_tokens is not None
        mean = sum(int(t.positions.sum()) for t in self._tables) / total
        count = int(1.1 * self._batch_tokens / mean) + 2
        while True:
            sequences = self.stream.take(start, min(start + count, base + total))
            lengths = self._lengths_of(sequences)
            if (too_long := lengths > self._batch_tokens).any():
                at = int(too_long.argmax())
                table = self._tables[int(sequences.source[at])]
                raise StreamError(
                    f"batch_tokens: got {self._batch_tokens}; expected at least {lengths[at]}, the positions of a "
                    f"sequence in shard {table.shard[sequences.shard[at]]} of {table.origin!r}. Or use batch_size."
                )
            end = step_end(lengths, progress.positions, self._batch_tokens)
            if end is not None or start + count >= base + total:
                return MixedSequences(*(column[:end] for column in sequences)), lengths[:end]
            count *= 2

    def _lengths_of(self, sequences: MixedSequences) -> Ints:
        """The positions of each, `[m]`."""
        lengths = np.empty(len(sequences.source), np.int64)
        for source, shard in sorted(set(zip(sequences.source.tolist(), sequences.shard.tolist(), strict=True))):
            here = np.flatnonzero((sequences.source == source) & (sequences.shard == shard))
            lengths[here] = self._lengths(source, shard)[sequences.sequence[here]]
        return lengths

    def _by_shard(self, sequences: MixedSequences, mine: Ints) -> dict[ShardKey, Ints]:
        """Some of the sequences by their shards, in the order in which the shards come first."""
        found: dict[ShardKey, list[int]] = {}
        for i in mine.tolist():
            key = int(sequences.source[i]), int(sequences.shard[i])
            found.setdefault(key, []).append(int(sequences.sequence[i]))
        return {key: np.array(numbers) + self._tables[key[0]].first[key[1]] for key, numbers in found.items()}


def step_end(lengths: Ints, done: int, batch_tokens: int) -> int | None:
    """How many of the next sequences belong to the step that begins after `done` positions of the epoch.

    Step t takes the sequences that end within the first (t + 1) · batch_tokens positions of the epoch and belong to no
    earlier step. So steps have batch_tokens on average, to within a sequence each, and their number follows from the
    epoch's positions alone. lengths: of the next sequences, `[m]`, none above batch_tokens. None: these do not fill
    the step.
    """
    number = -(-done // batch_tokens)
    found = int(np.searchsorted(np.cumsum(lengths), (number + 1) * batch_tokens - done, side="right"))
    return found if found < len(lengths) else None


def split_over_ranks(lanes: Ints, weights: Ints, world_size: int) -> list[Ints]:
    """The indices of each rank's sequences in a step, for every rank: about equal weights, by lane.

    lanes `[m]`: see `epoch_order.Sequences`. A shard keeps its lane, so a rank's sequences come from few of the open
    shards: its part of the lanes, and the two that it shares with its neighbours. With equal weights, and at least as
    many sequences as ranks, every rank has a sequence; else a rank may have none.
    """
    by = np.argsort(lanes, kind="stable")
    ends = np.cumsum(weights[by])
    # the rank that the middle of each falls to
    rank = (2 * ends - weights[by]) * world_size // (2 * ends[-1])
    begins = np.searchsorted(rank, np.arange(world_size + 1))
    return [by[a:b] for a, b in pairwise(begins.tolist())]
