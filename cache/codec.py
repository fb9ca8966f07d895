"""Targets as arrays to targets as streams of small integers, and back. No files, no compressors.

Two *parts* share one form: the head, and the drawn entries. Each is a ragged list of (log-probability, id) a row: see
`grid.py` for the log-probabilities, `vocabulary.py` for the ids, `ragged.py` for the rows. FORMAT.md names the streams.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from .grid import codes_of, values_of
from .ragged import BLOCK, Streams, decode_rows, encode_rows, smallest_unsigned
from .spec import CacheSpec
from .vocabulary import (
    classes_of,
    decode_lists,
    encode_lists,
    learn_lists,
    order_of,
    rank_in_context,
    ranks_of,
)
from .workspace import Workspace, new_array

Array = NDArray[Any]
Arrays = dict[str, Array]

ROWS_FOR_ORDER = 2**17  # rows from which an order is learnt: more teach nothing
NO_TAIL = np.iinfo(np.int32).min  # the code of a tail of −inf
STREAMS = ("values", "firsts", "ties", "repeats")
CONTEXT_STREAMS = tuple(f"context_{name}" for name in ("tokens", "counts", "values", "firsts", "ties"))


class Targets(NamedTuple):
    """Checked targets of n positions: see `SparseTargets` in the design. counts `[n]` of head and drawn entries."""

    ids: NDArray[np.int32]  # [n, K]
    logprobs: NDArray[np.float32]  # [n, K]
    tail: NDArray[np.float32]  # [n, M]
    draws: NDArray[np.int32] | None  # [n, K]
    outcomes: NDArray[np.int64]  # [n]
    head_counts: NDArray[np.int64]
    draw_counts: NDArray[np.int64]


def encode_targets(spec: CacheSpec, targets: Targets, tokens: Array | None) -> Arrays:
    """The streams of the targets. tokens `[n]`: the input at each position, which a spec with contexts needs."""
    codec = spec.settings
    streams: Arrays = {}
    if spec.k:
        width = int(targets.head_counts.max(initial=0))
        grid = (codec.step, codec.growth, codec.cap)
        entries = targets.ids[:, :width], targets.logprobs[:, :width], None
        streams |= _encode_part("head", spec, entries, targets.head_counts, grid, tokens)
    if spec.draws:
        assert targets.draws is not None
        grid = (codec.draw_step, 0.0, codec.draw_step)
        arrays = (targets.ids, targets.logprobs, targets.draws)
        ids, logprobs, draws = (_drawn(a, targets.head_counts, targets.draw_counts) for a in arrays)
        repeats = np.maximum(draws, 1).astype(np.uint32) - np.uint32(1)
        streams |= _encode_part("draws", spec, (ids, logprobs, repeats), targets.draw_counts, grid, tokens)
    streams["tail"] = _encode_tail(targets.tail, codec.tail_step)
    if (targets.outcomes != spec.vocab_size - targets.head_counts).any():
        streams["outcomes"] = targets.outcomes.astype(np.int32)
    return streams


def decode_targets(
    spec: CacheSpec, streams: Mapping[str, Array], tokens: Array | None, into: Workspace | None = None
) -> Arrays:
    """ids int32 and logprobs float32 `[n, K]`, tail float32 `[n, M]`, outcomes int32 `[n]`, and draws int32 `[n, K]`
    where the spec has draws; K = spec.width. into: memory for the `[n, K]` arrays.

    Raises ValueError where the streams contradict each other.
    """
    rows = streams["tail"].shape[1]
    none = np.zeros(rows, np.int64)
    head_counts = streams["head/counts"].astype(np.int64) if spec.k else none
    full = not spec.draws and bool((head_counts == spec.width).all())  # every place will be written
    allocate = new_array if into is None else into.array
    ids = allocate("ids", (rows, spec.width), np.dtype(np.int32))
    logprobs = allocate("logprobs", (rows, spec.width), np.dtype(np.float32))
    if not full:
        ids.fill(0)
        logprobs.fill(-np.inf)
    arrays: Arrays = {"ids": ids, "logprobs": logprobs}
    if spec.k:
        _decode_part("head", spec, streams, tokens, head_counts, none, [ids, logprobs])
    if spec.draws:
        arrays["draws"] = draws = allocate("draws", (rows, spec.width), np.dtype(np.int32))
        draws.fill(0)
        counts = streams["draws/counts"].astype(np.int64)
        _decode_part("draws", spec, streams, tokens, counts, head_counts, [ids, logprobs, draws])
    arrays["tail"] = _decode_tail(streams["tail"], spec.settings.tail_step)
    outcomes = streams["outcomes"] if "outcomes" in streams else spec.vocab_size - head_counts
    arrays["outcomes"] = outcomes.astype(np.int32)
    return arrays


def _encode_part(
    part: str,
    spec: CacheSpec,
    entries: tuple[Array, Array, Array | None],
    counts_N: Array,
    grid: tuple[float, float, float],
    tokens: Array | None,
) -> Arrays:
    ids_NK, logprobs_NK, extras_NK = entries
    codec = spec.settings
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


def id_table(
    part: str, streams: Mapping[str, Array], tokens: Array | None, vocab_size: int
) -> tuple[Array, int, Array]:
    """What turns ranks into ids: a table, the width of a list, and where in the table each row's list begins `[n]`.

    The table holds all lists, one after another, and then the order. A rank r below the width is entry r of the row's
    list; any other is entry r − width of the order. Without contexts the width is 0 and there are no beginnings
    (`[0]`).
    """
    classes = streams[f"{part}/classes"]
    if classes.shape != (vocab_size,):
        raise ValueError(f"{part}/classes: {classes.shape} for a vocabulary of {vocab_size}")
    order = order_of(classes)
    if f"{part}/context_tokens" not in streams:
        return order.astype(np.int32), 0, np.zeros(0, np.int32)
    names, lengths, values, firsts, ties = (streams[f"{part}/{name}"] for name in CONTEXT_STREAMS)
    if names.shape != lengths.shape:
        raise ValueError(f"{part}: {len(names)} contexts with {len(lengths)} lengths")
    if tokens is None:
        raise ValueError("the ids' contexts need the input column `tokens`")
    if (np.diff(names.astype(np.int64)) <= 0).any():
        raise ValueError(f"{part}/context_tokens: ascending numbers are needed")
    lists = decode_lists(Streams(values, firsts, ties, np.zeros(0, np.uint16)), lengths, order)
    begins_C = np.concatenate([[0], lengths.astype(np.int64).cumsum()])
    where = np.searchsorted(names, tokens.astype(np.int64)) if len(names) else np.zeros(len(tokens), np.int64)
    return (
        np.concatenate([lists, order]).astype(np.int32),
        int(lengths.max(initial=0)),
        begins_C[where].astype(np.int32),
    )


def _list_lengths(part: str, streams: Mapping[str, Array], tokens: Array) -> Array:
    """The length of the list of each row's token `[n]`; 0 where there is none."""
    names, lengths = streams[f"{part}/context_tokens"].astype(np.int64), streams[f"{part}/context_counts"]
    where = np.minimum(np.searchsorted(names, tokens.astype(np.int64)), len(names) - 1)
    return np.where(names[where] == tokens, lengths[where], 0).astype(lengths.dtype)


