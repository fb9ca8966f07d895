"""The size of shards, from a sample that is encoded like one.

Most arrays grow with the positions. Some bytes of a shard do not (the order of the vocabulary, grids, headers, tables
of a compressor), so the bytes per position of a small sample are too high. They show when two halves of the sample are
encoded separately: what the halves take beyond the whole does not grow. With the codec's contexts, which improve with
size, the result is an upper bound.
"""

import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache import CacheSpec, create_cache, open_cache
from ...cache.scan import listed
from ...cache.stores import MemoryStore
from ...data.packing import pack
from ..rows import ShardRows

_PARTS = 4  # shards that are encoded at most, of a sample larger than a shard
OTHER = "other"  # names, shapes and headers, as in `inspect`
_ONCE = ("head/classes", "draws/classes", "head/grid", "draws/grid", OTHER)  # do not grow with a shard's positions


@dataclass(frozen=True)
class Sizes:
    """Bytes of a shard by array: `fixed`, and `slope` for each position. seconds: of one core to encode a position."""

    fixed: dict[str, float]
    slope: dict[str, float]
    seconds: float

    def of(self, shards: NDArray[np.int64]) -> dict[str, float]:
        """Total bytes, by array, of shards with these numbers of positions, `[shards]`."""
        positions = float(shards.sum())
        return {n: max(self.fixed[n] * len(shards) + slope * positions, 0.0) for n, slope in self.slope.items()}


def measure_sizes(
    spec: CacheSpec, captured: list[ShardRows], shard_positions: float, context: int | None = None
) -> Sizes:
    """Encode rows with their targets, and each half of them.

    captured: rows whose inputs include the targets. shard_positions: of a shard of the capture; more rows are divided
    into parts of that size, of which up to four are used. context: positions of the windows that segments are packed
    into; None: each segment is a window.
    """
    step = max(1, -(-sum(map(len, captured)) // max(int(shard_positions), 1)))
    count = min(step, _PARTS)
    whole, halves = Counter[str](), Counter[str]()
    positions, seconds = 0, 0.0
    for part in range(count):
        chosen = [_every(rows, part, step) for rows in captured]
        positions += sum(map(len, chosen))
        seconds += _add_encoded(whole, spec, chosen, context)
        for half in (0, 1):
            _add_encoded(halves, spec, [_every(rows, half, 2) for rows in chosen], context)
    fixed = {n: (size if n in _ONCE else halves[n] - size) / count for n, size in whole.items()}
    slope = {n: (size - fixed[n] * count) / positions for n, size in whole.items()}
    return Sizes(fixed, slope, seconds / positions)


def _every(rows: ShardRows, first: int, step: int) -> ShardRows:
    """Every `step`-th segment from the first on."""
    return rows.select(np.arange(first, len(rows.document), step))


def _add_encoded(total: Counter[str], spec: CacheSpec, parts: list[ShardRows], context: int | None) -> float:
    """Encode rows as a shard, and add its bytes by array to the total; the seconds that encoding took."""
    lengths = windows = np.concatenate([part.document_lengths for part in parts])
    if not len(lengths):
        return 0.0
    if context is not None:
        window, count = pack(lengths.astype(np.int32), context)
        windows = np.bincount(window, lengths, count).astype(np.uint32)
    arrays: dict[str, Any] = {n: np.concatenate([part.inputs[n] for part in parts]) for n in parts[0].inputs}
    inputs = {name: arrays.pop(name) for name in spec.inputs}
    store = MemoryStore()
    with create_cache(store, replace(spec, shard_positions=max(spec.shard_positions, int(lengths.sum())))) as writer:
        begun = time.perf_counter()
        writer.write_shard(0, inputs, **arrays, sequence_lengths=windows, document_lengths=lengths)
        seconds = time.perf_counter() - begun
    sizes: dict[str, int] = open_cache(store).attributes(0)["bytes"]
    total.update(sizes)
    total[OTHER] += listed(store)[0] - sum(sizes.values())
    return seconds
