"""Targets of chosen rows of open shards, in memory of their own: what a micro-batch holds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.spec import CacheSpec
from ..kernels import SparseTargets
from ..kernels.targets import FIELDS
from .shards import OpenShard

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class BatchShape:
    """What micro-batches are like. layout: see `MicroBatch`. tokens: positions at most, pads included; a row that is
    longer is alone. rows: rows at most (of "packed": windows). None: no limit.

    width, draws: places of a row of the targets, and whether there are draws: those of all caches.
    """

    layout: str
    tokens: int | None
    rows: int | None
    width: int
    draws: bool


def compact_targets(
    wanted: Sequence[tuple[OpenShard[Any], Ints]],
    index: Tensor,
    spec: CacheSpec,
    shape: BatchShape,
    *,
    pin_memory: bool,
) -> SparseTargets:
    """The targets of these rows of these shards, on the host, in memory of their own.

    index `[rows]`: the position of each in its micro-batch.
    """
    found = _unfilled(len(index), spec, shape, pin_memory)
    done = 0
    for shard, rows in wanted:
        for field in FIELDS:
            if (tensor := getattr(found, field.name)) is None:
                continue
            target, source = tensor.numpy()[done : done + len(rows)], shard.rows.get(field.name)
            if source is not None and source.shape[1:] == target.shape[1:]:
                # mode: with "raise" the result is made apart, and copied
                np.take(source, rows, axis=0, out=target, mode="clip")
                continue
            # of a cache of narrower rows, or without draws
            target.fill(field.fill)
            if source is not None:
                target[:, : source.shape[1]] = source[rows]
        done += len(rows)
    return replace(found, index=index)


def no_targets(spec: CacheSpec, shape: BatchShape, device: torch.device) -> SparseTargets:
    """Targets of no position."""
    index = torch.zeros(0, dtype=torch.int64)
    return replace(_unfilled(0, spec, shape, pin_memory=False), index=index).to(device)


def _unfilled(rows: int, spec: CacheSpec, shape: BatchShape, pin_memory: bool) -> SparseTargets:
    return SparseTargets.empty(
        rows,
        shape.width,
        vocab_size=spec.vocab_size,
        temperatures=spec.temperatures,
        draws=shape.draws,
        draw_temperature=spec.draw_temperature,
        device="cpu",
        pin_memory=pin_memory,
        fill=False,
    )
