"""Targets of chosen rows of open shards, in memory of their own: what a micro-batch holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.spec import CacheSpec
from ..kernels import SparseTargets
from .shards import OpenShard

Ints = NDArray[np.int64]
Allocate = Callable[..., Tensor]
UNUSED = {"logprobs": -np.inf}  # what stands in places without an entry; else 0


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
    wanted: Sequence[tuple[OpenShard[Any], Ints]], index: Tensor, spec: CacheSpec, shape: BatchShape, allocate: Allocate
) -> SparseTargets:
    """The targets of these rows of these shards, on the host, in memory of their own.

    index `[rows]`: the position of each in its micro-batch. allocate: makes a tensor on the host, as `torch.empty`.
    """
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


def _targets(tensors: dict[str, Tensor], index: Tensor, spec: CacheSpec) -> SparseTargets:
    return SparseTargets(
        **tensors,
        vocab_size=spec.vocab_size,
        temperatures=spec.temperatures,
        draw_temperature=spec.draw_temperature,
        index=index,
    )


def no_targets(spec: CacheSpec, shape: BatchShape, device: torch.device) -> SparseTargets:
    """Targets of no position."""
    return compact_targets([], torch.zeros(0, dtype=torch.int64), spec, shape, torch.empty).to(device)
