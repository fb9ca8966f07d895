"""Rows of (value code, rank) pairs as three streams of small integers, and back.

The layout is column by column: the first entries of all rows, then the second entries, and so on, with the rows sorted
longest first (stable), so that the rows that have a j-th entry are a prefix. Each column has statistics of its own,
which a compressor sees separately, and encoding and decoding work on whole columns.

Value codes do not decrease along a row; each entry stores the difference to the one before (the first stores the code
itself). Entries of equal code are a *tie*: their order has no meaning, so they are sorted by rank, and all but the
first store only the difference of ranks, less one.

    values  for each entry: the difference of codes
    firsts  for each entry that is not tied to the one before: its rank
    ties    for each entry that is: its rank − the rank before − 1

Without `sort_ties` all ranks are in `firsts`, in the order of the entries.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CacheError

Array = NDArray[Any]
Ints = NDArray[np.int64]

BLOCK = 8192  # rows handled at a time: their columns stay in the cache of a core
_MOST_IN_BLOCK = 2**25  # entries
# Columns a power of two of bytes apart would share a few lines of the processor's cache: transposing is then ten times
# slower.
PITCH = 32


class Streams(NamedTuple):
    """The stored entries of all rows: see the module. extras: one more number per entry, or none."""

    values: Array
    firsts: Array
    ties: Array
    extras: Array


def smallest_unsigned(highest: int) -> np.dtype[np.unsignedinteger]:
    """uint16 or uint32, whichever holds numbers up to `highest` (pcodec takes no 8-bit ones)."""
    return np.dtype(np.uint16 if highest < 2**16 else np.uint32)


def longest_first(counts_N: Array) -> Ints | None:
    """The rows by falling count, stable; None where they are in that order already."""
    counts = counts_N.astype(np.int64)
    if not (np.diff(counts) > 0).any():
        return None
    most = int(counts.max())
    return np.argsort((most - counts).astype(smallest_unsigned(most)), kind="stable")


def column_lengths(counts_N: Array) -> Ints:
    """How many rows have a first, a second, ... entry."""
    return np.bincount(counts_N.astype(np.int64), minlength=1)[::-1].cumsum()[::-1][1:]


def encode_rows(
    codes_NK: Array, ranks_NK: Array, counts_N: Array, *, sort_ties: bool, extras_NK: Array | None = None
) -> Streams:
    """Streams of rows of value codes, ranks and optionally one more number, unsigned `[N, K]`.

    Only the first counts_N[i] entries of row i are read. The codes must not decrease along them.
    """
    rows = len(codes_NK)
    lengths = column_lengths(counts_N)
    width = len(lengths)
    order = longest_first(counts_N)
    columns = [codes_NK[:, :width], ranks_NK[:, :width]] + ([] if extras_NK is None else [extras_NK[:, :width]])
    bits = [int(c.max(initial=0)).bit_length() for c in columns]
    bits[0] = (int(codes_NK[:, :width].max(initial=0)) + 1).bit_length()  # room for a code above all others: no entry
    key_type: np.dtype[np.unsignedinteger] = np.dtype(np.uint32 if sum(bits) <= 32 else np.uint64)
    if sort_ties and sum(bits) > 64:
        raise CacheError(f"codes, ranks and draws: got {bits} bits; expected at most 64 together. Use larger steps.")
    types = [smallest_unsigned((1 << b) - 1) for b in bits]
    placed_KN = [np.empty((width, rows + PITCH), t)[:, :rows] for t in types]
    place_K = np.arange(width)
    ragged = bool(width) and int(lengths[-1]) < rows
    for start in range(0, rows, BLOCK):
        at = slice(start, min(start + BLOCK, rows))
        some = at if order is None else order[at]
        block = [c[some] for c in columns]
        if sort_ties:
            key = block[0].astype(key_type)
            for part, width_in_bits in zip(block[1:], bits[1:], strict=True):
                key <<= key_type.type(width_in_bits)
                key |= part.astype(key_type, copy=False)
            if ragged:
                key[place_K >= counts_N[some, None]] = ~key_type.type(0)
            key.sort(axis=1)
            for i in range(len(columns) - 1, 0, -1):
                block[i] = key & key_type.type((1 << bits[i]) - 1)
                key >>= key_type.type(bits[i])
            block[0] = key
        for target, part in zip(placed_KN, block, strict=True):
            target[:, at] = part.T
    codes_KN, ranks_KN, *extras_KN = placed_KN
    total = int(lengths.sum())
    values, firsts = np.empty(total, types[0]), np.empty(total, types[1])
    ties = np.empty(total if sort_ties else 0, types[1])
    extras = np.empty(total, types[2]) if extras_KN else np.empty(0, np.uint16)
    at_value = at_first = at_tie = 0
    for j, length in enumerate(lengths.tolist()):
        column = values[at_value : at_value + length]
        if extras_KN:
            extras[at_value : at_value + length] = extras_KN[0][j, :length]
        at_value += length
        ranks = ranks_KN[j, :length]
        if j == 0:
            column[:] = codes_KN[0, :length]
        else:
            np.subtract(codes_KN[j, :length], codes_KN[j - 1, :length], out=column)
        if j == 0 or not sort_ties:
            firsts[at_first : at_first + length] = ranks
            at_first += length
            continue
        tied, free = np.flatnonzero(column == 0), np.flatnonzero(column)
        firsts[at_first : at_first + len(free)] = ranks[free]
        ties[at_tie : at_tie + len(tied)] = ranks[tied] - ranks_KN[j - 1, tied] - 1
        at_first += len(free)
        at_tie += len(tied)
    return Streams(values, firsts[:at_first], ties[:at_tie], extras)


class Block(NamedTuple):
    """Decoded entries of some rows, column by column: column j of codes and ranks is valid up to lengths[j]."""

    rows: slice | Ints
    codes_KB: Array
    ranks_KB: Array
    lengths: list[int]
    values_at: list[int]  # where each column begins in the stream of values (and of extras)


def decode_rows(
    streams: Streams, counts_N: Array, *, sort_ties: bool, room: tuple[int, int] = (0, 0)
) -> Iterator[Block]:
    """The rows of `encode_rows`, BLOCK at a time. The next block overwrites the arrays of the one before.

    room: a code and a rank that the arrays of a block hold besides. Raises ValueError if streams do not fit the counts.
    """
    rows = len(counts_N)
    lengths = column_lengths(counts_N)
    width = len(lengths)
    order = longest_first(counts_N)
    column_start = np.concatenate([[0], lengths.cumsum()])
    values, firsts, ties = streams.values, streams.firsts, streams.ties
    if len(values) != column_start[-1] or len(streams.extras) not in (0, len(values)):
        raise ValueError(f"got {len(values)} values and {len(streams.extras)} extras; expected {column_start[-1]}")
    ties_in = np.zeros(width, np.int64)
    for j in range(1, width if sort_ties else 0):
        column = values[column_start[j] : column_start[j + 1]]
        ties_in[j] = len(column) - np.count_nonzero(column)
    if len(ties) != ties_in.sum() or len(firsts) != len(values) - len(ties):
        raise ValueError(
            f"got {len(firsts)} firsts and {len(ties)} ties for {len(values)} values; expected {ties_in.sum()} ties"
        )
    if len(ties) and ties.dtype != firsts.dtype:
        raise ValueError(f"got ties of type {ties.dtype}; expected {firsts.dtype}, as firsts")
    tie_at = np.concatenate([[0], ties_in.cumsum()]).tolist()
    first_at = np.concatenate([[0], (lengths - ties_in).cumsum()]).tolist()
    starts, sizes = column_start.tolist(), lengths.tolist()
    # Sums of codes do not wrap: where they might, they are made in 64 bits.
    most = np.iinfo(values.dtype).max
    bound = width * int(values.max(initial=0))
    if bound > most:
        bound = sum(int(values[begin:end].max()) for begin, end in pairwise(starts))
    wide = values.dtype if bound <= most else np.dtype(np.uint64)
    block = min(BLOCK, rows, _MOST_IN_BLOCK // max(width, 1))
    types = [np.promote_types(t, smallest_unsigned(r)) for t, r in zip((wide, firsts.dtype), room, strict=True)]
    codes_KB, ranks_KB = (np.zeros((width, block + PITCH), t)[:, :block] for t in types)
    for start in range(0, rows, block or 1):
        stop = min(start + block, rows)
        here = [max(0, min(size, stop) - start) for size in sizes]
        at = [starts[j] + start for j in range(width)]
        for j, length in enumerate(here):
            if not length:
                break
            column = values[at[j] : at[j] + length]
            ranks = ranks_KB[j, :length]
            if j == 0:
                codes_KB[0, :length] = column
            else:
                np.add(codes_KB[j - 1, :length], column, out=codes_KB[j, :length])
            if j == 0 or not sort_ties:
                ranks[:] = firsts[first_at[j] : first_at[j] + length]
                first_at[j] += length
                continue
            tied_B = column == 0
            tied = tied_B.nonzero()[0]  # np.flatnonzero takes twice as long
            free = np.logical_not(tied_B, out=tied_B).nonzero()[0]
            ranks[free] = firsts[first_at[j] : first_at[j] + len(free)]
            before = ranks_KB[j - 1].take(tied)
            after = before + ranks.dtype.type(1)
            after += ties[tie_at[j] : tie_at[j] + len(tied)]
            if np.count_nonzero(after <= before):
                raise ValueError("got a rank that its type does not hold")
            ranks[tied] = after
            first_at[j] += len(free)
            tie_at[j] += len(tied)
        yield Block(slice(start, stop) if order is None else order[start:stop], codes_KB, ranks_KB, here, at)
