"""One part of the targets, the top-k or the drawn entries: ragged rows of (log-probability, id), to streams and back.

See `grid.py` for the log-probabilities, `vocabulary.py` for the ids, `ragged.py` for the rows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..spec import CacheSpec
from .grid import codes_of, values_of
from .ragged import BLOCK, Block, Streams, decode_rows, encode_rows, smallest_unsigned
from .vocabulary import classes_of, decode_lists, encode_lists, learn_lists, order_of, rank_in_context, ranks_of

Array = NDArray[Any]
Arrays = dict[str, Array]

ROWS_FOR_ORDER = 2**17  # rows from which an order is learned: more do not improve it
STREAMS = ("values", "firsts", "ties", "repeats")
CONTEXT_STREAMS = tuple(f"context_{name}" for name in ("tokens", "counts", "values", "firsts", "ties"))


def encode_part(
    part: str,
    spec: CacheSpec,
    entries: tuple[Array, Array, Array | None],
    counts_N: Array,
    tokens: Array | None,
) -> Arrays:
    """The streams of a part. entries: ids, log-probabilities and (of drawn entries) repeats, each `[n, K]`.

    part: "head" (the top-k entries) or "draws". counts_N: entries of each row.
    """
    ids_NK, logprobs_NK, extras_NK = entries
    codec, grid = spec.settings, spec.settings.grids[part]
    width = ids_NK.shape[1]
    ragged = bool((counts_N < width).any())
    place = np.arange(width)
    used_NK = place < counts_N[:, None] if ragged else None
    lowest = logprobs_NK.min(initial=0, where=True if used_NK is None else used_NK)
    top = int(codes_of(np.array([lowest], np.float32), *grid)[0])
    codes_NK = np.empty(ids_NK.shape, smallest_unsigned(top + 2))
    for start in range(0, len(ids_NK), BLOCK):
        some = slice(start, start + BLOCK)
        block = logprobs_NK[some] if used_NK is None else np.where(used_NK[some], logprobs_NK[some], 0)
        codes = codes_of(block, *grid)
        # exp need not be monotone to the last bit: a code may be smaller than the one before, or larger than top
        codes_NK[some] = codes if codec.sort_ties else np.maximum.accumulate(codes, axis=1)
    top = int(codes_NK.max(initial=0))
    sample = slice(None, None, -(-len(ids_NK) // ROWS_FOR_ORDER) or 1)
    counted = ids_NK[sample].ravel() if used_NK is None else ids_NK[sample][used_NK[sample]]
    counts_V = np.bincount(counted, minlength=spec.vocab_size)
    classes_V = classes_of(counts_V)
    ranks_V = ranks_of(order_of(classes_V))
    streams: Arrays = {}
    if codec.contexts:
        assert tokens is not None
        lists = learn_lists(tokens, ids_NK, used_NK, counts_V)
        ranks_NK = rank_in_context(tokens, ids_NK, lists, ranks_V)
        coded = encode_lists(lists, ranks_V)
        tables: tuple[Array, ...] = (lists.tokens.astype(np.uint32), lists.lengths.astype(np.uint16), *coded[:3])
        streams |= {f"{part}/{name}": array for name, array in zip(CONTEXT_STREAMS, tables, strict=True)}
    else:
        ranks_NK = np.empty(ids_NK.shape, ranks_V.dtype)
        for start in range(0, len(ids_NK), BLOCK):
            ranks_NK[start : start + BLOCK] = ranks_V[ids_NK[start : start + BLOCK]]
    coded = encode_rows(codes_NK, ranks_NK, counts_N, sort_ties=codec.sort_ties, extras_NK=extras_NK)
    streams[f"{part}/counts"] = counts_N.astype(np.uint16)
    streams[f"{part}/classes"] = classes_V
    streams[f"{part}/grid"] = values_of(top + 1, *grid)
    names = STREAMS[: 4 if extras_NK is not None else 3]
    return streams | {f"{part}/{name}": array for name, array in zip(names, coded, strict=False)}


def decode_part(
    part: str,
    spec: CacheSpec,
    streams: Mapping[str, Array],
    tokens: Array | None,
    counts_N: Array,
    offsets_N: Array,
    out: list[Array],
) -> None:
    """Write a part's ids, log-probabilities and (of drawn entries) draws into out, `[n, spec.width]` each.

    The counts_N[i] entries of row i go to its columns from offsets_N[i] on. Other columns are left as they are, or get
    id 0, log-probability -inf and draws 0. Raises ValueError if the streams contradict each other.
    """
    capacity = min(spec.k, spec.vocab_size) if part == "head" else spec.draws
    if (most := int(counts_N.max(initial=0))) > capacity:
        raise ValueError(f"{part}/counts: got up to {most} entries; expected at most {capacity}")
    tables = _tables(part, spec, streams, tokens)
    coded = Streams(*(streams.get(f"{part}/{name}", np.zeros(0, np.uint16)) for name in STREAMS))
    if (most := int(coded.extras.max(initial=0)) + 1) > max(spec.draws, 1):
        raise ValueError(f"{part}/repeats: got an entry drawn {most} times; expected at most {spec.draws}")
    room = tables.no_code, tables.no_rank
    for block in decode_rows(coded, counts_N, sort_ties=spec.settings.sort_ties, room=room):
        size = block.lengths[0] if block.lengths else 0  # the rows of the block that have an entry come first
        if not size:
            continue
        rows = slice(block.rows.start, block.rows.start + size) if isinstance(block.rows, slice) else block.rows[:size]
        codes_KB, ranks_KB = _filled(part, block, tables)
        last = 1 if block.lengths[-1] == size else 0  # nothing is filled up: the numbers that mean no entry are refused
        ids, logprobs = (table.slice(0, len(table) - last) for table in (tables.ids, tables.logprobs))
        found = [_gathered(ids, _index(part, ranks_KB, rows, tables).T), _gathered(logprobs, codes_KB.T)]
        if len(out) == 3:
            found.append(_draws(coded.extras, block).T)
        _put(found, rows, counts_N, offsets_N, out)


class _Tables(NamedTuple):
    """Tables from codes to log-probabilities and from ranks to ids. The number after the last means no entry."""

    logprobs: pa.Array  # float32: the grid, then -inf
    ids: pa.Array  # int32: all lists, then the order, then 0
    list_width: int  # a rank below it is an index in the row's list; any other is list_width + an index in the order
    list_begins_N: Array  # in `ids`; [0] without lists
    list_lengths_N: Array  # 0 for a row without one; [0] without lists
    no_code: int
    no_rank: int


def _tables(part: str, spec: CacheSpec, streams: Mapping[str, Array], tokens: Array | None) -> _Tables:
    grid = streams[f"{part}/grid"].astype(np.float32)
    if not np.isfinite(grid).all() or grid.max(initial=0) > 0 or (np.diff(grid) > 0).any():
        raise ValueError(f"{part}/grid: expected falling log-probabilities")
    ids, width = order_of(streams[f"{part}/classes"]), 0
    begins_N, lengths_N = np.zeros(0, np.int32), np.zeros(0, np.int64)
    if spec.settings.contexts:
        assert tokens is not None
        lists, width, begins_N, lengths_N = _lists(part, streams, tokens, ids)
        ids = np.concatenate([lists, ids])
    return _Tables(
        logprobs=pa.array(np.append(grid, np.float32(-np.inf))),
        ids=pa.array(np.append(ids, 0).astype(np.int32)),
        list_width=width,
        list_begins_N=begins_N,
        list_lengths_N=lengths_N,
        no_code=len(grid),
        no_rank=width + spec.vocab_size,
    )


def _lists(part: str, streams: Mapping[str, Array], tokens: Array, order: Array) -> tuple[Array, int, Array, Array]:
    """The ids of all lists, one after another; the largest length; where each row's list begins, its length `[n]`."""
    names, lengths, values, firsts, ties = (streams[f"{part}/{name}"] for name in CONTEXT_STREAMS)
    if names.shape != lengths.shape:
        raise ValueError(f"{part}: got {len(names)} contexts with {len(lengths)} lengths")
    names = names.astype(np.int64)
    if (np.diff(names) <= 0).any():
        raise ValueError(f"{part}/context_tokens: expected ascending numbers")
    lists = decode_lists(Streams(values, firsts, ties, np.zeros(0, np.uint16)), lengths, order)
    if not len(names):
        return lists, 0, np.zeros(0, np.int32), np.zeros(0, np.int64)
    where = np.minimum(np.searchsorted(names, tokens.astype(np.int64)), len(names) - 1)
    begins = np.concatenate([[0], lengths.astype(np.int64).cumsum()])[where].astype(np.int32)
    lengths_N = np.where(names[where] == tokens, lengths[where], 0).astype(lengths.dtype)
    return lists, int(lengths.max()), begins, lengths_N