def _decode_part(
    part: str,
    spec: CacheSpec,
    streams: Mapping[str, Array],
    tokens: Array | None,
    counts_N: Array,
    offsets_N: Array,
    out: list[Array],
) -> None:
    """Write a part's ids, log-probabilities (and draws) into out, each row from its offset on."""
    table, list_width, begins_N = id_table(part, streams, tokens, spec.vocab_size)
    list_lengths_N = _list_lengths(part, streams, tokens) if list_width and tokens is not None else None
    grid = streams[f"{part}/grid"].astype(np.float32)
    if not np.isfinite(grid).all() or grid.max(initial=0) > 0 or (np.diff(grid) > 0).any():
        raise ValueError(f"{part}/grid: log-probabilities of falling order are needed")
    capacity = min(spec.k, spec.vocab_size) if part == "head" else spec.draws
    if counts_N.shape != offsets_N.shape or int(counts_N.max(initial=0)) > capacity:
        raise ValueError(f"{part}/counts: {counts_N.shape} rows with up to {counts_N.max(initial=0)} entries")
    if (offsets_N + counts_N).max(initial=0) > spec.width:
        raise ValueError(f"{part}/counts: more than {spec.width} entries in a row")
    sort_ties = spec.settings.sort_ties
    coded = Streams(*(streams.get(f"{part}/{name}", np.zeros(0, np.uint16)) for name in STREAMS))
    no_code, no_rank = len(grid), list_width + spec.vocab_size
    code_table = np.concatenate([grid, np.array([-np.inf], np.float32)])
    table = np.concatenate([table, np.array([0], np.int32)])
    shift = np.int32(len(table) - 1 - no_rank)
    width = int(counts_N.max(initial=0))
    offset = int(offsets_N[0]) if len(offsets_N) else 0
    aligned = not (offsets_N != offset).any()
    # one more than any code and any rank has to fit
    codes_KB = np.empty((width, BLOCK + 32), smallest_unsigned(no_code))[:, :BLOCK]
    ranks_KB = np.empty((width, BLOCK + 32), smallest_unsigned(no_rank))[:, :BLOCK]
    id_values, code_values = pa.array(table), pa.array(code_table)
    for block in decode_rows(coded, counts_N, sort_ties=sort_ties):
        size = block.lengths[0] if width else 0
        last = block.lengths[-1] if width else 0
        codes, ranks = block.codes_KB[:, :size], block.ranks_KB[:, :size]
        if last < size or codes.dtype != codes_KB.dtype or ranks.dtype != ranks_KB.dtype:
            codes_KB[:, :size], ranks_KB[:, :size] = codes, ranks
            codes, ranks = codes_KB[:, :size], ranks_KB[:, :size]
        if not size:
            continue
        if last < size:
            highest = [(codes[j, :some].max(), ranks[j, :some].max()) for j, some in enumerate(block.lengths) if some]
            for j, length in enumerate(block.lengths):
                codes[j, length:] = no_code
                ranks[j, length:] = no_rank
        else:
            highest = [(codes.max(), ranks.max())]
        if any(code >= no_code or rank >= no_rank for code, rank in highest):
            raise ValueError(f"{part}: a code or a rank outside its table")
        rows = block.rows
        if list_lengths_N is not None:
            listed = ranks < list_width
            if (listed & (ranks >= list_lengths_N[rows][:size])).any():
                raise ValueError(f"{part}: a rank beyond the list of its row's token")
            index = ranks.astype(np.int32)
            index += np.where(listed, begins_N[rows][:size], shift)
        else:
            index = ranks
        rows = slice(rows.start, rows.start + size) if isinstance(rows, slice) else rows[:size]
        found = [_gathered(id_values, index.T), _gathered(code_values, codes.T)]
        if len(out) == 3:
            found.append(_repeats(coded.extras, block.values_at, block.lengths, size))
        if aligned:
            for target, values in zip(out, found, strict=True):
                target[rows, offset : offset + width] = values
            continue
        numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        used = np.arange(width) < counts_N[numbers][:, None]
        flat = (numbers * spec.width + offsets_N[numbers])[:, None] + np.arange(width)
        for target, values in zip(out, found, strict=True):
            target.reshape(-1)[flat[used]] = values[used]


