"""Targets as arrays to targets as streams of small integers, and back. No files, no compressors.

The top-k entries and the drawn entries are two *parts* of one form (`parts.py`), with tails and outcomes beside them.
FORMAT.md names the streams.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..spec import CacheSpec
from ..workspace import Workspace
from .parts import decode_part, encode_part

Array = NDArray[Any]
Arrays = dict[str, Array]

NO_TAIL = np.iinfo(np.int32).min  # the code of a tail of −inf
HIGHEST_TAIL_CODE = 2**30 - 1  # a difference of two is an int32


class Targets(NamedTuple):
    """Checked targets of n positions, as in SparseTargets, with the counts `[n]` of top-k and drawn entries."""

    ids: NDArray[np.int32]  # [n, K]
    logprobs: NDArray[np.float32]  # [n, K]
    tail: NDArray[np.float32]  # [n, M]
    draws: NDArray[np.int32] | None  # [n, K]
    outcomes: NDArray[np.int64]  # [n]
    head_counts: NDArray[np.int64]
    draw_counts: NDArray[np.int64]


def encode_targets(spec: CacheSpec, targets: Targets, tokens: Array | None) -> Arrays:
    """The streams of the targets. tokens `[n]`: the input at each position, needed for contexts."""
    streams: Arrays = {}
    if spec.k:
        width = int(targets.head_counts.max(initial=0))
        entries = targets.ids[:, :width], targets.logprobs[:, :width], None
        streams |= encode_part("head", spec, entries, targets.head_counts, tokens)
    if spec.draws:
        assert targets.draws is not None
        arrays = (targets.ids, targets.logprobs, targets.draws)
        ids, logprobs, draws = (_drawn(a, targets.head_counts, targets.draw_counts) for a in arrays)
        repeats = np.maximum(draws, 1).astype(np.uint32) - np.uint32(1)
        streams |= encode_part("draws", spec, (ids, logprobs, repeats), targets.draw_counts, tokens)
    streams["tail"] = _encode_tail(targets.tail, spec.settings.tail_step)
    if (targets.outcomes != spec.vocab_size - targets.head_counts).any():
        streams["outcomes"] = targets.outcomes.astype(np.int32)
    return streams


def decode_targets(
    spec: CacheSpec, streams: Mapping[str, Array], tokens: Array | None, into: Workspace | None = None
) -> Arrays:
    """ids int32 and logprobs float32 `[n, K]`, tail float32 `[n, M]`, outcomes int32 `[n]`, and draws int32 `[n, K]`
    where the spec has draws; K = spec.width. into: memory for the `[n, K]` arrays.

    Raises ValueError if the streams contradict each other.
    """
    rows = streams["tail"].shape[1]
    none = np.zeros(rows, np.int64)
    head_counts = streams["head/counts"].astype(np.int64) if spec.k else none
    full = not spec.draws and bool((head_counts == spec.width).all())  # every element will be written
    allocate = (into or Workspace()).array
    ids = allocate("ids", (rows, spec.width), np.dtype(np.int32))
    logprobs = allocate("logprobs", (rows, spec.width), np.dtype(np.float32))
    if not full:
        ids.fill(0)
        logprobs.fill(-np.inf)
    arrays: Arrays = {"ids": ids, "logprobs": logprobs}
    if spec.k:
        decode_part("head", spec, streams, tokens, head_counts, none, [ids, logprobs])
    if spec.draws:
        arrays["draws"] = draws = allocate("draws", (rows, spec.width), np.dtype(np.int32))
        draws.fill(0)
        counts = streams["draws/counts"].astype(np.int64)
        decode_part("draws", spec, streams, tokens, counts, head_counts, [ids, logprobs, draws])
    arrays["tail"] = _decode_tail(streams["tail"], spec.settings.tail_step)
    outcomes = streams.get("outcomes", spec.vocab_size - head_counts)
    if (outcomes < 0).any() or (outcomes > spec.vocab_size - head_counts).any():
        raise ValueError("outcomes: got numbers outside 0 to those outside the top-k entries")
    arrays["outcomes"] = outcomes.astype(np.int32)
    return arrays


def _drawn(array_NK: Array, offsets_N: Array, counts_N: Array) -> Array:
    """The drawn entries of each row, from column 0 on."""
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
    codes = np.cumsum(np.where(absent, 0, codes_MN), axis=0, dtype=np.int64)
    if codes_MN[1:, absent].any() or np.abs(codes).max(initial=0) > HIGHEST_TAIL_CODE:
        raise ValueError("tail: got codes outside ±(2^30 - 1), or differences below -inf")
    values = codes.T * np.float64(step)
    values[absent] = -np.inf
    return np.ascontiguousarray(values, np.float32)
