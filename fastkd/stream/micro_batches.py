"""The order cut into optimizer steps, a step into ranks, a rank's share into micro-batches: pure functions."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..data.packing import batches

Ints = NDArray[np.int64]


def step_end(lengths: Ints, done: int, batch_tokens: int) -> int | None:
    """How many of the coming sequences belong to the step that begins after `done` positions of the epoch.

    Step t takes the sequences that end within the first (t + 1) · batch_tokens positions of the epoch and belong to no
    step before. So steps have batch_tokens on the average, to within a sequence each, and their number follows from the
    epoch's positions alone. lengths: of the coming sequences, `[m]`, none above batch_tokens. None: these do not fill
    the step.
    """
    number = -(-done // batch_tokens)
    found = int(np.searchsorted(np.cumsum(lengths), (number + 1) * batch_tokens - done, side="right"))
    return found if found < len(lengths) else None


def ranks(lanes: Ints, weights: Ints, world_size: int) -> list[Ints]:
    """The places of each rank's sequences in a step, for every rank: about equal weights, by lane.

    lanes `[m]`: see `Taken`. A shard keeps its lane, so a rank finds its share in few of the shards that are open: its
    part of the lanes, and the two it shares with its neighbours. Every rank has a sequence where weights are equal and
    there are as many sequences as ranks; else one may have none.
    """
    by = np.argsort(lanes, kind="stable")
    ends = np.cumsum(weights[by])
    # the rank that the middle of each falls to
    rank = (2 * ends - weights[by]) * world_size // (2 * ends[-1])
    begins = np.searchsorted(rank, np.arange(world_size + 1))
    return [by[a:b] for a, b in pairwise(begins.tolist())]


def padded_micro_batches(lengths: Ints, tokens: int | None, rows: int | None) -> list[Ints]:
    """The places of the rows of each micro-batch, rows of like lengths together, the longest first.

    A micro-batch, padded to its longest row, has up to `tokens` positions and up to `rows` rows; a row that is longer
    is alone. None: no such limit.
    """
    total = int(lengths.sum()) * len(lengths)
    parts = batches(lengths, total if tokens is None else tokens)
    # ascending within: rows of one shard lie together
    return [np.sort(some) for part in parts for some in _chunks(part, rows)]


def packed_micro_batches(lengths: Ints, tokens: int | None, rows: int | None) -> list[Ints]:
    """The places of the windows of each micro-batch, in order: up to `tokens` positions and `rows` windows."""
    ends = np.cumsum(lengths)
    found: list[Ints] = []
    begin, done = 0, 0
    while begin < len(lengths):
        end = len(lengths) if tokens is None else int(np.searchsorted(ends, done + tokens, side="right"))
        end = max(end, begin + 1)
        if rows is not None:
            end = min(end, begin + rows)
        found.append(np.arange(begin, end))
        begin, done = end, int(ends[end - 1])
    return found


def _chunks(places: Ints, size: int | None) -> Iterable[Ints]:
    return [places] if size is None else [places[i : i + size] for i in range(0, len(places), size)]
