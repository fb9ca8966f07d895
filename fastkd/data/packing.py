"""The arithmetic of a plan: what is held out, where documents are cut, and what shares a shard, a window, a batch."""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from ..utils.splitmix import mixed

Ints = NDArray[np.int64]
Lengths = NDArray[np.int32]
_BLOCK = 2**18  # documents at a time, where each takes several temporary words


def held_out(documents: NDArray[np.int32], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which documents are held out, `[documents]`: those whose hashes, of number and seed, are smallest.

    As many as the fraction says, rounded; but at least one, and at least one is not. None where it is 0.
    """
    if not fraction:
        return np.zeros(len(documents), bool)
    count = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    key = mixed(np.array([seed], np.uint64))
    keys = np.empty(len(documents), np.uint64)
    for start in range(0, len(keys), _BLOCK):
        some = slice(start, start + _BLOCK)
        keys[some] = mixed(documents[some].astype(np.uint64) ^ key)
    smallest: NDArray[np.bool_] = keys <= np.partition(keys, count - 1)[count - 1]
    return smallest


def piece_counts(lengths: Lengths, context: int, overlap: int) -> Lengths:
    """Pieces of each document, `[documents]`: each new one adds context − overlap tokens, the first adds context."""
    return np.maximum((lengths - (overlap + 1)) // (context - overlap) + 1, 1)


def piece_lengths(lengths: Lengths, counts: Lengths, context: int, overlap: int) -> Lengths:
    """Positions of each piece, `[pieces]`. All but a document's last have `context`; that one too if it is truncated.

    counts: pieces of each document, `[documents]`.
    """
    pieces = np.full(int(counts.sum(dtype=np.int64)), context, np.int32)
    done = 0
    for start in range(0, len(lengths), _BLOCK):
        some = slice(start, start + _BLOCK)
        ends = done + np.cumsum(counts[some], dtype=np.int64)
        # 32 bits suffice: a document's last piece begins inside it
        last = lengths[some] - (counts[some] - 1) * np.int32(context - overlap)
        pieces[ends - 1] = np.minimum(last, context)
        done = int(ends[-1])
    return pieces


def shard_begins(pieces: Lengths, shard_positions: int) -> Ints:
    """Where shards begin among consecutive pieces, `[shards + 1]`: each takes what fits in."""
    ends = np.cumsum(pieces, dtype=np.int64)
    begins, done = [0], 0
    while begins[-1] < len(pieces):
        begins.append(int(np.searchsorted(ends, done + shard_positions, side="right")))
        done = int(ends[begins[-1] - 1])
    return np.array(begins, np.int64)


def pack(lengths: Lengths, context: int) -> tuple[Ints, int]:
    """The window of each piece, `[pieces]`, and how many windows there are: best fit, longest pieces first.

    lengths: positions of each piece, 1 to context. A window takes pieces up to `context` positions together. Windows
    are numbered as they are begun; equal lengths go by the pieces' order, so the answer is one.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    windows = np.empty(len(lengths), np.int64)
    full = int(np.count_nonzero(lengths == context))
    windows[order[:full]] = np.arange(full)
    count = full
    chosen = []
    # open windows, ascending by room then number, as one integer each: room << 32 | number
    rooms: list[int] = []
    for length in lengths[order[full:]].tolist():
        place = bisect_left(rooms, length << 32)
        if place < len(rooms):
            found = rooms.pop(place)
            window, room = found & 0xFFFFFFFF, (found >> 32) - length
        else:
            window, room = count, context - length
            count += 1
        chosen.append(window)
        if room:
            insort(rooms, room << 32 | window)
    windows[order[full:]] = chosen
    return windows, count


def batches(lengths: Ints, batch_tokens: int) -> list[Ints]:
    """Places of the pieces in each batch, longest first, of equal ones in their order.

    lengths: positions of each piece, `[pieces]`, from 1 on. A batch, padded to its longest piece, has up to
    `batch_tokens` positions; a piece that is longer is a batch alone.
    """
    by = np.argsort(-lengths.astype(np.int64), kind="stable")
    found, begin = [], 0
    while begin < len(by):
        end = begin + max(1, batch_tokens // int(lengths[by[begin]]))
        found.append(by[begin:end])
        begin = end
    return found