def _filled(part: str, block: Block, tables: _Tables) -> tuple[Array, Array]:
    """Codes and ranks of a block, `[width, size]`, filled up with no_code and no_rank.

    Where nothing is filled up and there are no lists, those outside their tables are left to `_gathered`.
    """
    size = block.lengths[0]
    codes_KB, ranks_KB = block.codes_KB[:, :size], block.ranks_KB[:, :size]
    if block.lengths[-1] == size and not tables.list_width:
        return codes_KB, ranks_KB
    for j, n in enumerate(block.lengths):
        if n and (codes_KB[j, :n].max() >= tables.no_code or ranks_KB[j, :n].max() >= tables.no_rank):
            raise ValueError(f"{part}: a code or a rank outside its table")
        codes_KB[j, n:], ranks_KB[j, n:] = tables.no_code, tables.no_rank
    return codes_KB, ranks_KB


def _index(part: str, ranks_KB: Array, rows: slice | Array, tables: _Tables) -> Array:
    """The index of each rank in the table of ids."""
    if not tables.list_width:
        return ranks_KB
    listed_KB = ranks_KB < tables.list_width
    if (listed_KB & (ranks_KB >= tables.list_lengths_N[rows])).any():
        raise ValueError(f"{part}: a rank beyond the list of its row's token")
    index_KB: Array = ranks_KB.astype(np.int32)
    index_KB += np.where(listed_KB, tables.list_begins_N[rows], np.int32(len(tables.ids) - 1 - tables.no_rank))
    return index_KB


