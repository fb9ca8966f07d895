"""From open shards of text to micro-batches: a rank's sequences of a step, cut up, and their rows taken together."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.spec import CacheSpec
from .batch import MicroBatch
from .compact import BatchShape, compact_targets
from .micro_batches import packed_micro_batches, padded_micro_batches
from .shards import IGNORED, Inputs, OpenShard, ranges

Ints = NDArray[np.int64]


class Pieces(NamedTuple):
    """Pieces, `[p]` each: which of the open shards and of the sequences they are of, their first rows in the shard, and
    their lengths. Those of one shard lie together."""

    shard: Ints
    sequence: Ints
    begin: Ints
    length: Ints


def gather(
    sequences: Sequence[tuple[OpenShard[Inputs], Ints]], spec: CacheSpec, shape: BatchShape, device: torch.device
) -> list[MicroBatch]:
    """The micro-batches of these sequences, by shard. They are on the host, page-locked if the device is a GPU."""
    shards = [shard for shard, _ in sequences]
    parts, windows, done = [], [], 0
    for number, (shard, some) in enumerate(sequences):
        which = shard.inputs.pieces_of(some)
        begin = shard.inputs.piece_begins[which]
        windows.append(np.diff(shard.inputs.first_piece)[some] if len(some) else some)
        sequence = done + np.repeat(np.arange(len(some)), windows[-1])
        length = shard.inputs.piece_begins[which + 1] - begin
        parts.append(Pieces(np.full(len(which), number), sequence, begin, length))
        done += len(some)
    pieces = Pieces(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return [_micro_batch(shards, Pieces(*(c[at] for c in pieces)), spec, shape, device)
            for at in _cut(pieces.length, np.concatenate(windows), shape)]  # fmt: skip


def _cut(lengths: Ints, pieces_of_window: Ints, shape: BatchShape) -> list[Ints]:
    """The places of the pieces of each micro-batch."""
    if shape.layout == "padded":
        return padded_micro_batches(lengths, shape.tokens, shape.rows)
    begins = np.cumsum(pieces_of_window) - pieces_of_window
    whole = np.add.reduceat(lengths, begins)
    return [
        ranges(begins[some], pieces_of_window[some]) for some in packed_micro_batches(whole, shape.tokens, shape.rows)
    ]


def _micro_batch(
    shards: list[OpenShard[Inputs]], pieces: Pieces, spec: CacheSpec, shape: BatchShape, device: torch.device
) -> MicroBatch:
    allocate = partial(torch.empty, pin_memory=device.type == "cuda")
    ends = np.cumsum(pieces.length)
    count, n, longest = len(ends), int(ends[-1]), int(pieces.length.max())
    rows = ranges(pieces.begin, pieces.length)
    runs = _runs(pieces, ends)
    size, flat = (1, n), np.arange(n)
    if shape.layout == "padded":
        size = (count, longest)
        flat = ranges(np.arange(count) * longest, pieces.length)
    columns = [allocate(size, dtype=torch.int64) for _ in range(3)]
    tokens, labels, places = (column.numpy().reshape(-1) for column in columns)
    if shape.layout == "padded":
        tokens.fill(0)
        labels.fill(IGNORED)
        places.reshape(size)[:] = np.arange(longest)
    taken = np.empty(n, np.int32)
    for shard, a, b in runs:
        tokens[flat[a:b]] = shards[shard].inputs.tokens[rows[a:b]]
        taken[a:b] = shards[shard].inputs.labels[rows[a:b]]
        if shape.layout == "packed":
            places[a:b] = shards[shard].inputs.places[rows[a:b]]
    labels[flat] = taken
    kept = np.flatnonzero(taken != IGNORED)
    bounds = np.searchsorted(kept, [0, *(b for _, _, b in runs)])
    wanted = [(shards[s], rows[kept[i:j]]) for (s, _, _), i, j in zip(runs, bounds[:-1], bounds[1:], strict=True)]
    cu_seqlens, index = allocate(count + 1, dtype=torch.int32), allocate(len(kept), dtype=torch.int64)
    cu_seqlens.numpy()[:] = np.append(0, ends)
    sequences = allocate(count, dtype=torch.int32)
    sequences.numpy()[:] = pieces.sequence
    index.numpy()[:] = flat[kept]
    return MicroBatch(
        input_ids=columns[0],
        labels=columns[1],
        position_ids=columns[2],
        cu_seqlens=cu_seqlens,
        sequences=sequences,
        targets=compact_targets(wanted, index, spec, shape, pin_memory=device.type == "cuda"),
        max_seqlen=longest,
        positions=n,
        layout=shape.layout,
    )


def _runs(pieces: Pieces, ends: Ints) -> list[tuple[int, int, int]]:
    """Stretches of rows of one shard: the shard, from, to."""
    last = np.flatnonzero(np.append(np.diff(pieces.shard) != 0, True))
    stops = ends[last].tolist()
    return list(zip(pieces.shard[last].tolist(), [0, *stops[:-1]], stops, strict=True))
