"""The arithmetic of a window plan: held-out documents, segments, and which segments share a shard, a window, a batch.

A segment is a document, or if the document is longer than the context, a part of it.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..utils.splitmix import mixed

Ints = NDArray[np.int64]
Lengths = NDArray[np.int32]
_BLOCK = 2**18  # documents processed at a time, to bound temporary memory


DIVIDED_BY = ("context", "on_long", "overlap", "held_out", "seed", "shard_positions")
"""The settings of a window plan that `divide` takes."""
HELD_OUT = 0.01
"""Fraction of the documents that is held out by default, of large data."""
LEAST_DOCUMENTS, LEAST_POSITIONS = 8, 4096
"""Of small data as many are held out by default, where they are at most one in `ONE_IN`."""
ONE_IN = 5


class Division(NamedTuple):
    """How documents are divided into segments, and these into shards. Window plans and their checks agree on it.

    order: int32 `[kept]`, the documents with tokens, those of the training split first. first_segment: `[kept + 1]`, in
    that order. segments: int32 `[segments]`, positions of each. shards: `[shards + 1]`, the first segment of each.
    train_shards: the number of shards of the training split, which come first.
    """

    order: NDArray[np.int32]
    first_segment: Ints
    segments: Lengths
    shards: Ints
    train_shards: int


def divide(
    lengths: Lengths, *, context: int, on_long: str, overlap: int, held_out: float, seed: int, shard_positions: int
) -> Division:
    """Divide documents of these lengths, `[documents]`, some of them positive. The settings are those of a window plan
    (see `WindowPlanSettings`)."""
    kept = np.flatnonzero(lengths).astype(np.int32)
    out = held_out_documents(kept, held_out, seed)
    order = np.concatenate([kept[~out], kept[out]])
    train_documents = len(kept) - int(np.count_nonzero(out))
    del kept, out
    ordered = lengths[order]
    counts = np.ones(len(order), np.int32)
    if on_long == "split":
        counts = segment_counts(ordered, context, overlap)
    segments = segment_lengths(ordered, counts, context, overlap)
    first_segment = np.zeros(len(order) + 1, np.int64)
    np.cumsum(counts, out=first_segment[1:])
    train = shard_starts(segments[: first_segment[train_documents]], shard_positions)
    rest = shard_starts(segments[first_segment[train_documents] :], shard_positions)
    return Division(order, first_segment, segments, np.concatenate([train, rest[1:] + train[-1]]), len(train) - 1)


def default_held_out(lengths: Lengths, seed: int, *, predicting: int = 2) -> float:
    """The fraction of documents of these lengths, `[documents]`, that is held out unless a setting says otherwise.

    1%, or of small data as many documents (in the order in which `held_out_documents` takes them) as have 4,096
    positions together, with 8 among them that have something to predict; but at most a fifth of the documents, with at
    most a fifth of the positions, beyond the 1%. 0 for a single document. predicting: tokens from which a document has
    something to predict. It depends on lengths and seed alone, so that all workers come to the same.
    """
    documents = np.flatnonzero(lengths).astype(np.int32)
    if len(documents) < 2:
        return 0.0
    base = max(1, round(HELD_OUT * len(documents)))
    if base >= max(LEAST_DOCUMENTS, LEAST_POSITIONS):  # each has a position
        return HELD_OUT
    ordered = lengths[documents[np.argsort(_keys(documents, seed), kind="stable")]].astype(np.int64)
    positions = np.cumsum(ordered)
    enough = (np.cumsum(ordered >= predicting) >= LEAST_DOCUMENTS) & (positions >= LEAST_POSITIONS)
    wanted = int(enough.argmax()) + 1 if enough.any() else len(documents)
    most = min(len(documents) // ONE_IN, int(np.count_nonzero(positions <= int(positions[-1]) // ONE_IN)))
    count = max(base, min(wanted, most))
    return HELD_OUT if count == base else count / len(documents)


def held_out_documents(documents: NDArray[np.int32], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which documents are held out, `[documents]`: those with the smallest hashes of number and seed.

    That fraction of them, rounded, but at least one held out and at least one not; with fraction 0 none is held out.
    """
    if not fraction:
        return np.zeros(len(documents), bool)
    count = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    keys = _keys(documents, seed)
    smallest: NDArray[np.bool_] = keys <= np.partition(keys, count - 1)[count - 1]
    return smallest