def _gathered(table: pa.Array, index_BK: Array) -> Array:
    """table[index]. Raises IndexError for an index outside the table.

    Arrow takes 16-bit indices as they are. NumPy widens them to 64 bits first, which takes three times as long. Arrow's
    own check of the indices takes ten times as long as this one.
    """
    flat = np.ascontiguousarray(index_BK).reshape(-1)
    if int(flat.max()) >= len(table) or (flat.dtype.kind != "u" and int(flat.min()) < 0):
        raise IndexError(f"got {flat.max()}; expected numbers below {len(table)}")
    values: Array = pc.take(table, pa.array(flat), boundscheck=False).to_numpy()
    return values.reshape(index_BK.shape)


def _draws(repeats: Array, block: Block) -> Array:
    """How often each entry of a block was drawn, `[width, size]`; 0 where a row has none."""
    draws_KB = np.zeros((len(block.lengths), block.lengths[0]), np.int32)
    for j, (start, length) in enumerate(zip(block.values_at, block.lengths, strict=True)):
        draws_KB[j, :length] = repeats[start : start + length]
        draws_KB[j, :length] += 1
    return draws_KB


def _put(found: list[Array], rows: slice | Array, counts_N: Array, offsets_N: Array, out: list[Array]) -> None:
    """Write decoded entries `[size, width]` into the columns of their rows."""
    offsets, width = offsets_N[rows], found[0].shape[1]
    if not (offsets != offsets[0]).any():
        places = slice(int(offsets[0]), int(offsets[0]) + width)
        if places.stop <= out[0].shape[1]:
            for target, values in zip(out, found, strict=True):
                target[rows, places] = values
            return
    numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
    used = np.arange(width) < counts_N[rows][:, None]
    flat = (numbers * out[0].shape[1] + offsets)[:, None] + np.arange(width)
    for target, values in zip(out, found, strict=True):
        target.reshape(-1)[flat[used]] = values[used]
