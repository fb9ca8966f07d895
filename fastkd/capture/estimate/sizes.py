"""The size of shards, from a sample that is encoded like one.

Most arrays grow with the positions. Some bytes of a shard do not (the order of the vocabulary, grids, headers, tables
of a compressor), so the bytes per position of a small sample are too high. They show when two halves of the sample are
encoded separately: what the halves take beyond the whole does not grow. With the codec's contexts, which improve with
size, the result is an upper bound.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache import CacheSpec, create_cache, open_cache
from ...cache.scan import listed
from ...cache.stores import MemoryStore
from ...data.packing import pack
from .measure import CapturedRows

OTHER = "other"  # names, shapes and headers, as in `inspect`
_ONCE = ("head/classes", "draws/classes", "head/grid", "draws/grid", OTHER)  # do not grow with a shard's positions
_PARTS = 4  # shards that are encoded at most, of a sample larger than a shard


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


def measure_sizes(spec: CacheSpec, captured: CapturedRows, shard_positions: float, context: int | None = None) -> Sizes:
    """Encode the sample, and each half of it.

    shard_positions: of a shard of the capture; a larger sample is divided into parts of that size. context: positions
    of the windows that segments are packed into; None: each segment is a window.
    """
    segments = np.arange(len(captured.lengths))
    step = max(1, min(-(-int(captured.lengths.sum()) // max(int(shard_positions), 1)), len(segments)))
    count = min(step, _PARTS)
    whole: dict[str, float] = {}
    halves: dict[str, float] = {}
    positions, seconds = 0, 0.0
    for part in range(count):
        chosen = segments[part::step]
        spent = _add_encoded(whole, spec, captured.select(chosen), context)
        positions += int(captured.lengths[chosen].sum(dtype=np.int64))
        seconds += spent
        for half in (chosen[::2], chosen[1::2]) if len(chosen) > 1 else (chosen,):
            _add_encoded(halves, spec, captured.select(half), context)
    sizes = Sizes({}, {}, seconds / positions)
    for name in whole.keys() | halves.keys():
        size, two = whole.get(name, 0.0), halves.get(name, 0.0)
        sizes.fixed[name] = (size if name in _ONCE else two - size) / count
        sizes.slope[name] = (size - sizes.fixed[name] * count) / positions
    return sizes


def _add_encoded(total: dict[str, float], spec: CacheSpec, captured: CapturedRows, context: int | None) -> float:
    """Encode rows as a shard, and add its bytes by array to the total; the seconds that encoding took."""
    lengths = windows = captured.lengths
    if context is not None:
        window, count = pack(lengths.astype(np.int32), context)
        windows = np.bincount(window, lengths, count).astype(np.uint32)
    store = MemoryStore()
    with create_cache(store, replace(spec, shard_positions=max(spec.shard_positions, int(lengths.sum())))) as writer:
        arrays: dict[str, Any] = dict(captured.columns)
        inputs = {name: arrays.pop(name) for name in spec.inputs}
        begun = time.perf_counter()
        writer.write_shard(0, inputs, **arrays, sequence_lengths=windows, document_lengths=lengths)
        seconds = time.perf_counter() - begun
    sizes: dict[str, float] = dict(open_cache(store).attributes(0)["bytes"])
    sizes[OTHER] = listed(store)[0] - sum(sizes.values())
    for name, size in sizes.items():
        total[name] = total.get(name, 0.0) + size
    return seconds
