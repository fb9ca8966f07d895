"""The sequences of a cache that a loader reads: a split fixed at capture, all of it or a part; and missing shards."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.capture_plan import PLAN_KEY, CapturePlan, read_capture_plan
from ..cache.manifest import gaps, overlaps
from ..cache.reader import Cache
from ..errors import StreamError

Ints = NDArray[np.int64]
SPLITS = ("train", "held_out")


@dataclass(frozen=True, eq=False)
class ShardTable:
    """The sequences to read, one row per shard, `[shards]` each: all sequences of the shard, or consecutive ones.

    shard: its number in the cache. first: the number of its first sequence to read. sequences, positions: to read.
    content: a hash of these columns and of what the shards hold.
    """

    cache: Cache
    shard: Ints
    first: Ints
    sequences: Ints
    positions: Ints
    content: str = ""

    def lengths(self, row: int) -> Ints:
        """The positions of each sequence to read from a shard, `[sequences]`. Reads the end of the shard's object."""
        first = int(self.first[row])
        return self.cache.sequence_lengths(int(self.shard[row]))[first : first + int(self.sequences[row])]

    def describe(self) -> dict[str, Any]:
        """For a loader's fingerprint."""
        return {"spec": self.cache.spec.hash, "sequences": int(self.sequences.sum()), "content": self.content}

    def _rows(self, some: slice) -> "ShardTable":
        columns = {n: getattr(self, n)[some] for n in ("shard", "first", "sequences", "positions")}
        return replace(self, **columns)

    def _cut(self, row: int, begin: int, end: int) -> "ShardTable":
        """The table with sequences `begin` to `end` of those that it has of one shard."""
        first, sequences, positions = self.first.copy(), self.sequences.copy(), self.positions.copy()
        positions[row] = self.lengths(row)[begin:end].sum()
        first[row] += begin
        sequences[row] = end - begin
        return replace(self, first=first, sequences=sequences, positions=positions)

    def skip(self, sequences: int) -> "ShardTable":
        """The table without its first sequences."""
        ends = np.cumsum(self.sequences)
        row = int(np.searchsorted(ends, sequences, side="right"))
        rest = self._rows(slice(row, None))
        if not len(rest.shard) or not (skipped := sequences - int(ends[row] - rest.sequences[0])):
            return rest
        return rest._cut(0, skipped, int(rest.sequences[0]))

    def up_to(self, max_positions: int) -> "ShardTable":
        """The first whole sequences of the table with at most `max_positions` positions together."""
        ends = np.cumsum(self.positions)
        row = int(np.searchsorted(ends, max_positions, side="right"))
        if row == len(ends):
            return self
        room = max_positions - int(ends[row] - self.positions[row])
        count = int(np.searchsorted(np.cumsum(self.lengths(row)), room, side="right"))
        return self._rows(slice(row + 1))._cut(row, 0, count) if count else self._rows(slice(row))


def open_split(
    cache: Cache, split: str, *, skip: int = 0, max_positions: int | None = None, allow_partial: bool = False
) -> ShardTable:
    """The sequences of a split of a cache, in the order of the data.

    skip: leave out the first sequences. max_positions: then take the first whole sequences with at most that many
    positions together. allow_partial: accept a cache with missing shards.

    Raises StreamError if nothing is left, if shards are missing, and for the held-out split of a cache without one;
    CacheError if the cache cannot be read.
    """
    manifest = cache.manifest
    if pairs := overlaps(manifest):
        raise StreamError(
            f"{cache!r}: shards {pairs[0][0]} and {pairs[0][1]} hold some of the same sequences; expected shards of "
            "one capture plan. `fastkd verify` lists them all; delete those of one plan."
        )
    names = ("shard", "first_sequence", "sequences", "positions")
    number, first_sequence, sequences, positions = (manifest.column(n).to_numpy().astype(np.int64) for n in names)
    plan = read_capture_plan(cache.store)
    begin, end = _shards_of(cache, plan, split)
    inside = np.flatnonzero((number >= begin) & (number < end))
    inside = inside[np.argsort(first_sequence[inside], kind="stable")]
    if not allow_partial:
        _check_complete(cache, plan, number[inside], begin, end)
    if not len(inside):
        raise StreamError(f"{cache!r}: got no shard of split {split!r}; expected at least one. Capture it first.")
    content = manifest.column("content_sha256").take(inside).to_pylist()
    shard = number[inside]
    table = ShardTable(cache, shard, np.zeros(len(shard), np.int64), sequences[inside], positions[inside])
    table = table.skip(skip)
    if max_positions is not None:
        table = table.up_to(max_positions)
    if not len(table.shard):
        raise StreamError(
            f"skip, max_positions: got {skip} and {max_positions}, which leave nothing of the "
            f"{int(sequences[inside].sum())} sequences ({int(positions[inside].sum())} positions) of split {split!r} "
            f"in {cache!r}."
        )
    digest = hashlib.sha256()
    for column in (table.shard, table.first, table.sequences, table.positions):
        digest.update(column.astype("<i8").tobytes())
    kept = np.isin(shard, table.shard)
    digest.update(b"".join(c for c, k in zip(content, kept.tolist(), strict=True) if k))
    return replace(table, content=digest.hexdigest())


def _shards_of(cache: Cache, plan: CapturePlan | None, split: str) -> tuple[int, int]:
    """The numbers of the shards of a split: begin, end."""
    if split not in SPLITS:
        raise StreamError(f"split: got {split!r}; expected one of {', '.join(SPLITS)}.")
    if split == "train":
        return 0, 2**62 if plan is None else plan.train_shards
    if plan is None or plan.train_shards >= plan.shards:
        why = f"has no {PLAN_KEY}, so no documents were held out" if plan is None else "was captured with held_out=0"
        raise StreamError(
            f"split: got 'held_out', but {cache!r} {why}. Capture with a fraction of documents held out, or set some "
            "data apart with skip and max_positions."
        )
    return plan.train_shards, plan.shards


def _check_complete(cache: Cache, plan: CapturePlan | None, there: Ints, begin: int, end: int) -> None:
    """StreamError if planned shards are missing; without a plan, if an unsealed cache has gaps between its shards."""
    if plan is not None:
        expected = end - begin
        missing = np.setdiff1d(np.arange(begin, end), there)
    elif cache.sealed:
        return
    else:
        missing = np.concatenate([np.zeros(0, np.int64), *(np.arange(a, b + 1) for a, b in gaps(there))])
        expected = len(there) + len(missing)
    if len(missing):
        raise StreamError(
            f"{cache!r}: {len(missing)} of the {expected} shards of this split are missing "
            f"({len(missing) / expected:.1%}; the first is {missing[0]}). Run the capture again, which writes only "
            "what is missing, or read the shards that exist with allow_partial=True."
        )
