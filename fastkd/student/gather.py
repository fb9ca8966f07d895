"""From open shards to micro-batches: a rank's sequences of a step, cut up, and their rows taken together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.spec import CacheSpec
from ..kernels import SparseTargets
from .batch import MicroBatch
from .shards import ENTRIES, IGNORED, OpenShard, ranges
from .steps import packed_micro_batches, padded_micro_batches

Ints = NDArray[np.int64]
Allocate = Callable[..., Tensor]
WIDE = ("ids", "logprobs", "draws")
UNUSED = {"logprobs": -np.inf}  # what stands in places without an entry; else 0


@dataclass(frozen=True)
class Shape:
    """What micro-batches are like. layout: see `MicroBatch`. tokens: positions at most, pads included; a row that is
    longer is alone. rows: rows at most (of "packed": windows). None: no limit.

    width, draws: places of a row of the targets, and whether there are draws: those of all caches.
    """

    layout: str
    tokens: int | None
    rows: int | None
    width: int
    draws: bool


class Pieces(NamedTuple):
    """Pieces, `[p]` each: which of the open shards and of the sequences they are of, their first rows in the shard, and
    their lengths. Those of one shard lie together."""

    shard: Ints
    sequence: Ints
    begin: Ints
    length: Ints


def gather(
    sequences: Sequence[tuple[OpenShard, Ints]], spec: CacheSpec, shape: Shape, device: torch.device
) -> list[MicroBatch]:
    """The micro-batches of these sequences, by shard. They are on the host, page-locked if the device is a GPU; but
    targets that were decoded on the device are there."""
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


def _cut(lengths: Ints, pieces_of_window: Ints, shape: Shape) -> list[Ints]:
    """The places of the pieces of each micro-batch."""
    if shape.layout == "padded":
        return padded_micro_batches(lengths, shape.tokens, shape.rows)
    begins = np.cumsum(pieces_of_window) - pieces_of_window
    whole = np.add.reduceat(lengths, begins)
    return [
        ranges(begins[some], pieces_of_window[some]) for some in packed_micro_batches(whole, shape.tokens, shape.rows)
    ]


def _micro_batch(
    shards: list[OpenShard], pieces: Pieces, spec: CacheSpec, shape: Shape, device: torch.device
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
    take = _on_device if shards[0].targets is not None else _on_host
    return MicroBatch(
        input_ids=columns[0],
        labels=columns[1],
        position_ids=columns[2],
        cu_seqlens=cu_seqlens,
        sequences=sequences,
        targets=take(wanted, index, spec, shape, allocate),
        max_seqlen=longest,
        positions=n,
        layout=shape.layout,
    )


def _runs(pieces: Pieces, ends: Ints) -> list[tuple[int, int, int]]:
    """Stretches of rows of one shard: the shard, from, to."""
    last = np.flatnonzero(np.append(np.diff(pieces.shard) != 0, True))
    stops = ends[last].tolist()
    return list(zip(pieces.shard[last].tolist(), [0, *stops[:-1]], stops, strict=True))


def _on_host(
    wanted: list[tuple[OpenShard, Ints]], index: Tensor, spec: CacheSpec, shape: Shape, allocate: Allocate
) -> SparseTargets:
    """The targets of these rows of these shards, in memory of their own."""
    n = len(index)
    out = {
        "ids": allocate((n, shape.width), dtype=torch.int32),
        "logprobs": allocate((n, shape.width), dtype=torch.float32),
        "tail": allocate((n, len(spec.temperatures)), dtype=torch.float32),
        "outcomes": allocate(n, dtype=torch.int32),
    }
    if shape.draws:
        out["draws"] = allocate((n, shape.width), dtype=torch.int32)
    done = 0
    for shard, rows in wanted:
        for name, tensor in out.items():
            target, source = tensor.numpy()[done : done + len(rows)], shard.rows.get(name)
            if source is not None and source.shape[1:] == target.shape[1:]:
                # mode: with "raise" the result is made apart, and copied
                np.take(source, rows, axis=0, out=target, mode="clip")
                continue
            # of a cache of narrower rows, or without draws
            target.fill(UNUSED.get(name, 0))
            if source is not None:
                target[:, : source.shape[1]] = source[rows]
        done += len(rows)
    return _targets(out, index, spec)


def _on_device(
    wanted: list[tuple[OpenShard, Ints]], index: Tensor, spec: CacheSpec, shape: Shape, allocate: Allocate
) -> SparseTargets:
    """The targets of these rows of shards that were decoded on a device, there."""
    found: dict[str, list[Tensor]] = {}
    for shard, rows in wanted:
        assert shard.targets is not None
        at = allocate(len(rows), dtype=torch.int64)
        at.numpy()[:] = rows
        at = at.to(shard.targets.device, non_blocking=True)
        for name in ENTRIES:
            if name == "draws" and not shape.draws:
                continue
            tensor = getattr(shard.targets, name)
            some = shard.targets.ids.new_zeros(len(rows), 0) if tensor is None else tensor.index_select(0, at)
            if name in WIDE and some.shape[1] < shape.width:
                some = torch.nn.functional.pad(some, (0, shape.width - some.shape[1]), value=UNUSED.get(name, 0))
            found.setdefault(name, []).append(some)
    whole = {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}
    return _targets(whole, index.to(whole["ids"].device, non_blocking=True), spec)


def _targets(tensors: dict[str, Tensor], index: Tensor, spec: CacheSpec) -> SparseTargets:
    return SparseTargets(
        **tensors,
        vocab_size=spec.vocab_size,
        temperatures=spec.temperatures,
        draw_temperature=spec.draw_temperature,
        index=index,
    )


def no_targets(spec: CacheSpec, shape: Shape, device: torch.device) -> SparseTargets:
    """Targets of no position."""
    return _on_host([], torch.zeros(0, dtype=torch.int64), spec, shape, torch.empty).to(device)