def _gathered(table: pa.Array, index_BK: Array) -> Array:
    """table[index], of indices that are known to lie inside.

    Arrow takes 16-bit indices as they are. NumPy widens them to 64 bits first, and takes three times as long.
    """
    flat = pa.array(np.ascontiguousarray(index_BK).reshape(-1))
    values: Array = pc.take(table, flat, boundscheck=False).to_numpy()
    return values.reshape(index_BK.shape)


def _repeats(extras: Array, at: list[int], lengths: list[int], size: int) -> Array:
    """How often each entry of a block was drawn, `[size, width]`; 0 in unused places."""
    draws_KB = np.zeros((len(lengths), size), np.int32)
    for j, (start, length) in enumerate(zip(at, lengths, strict=True)):
        draws_KB[j, :length] = extras[start : start + length]
        draws_KB[j, :length] += 1
    return draws_KB.T


def _drawn(array_NK: Array, offsets_N: Array, counts_N: Array) -> Array:
    """The drawn entries of each row, from place 0 on."""
    width = int(counts_N.max(initial=0))
    offset = int(offsets_N[0]) if len(offsets_N) else 0
    if not (offsets_N != offset).any():
        return array_NK[:, offset : offset + width]
    places = np.minimum(offsets_N[:, None] + np.arange(width), array_NK.shape[1] - 1)
    return np.take_along_axis(array_NK, places, axis=1)


def _encode_tail(tail_NM: NDArray[np.float32], step: float) -> NDArray[np.int32]:
    """Codes `[M, n]`: the first temperature's, then differences between neighbours; NO_TAIL where there is no tail."""
    absent = ~np.isfinite(tail_NM[:, 0])
    codes = np.rint(np.where(absent[:, None], 0, tail_NM).T.astype(np.float64) / step).astype(np.int32)
    codes[1:] = np.diff(codes, axis=0)
    codes[0, absent] = NO_TAIL
    return codes


def _decode_tail(codes_MN: Array, step: float) -> NDArray[np.float32]:
    absent = codes_MN[0] == NO_TAIL
    values = np.cumsum(np.where(absent, 0, codes_MN), axis=0, dtype=np.int64).T * np.float64(step)
    values[absent] = -np.inf
    return np.ascontiguousarray(values, np.float32)
