"""Token ids as ranks: small for frequent ids, and smallest for those that are likely after the input token.

A shard's *order* lists the whole vocabulary, most frequent first. It is stored as one small class per id,
round(2·log2(count + 1)): ids of one class are sorted by number.

A *context* is an input token (the one at the row's position) that is frequent enough to have a list: the ids that are
likely after it, most likely first. In a shard with lists, the rank of an id in the list of its row's token is its index
in that list, and the rank of every other id is `width` + its index in the order, where `width` is the length of the
longest list.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .ragged import Streams, decode_rows, encode_rows, smallest_unsigned

Array = NDArray[Any]
Ints = NDArray[np.int64]

# Rows from which lists are learned: more of them cost time and improve little.
ROWS_FOR_LISTS = 2**18
# An id is listed if it occurs this often in the context, and at least as often as everywhere; a token has a list if it
# is at this many positions. Measured on English prose: 3 to 6, once or twice, 8 or 16 are within 1%.
OCCURRENCES, LIFT, POSITIONS, LONGEST = 4, 1.0, 8, 1024


class Lists(NamedTuple):
    """Contexts: tokens `[C]` ascending, lengths `[C]`, and the ids of all lists one after another, with their classes.

    A list is sorted by falling class (of the id's count in the context), then by index in the order.
    """

    tokens: Ints
    lengths: Ints
    ids: Ints
    classes: Ints

    @property
    def width(self) -> int:
        return int(self.lengths.max(initial=0))


def classes_of(counts_V: Array) -> NDArray[np.uint16]:
    """The class of each id's count, `[V]`."""
    classes: NDArray[np.uint16] = np.floor(2 * np.log2(counts_V + 1.0) + 0.5).astype(np.uint16)
    return classes


def order_of(classes_V: Array) -> Ints:
    """The ids, highest class first, then by number."""
    return np.argsort(classes_V.max(initial=0) - classes_V, kind="stable")


def ranks_of(order_V: Ints) -> Array:
    """The index of each id in the order."""
    ranks = np.empty(len(order_V), smallest_unsigned(len(order_V)))
    ranks[order_V] = np.arange(len(order_V), dtype=ranks.dtype)
    return ranks


def learn_lists(tokens_N: Array, ids_NK: Array, used_NK: Array | None, counts_V: Array) -> Lists:
    """The lists that save more than they cost. used_NK: which entries are used (None: all)."""
    stride = -(-len(tokens_N) // ROWS_FOR_LISTS)
    tokens, ids = tokens_N[::stride].astype(np.int64), ids_NK[::stride]
    names, context = np.unique(tokens, return_inverse=True)
    positions = np.bincount(context)
    vocabulary = len(counts_V)
    pairs = context.astype(np.uint64)[:, None] * np.uint64(vocabulary) + ids.astype(np.uint64)
    enough = positions[context] >= max(1, POSITIONS // stride)
    keys = pairs[enough].ravel() if used_NK is None else pairs[enough][used_NK[::stride][enough]]
    keys.sort()
    if not len(keys):
        return Lists(*(np.zeros(0, np.int64) for _ in Lists._fields))
    at = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    count = np.diff(np.concatenate([at, [len(keys)]]))
    where, what = np.divmod(keys[at].astype(np.int64), vocabulary)
    share = counts_V / max(1, int(counts_V.sum()))
    mass = np.bincount(where, count, minlength=len(names))
    keep = (count >= OCCURRENCES) & (count > LIFT * mass[where] * share[what])
    where, what, count = where[keep], what[keep], count[keep]
    level = classes_of(count).astype(np.int64)
    by = np.lexsort((ranks_of(order_of(classes_of(counts_V)))[what], -level, where))
    where, what, level = where[by], what[by], level[by]
    short = np.arange(len(where)) - np.searchsorted(where, where) < LONGEST
    where, what, level = where[short], what[short], level[short]
    present, lengths = np.unique(where, return_counts=True)
    return Lists(names[present], lengths, what, level)


def rank_in_context(tokens_N: Array, ids_NK: Array, lists: Lists, ranks_V: Array) -> Array:
    """The rank of every entry `[N, K]` given its row's token."""
    width = lists.width
    table = ranks_V.astype(smallest_unsigned(width + len(ranks_V)))
    table += table.dtype.type(width)
    result = np.empty(ids_NK.shape, table.dtype)
    by = np.argsort(tokens_N, kind="stable")
    tokens = tokens_N[by]
    first = np.searchsorted(tokens, lists.tokens, side="left")
    last = np.searchsorted(tokens, lists.tokens, side="right")
    offset = np.concatenate([[0], lists.lengths.cumsum()])
    without = np.ones(len(tokens_N), bool)
    for c in range(len(lists.tokens)):
        rows = by[first[c] : last[c]]
        without[rows] = False
        listed = lists.ids[offset[c] : offset[c + 1]]
        saved = table[listed]
        table[listed] = np.arange(len(listed), dtype=table.dtype)
        result[rows] = table[ids_NK[rows]]
        table[listed] = saved
    rows = np.flatnonzero(without)
    result[rows] = table[ids_NK[rows]]
    return result


def encode_lists(lists: Lists, ranks_V: Array) -> Streams:
    """The lists as rows of (highest class − class, index in the order), ties sorted."""
    used_CL = np.arange(lists.width) < lists.lengths[:, None]
    codes, ranks = np.zeros(used_CL.shape, np.uint16), np.zeros(used_CL.shape, ranks_V.dtype)
    codes[used_CL] = lists.classes.max(initial=0) - lists.classes
    ranks[used_CL] = ranks_V[lists.ids]
    return encode_rows(codes, ranks, lists.lengths, sort_ties=True)


def decode_lists(streams: Streams, lengths_C: Array, order_V: Ints) -> Ints:
    """The ids of all lists, one after another. Raises ValueError if the streams do not fit the lengths."""
    lengths = lengths_C.astype(np.int64)
    if (lengths < 1).any() or int(lengths.sum()) != len(streams.values):
        raise ValueError("got lists without ids, or of other lengths than their streams")
    ids, begins = np.empty(len(streams.values), np.int64), lengths.cumsum() - lengths
    for block in decode_rows(streams, lengths, sort_ties=True):
        begin = begins[block.rows]
        for j, size in enumerate(block.lengths):
            if not size:
                break
            ranks = block.ranks_KB[j, :size]
            if int(ranks.max(initial=0)) >= len(order_V):
                raise ValueError("got a list with a rank outside the order")
            ids[begin[:size] + j] = order_V[ranks]
    return ids