def _keys(documents: NDArray[np.int32], seed: int) -> NDArray[np.uint64]:
    """Hashes of the numbers of documents and the seed, `[documents]`, all different."""
    key = mixed(np.array([seed], np.uint64))
    keys = np.empty(len(documents), np.uint64)
    for start in range(0, len(keys), _BLOCK):
        some = slice(start, start + _BLOCK)
        keys[some] = mixed(documents[some].astype(np.uint64) ^ key)
    return keys


def segment_counts(lengths: Lengths, context: int, overlap: int) -> Lengths:
    """Number of segments of each document, `[documents]`: the first covers context tokens, each further one adds
    context − overlap."""
    return np.maximum((lengths - (overlap + 1)) // (context - overlap) + 1, 1)


def segment_lengths(lengths: Lengths, counts: Lengths, context: int, overlap: int) -> Lengths:
    """Positions of each segment, `[segments]`: `context`, except in a document's last one, which ends with the document
    (or at `context`, if the document is truncated).

    counts: segments of each document, `[documents]`.
    """
    segments = np.full(int(counts.sum(dtype=np.int64)), context, np.int32)
    done = 0
    for start in range(0, len(lengths), _BLOCK):
        some = slice(start, start + _BLOCK)
        ends = done + np.cumsum(counts[some], dtype=np.int64)
        # 32 bits suffice: a document's last segment starts inside the document
        last = lengths[some] - (counts[some] - 1) * np.int32(context - overlap)
        segments[ends - 1] = np.minimum(last, context)
        done = int(ends[-1])
    return segments


def shard_starts(segments: Lengths, shard_positions: int) -> Ints:
    """First segment of each shard, and the number of segments, `[shards + 1]`: consecutive segments share a shard as
    long as they fit. segments: their lengths."""
    ends = np.cumsum(segments, dtype=np.int64)
    starts, done = [0], 0
    while starts[-1] < len(segments):
        starts.append(int(np.searchsorted(ends, done + shard_positions, side="right")))
        done = int(ends[starts[-1] - 1])
    return np.array(starts, np.int64)


def pack(lengths: Lengths, context: int) -> tuple[Ints, int]:
    """The window of each segment, `[segments]`, and the number of windows, by best fit, longest segments first.

    lengths: positions of each segment, 1 to context. The segments of a window have up to `context` positions together.
    Windows are numbered in the order they are opened; segments of equal length keep their order, so the result is
    deterministic.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    windows = np.empty(len(lengths), np.int64)
    full = int(np.count_nonzero(lengths == context))
    windows[order[:full]] = np.arange(full)
    count = full
    chosen = []
    # open windows by free positions, then number, ascending; as one integer each: free << 32 | number
    open_windows: list[int] = []
    for length in lengths[order[full:]].tolist():
        index = bisect_left(open_windows, length << 32)
        if index < len(open_windows):
            fitting = open_windows.pop(index)
            window, free = fitting & 0xFFFFFFFF, (fitting >> 32) - length
        else:
            window, free = count, context - length
            count += 1
        chosen.append(window)
        if free:
            insort(open_windows, free << 32 | window)
    windows[order[full:]] = chosen
    return windows, count


def batches(lengths: Ints, batch_tokens: int) -> list[Ints]:
    """Indices of the segments in each batch, longest first, equal lengths in their order.

    lengths: positions of each segment, `[segments]`, from 1 on. A batch, padded to its longest segment, has up to
    `batch_tokens` positions; a longer segment is a batch of its own.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    result, start = [], 0
    while start < len(order):
        stop = start + max(1, batch_tokens // int(lengths[order[start]]))
        result.append(order[start:stop])
        start = stop
    return result
