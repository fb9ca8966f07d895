"""The order cut into optimizer steps, a step into ranks, a rank's share into micro-batches: pure functions."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..data.packing import batches

Ints = NDArray[np.int64]


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


def padded_micro_batches(lengths: Ints, tokens: int | None, rows: int | None) -> list[Ints]:
    """The indices of the rows of each micro-batch, rows of similar lengths together, the longest first.

    A micro-batch, padded to its longest row, has at most `tokens` positions and `rows` rows (None: no limit); a longer
    row is alone.
    """
    total = int(lengths.sum()) * len(lengths)
    size = rows or len(lengths)
    # ascending within: rows of one shard lie together
    return [
        np.sort(batch[i : i + size])
        for batch in batches(lengths, total if tokens is None else tokens)
        for i in range(0, len(batch), size)
    ]


def packed_micro_batches(lengths: Ints, tokens: int | None, rows: int | None) -> list[Ints]:
    """The indices of the windows of each micro-batch, in order: at most `tokens` positions and `rows` windows."""
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
