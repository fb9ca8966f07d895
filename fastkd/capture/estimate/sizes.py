"""How large shards will be, from a slice of one that is encoded as they will be.

Most arrays grow with the positions. Some of a shard's bytes do not: the order of the vocabulary, grids, headers, the
tables of a compressor; a small slice pays as much for them as a whole shard does, so that its bytes a position say too
much. Others cost less than they will: the ids that a slice holds are fewer, and so are their bits. Both show when two
halves of the slice are encoded apart: what they take more than the whole, or less, is what a slice takes beside its
positions. (Synthetic targets, V = 49,152, k = 64, a shard of 65,536 positions from 1,024 of them: 0.3% too much, where
their own bytes a position are 15% too much. Below 2^14 positions the compressor mixes what it keeps apart in a larger
shard: that leaves up to 2% where heads are small.) Lists by context go on improving; with them it is an upper bound.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache import CacheSpec, Workspace, create_cache, open_cache
from ...cache.scan import listed
from ...cache.stores import MemoryStore
from ...data.packing import pack
from ..rows import ShardRows
from .measure import Said

Array = NDArray[Any]

TABLES = ("head/classes", "draws/classes", "head/grid", "draws/grid")  # once a shard
OTHER = "other"  # names, shapes and headers: as inspect says it
TARGETS = ("head/", "draws/", "tail", "outcomes")
_PARTS = 4  # of a slice that is larger than a shard: so many are encoded


@dataclass(frozen=True)
class Sizes:
    """Bytes of a shard by array: `fixed`, and `slope` for each position; of tables `table` at `positions` positions,
    and `growth` each time these double. seconds: of encoding, for each position, on one core; decode: of decoding."""

    positions: float
    fixed: dict[str, float]
    slope: dict[str, float]
    table: dict[str, float]
    growth: dict[str, float]
    seconds: float
    decode: float

    def of(self, shards: NDArray[np.int64]) -> dict[str, float]:
        """Bytes of shards of so many positions, `[shards]`, in all, by array."""
        found = {n: self.fixed[n] * len(shards) + slope * float(shards.sum()) for n, slope in self.slope.items()}
        doublings = np.log2(np.maximum(shards, 1) / self.positions)
        for name, size in self.table.items():
            found[name] = float(np.maximum(size + self.growth[name] * doublings, 0).sum())
        return {name: max(size, 0.0) for name, size in found.items()}

    @property
    def once_a_shard(self) -> float:
        """Bytes of tables and headers."""
        return sum(self.table.values()) + self.fixed.get(OTHER, 0.0)


def measure_sizes(spec: CacheSpec, said: Said, shard_positions: float, context: int | None = None) -> Sizes:
    """Encode what was said, and its halves.

    shard_positions: of the shards to come; a slice that is larger is taken in parts of that size. context: of windows
    that pieces are packed into; None: each is one.
    """
    n, pieces = len(said.some), np.arange(len(said.some.document_lengths))
    step = max(1, min(-(-n // max(int(shard_positions), 1)), len(pieces)))
    whole: dict[str, float] = {}
    halves: dict[str, float] = {}
    positions, seconds, decode, parts = 0, 0.0, 0.0, range(min(step, _PARTS))
    for part in parts:
        places = pieces[part::step]
        taken, spent, read = _encoded(spec, said.part(places), context)
        _add(whole, taken)
        positions += int(said.some.document_lengths[places].sum(dtype=np.int64))
        seconds += spent
        decode += read
        split = [places[::2], places[1::2]] if len(places) > 1 else [places, places]
        for half in split:
            _add(halves, _encoded(spec, said.part(half), context)[0], 1 if len(places) > 1 else 0.5)
    count = len(parts)
    each = positions / count
    sizes = Sizes(each, {}, {}, {}, {}, seconds / positions, decode / positions)
    for name in whole.keys() | halves.keys():
        size, two = whole.get(name, 0.0) / count, halves.get(name, 0.0) / count
        if name in TABLES:
            sizes.table[name], sizes.growth[name] = size, max(size - two / 2, 0.0)
        elif name == OTHER:
            sizes.fixed[name], sizes.slope[name] = size, 0.0
        else:
            sizes.fixed[name] = two - size
            sizes.slope[name] = (size - sizes.fixed[name]) / each
    return sizes


def joined_said(said: list[Said]) -> Said:
    """One after the other."""
    some = [part.some for part in said]

    def column(name: str) -> Array:
        return np.concatenate([getattr(part, name) for part in some])

    return Said(
        ShardRows(
            inputs={name: np.concatenate([part.inputs[name] for part in some]) for name in some[0].inputs},
            counts=column("counts"),
            sequence_lengths=column("sequence_lengths"),
            document_lengths=column("document_lengths"),
            document=column("document"),
            start=column("start"),
            first_sequence=0,
        ),
        {name: np.concatenate([part.arrays[name] for part in said]) for name in said[0].arrays},
    )


def _encoded(spec: CacheSpec, said: Said, context: int | None) -> tuple[dict[str, float], float, float]:
    """Bytes by array of a shard with these rows, the seconds that it took, and those of reading it again."""
    lengths = said.some.document_lengths
    windows = lengths
    if context is not None:
        which, count = pack(lengths.astype(np.int32), context)
        windows = np.bincount(which, lengths, count).astype(np.uint32)
    store = MemoryStore()
    with create_cache(store, replace(spec, shard_positions=max(spec.shard_positions, len(said.some)))) as writer:
        begun = time.perf_counter()
        arrays: dict[str, Any] = said.arrays
        writer.write_shard(0, said.some.inputs, **arrays, sequence_lengths=windows, document_lengths=lengths)
        seconds = time.perf_counter() - begun
    cache = open_cache(store)
    taken: dict[str, float] = dict(cache.attributes(0)["bytes"])
    taken[OTHER] = listed(store)[0] - sum(taken.values())
    room = Workspace()
    cache.read_shard(0, into=room)  # what is done but once is done here
    begun = time.perf_counter()
    cache.read_shard(0, into=room)
    return taken, seconds, time.perf_counter() - begun


def _add(total: dict[str, float], more: dict[str, float], weight: float = 1) -> None:
    for name, size in more.items():
        total[name] = total.get(name, 0.0) + weight * size
