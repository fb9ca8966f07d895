"""From open shards of examples to micro-batches: their inputs are read from the data set and augmented anew."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.spec import CacheSpec
from ..data.examples import Examples
from .batch import ExampleBatch
from .compact import BatchShape, compact_targets
from .micro_batches import packed_micro_batches
from .shards import IGNORED, ExampleInputs, OpenShard, ranges

Ints = NDArray[np.int64]


def gather_examples(
    sequences: Sequence[tuple[OpenShard[ExampleInputs], Ints]],
    spec: CacheSpec,
    shape: BatchShape,
    device: torch.device,
    data: Examples,
) -> list[ExampleBatch]:
    """The micro-batches of these sequences, by shard. A sequence, an example's copies, is never divided.

    data: labelled. They are on the host, page-locked if the device is a GPU.
    """
    lengths = np.concatenate([np.diff(shard.inputs.first_row)[some] for shard, some in sequences])
    shard_of = np.repeat(np.arange(len(sequences)), [len(some) for _, some in sequences])
    first_row = np.concatenate([shard.inputs.first_row[some] for shard, some in sequences])
    shards = [shard for shard, _ in sequences]
    found = []
    for places in packed_micro_batches(lengths, shape.tokens, shape.rows):
        bounds = np.searchsorted(shard_of[places], np.arange(len(shards) + 1))
        wanted = [
            (shard, ranges(first_row[places[a:b]], lengths[places[a:b]]))
            for shard, (a, b) in zip(shards, pairwise(bounds.tolist()), strict=True)
            if b > a
        ]
        found.append(_micro_batch(wanted, np.repeat(places, lengths[places]), spec, shape, device, data))
    return found


def _micro_batch(
    wanted: list[tuple[OpenShard[ExampleInputs], Ints]],
    sequences: Ints,
    spec: CacheSpec,
    shape: BatchShape,
    device: torch.device,
    data: Examples,
) -> ExampleBatch:
    """wanted: rows by shard. sequences `[rows]`: what each is of."""
    on_gpu = device.type == "cuda"
    allocate = partial(torch.empty, pin_memory=on_gpu)
    example, seed, counts = (
        np.concatenate([getattr(shard.inputs, name)[rows] for shard, rows in wanted])
        for name in ("example", "seed", "counts")
    )
    inputs = data.read(example, seed)
    n = len(example)
    labels, of, index = (allocate(size, dtype=kind) for size, kind in (
        (n, torch.int64), (n, torch.int32), (int(counts.sum()), torch.int64)))  # fmt: skip
    labels.numpy()[:] = np.where(counts, data.labels(example), IGNORED)
    of.numpy()[:] = sequences
    index.numpy()[:] = np.flatnonzero(counts)
    kept = [(shard, rows[shard.inputs.counts[rows]]) for shard, rows in wanted]
    return ExampleBatch(
        inputs=inputs.pin_memory() if on_gpu else inputs,
        labels=labels,
        sequences=of,
        targets=compact_targets(kept, index, spec, shape, pin_memory=on_gpu),
        positions=n,
    )
