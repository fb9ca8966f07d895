"""Which rows are in which micro-batch, from their lengths."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..data.packing import batches

Ints = NDArray[np.int64]


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


def at_most(count: int, cut: Callable[[Ints, int | None, int | None], list[Ints]], lengths: Ints) -> list[Ints]:
    """The indices of the rows of each of at most `count` micro-batches: those with the lowest maximum of positions,
    pads included. cut: one of the above."""
    # a higher maximum never makes more of them
    low, high = int(lengths.max()), int(lengths.max()) * len(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(cut(lengths, middle, None)) <= count:
            high = middle
        else:
            low = middle + 1
    return cut(lengths, low, None)
