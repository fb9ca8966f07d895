"""Which sequences of a cache a loader reads: the split fixed at capture, all of it or some, and what is missing."""

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
class Table:
    """The sequences that are read, by shard, `[shards]` each: all of a shard, or some that follow one another.

    shard: its number in the cache. first: the place in it of the first sequence. sequences, positions: how many.
    content: a hash of all of it, and of what the shards hold.
    """

    cache: Cache
    shard: Ints
    first: Ints
    sequences: Ints
    positions: Ints
    content: str

    def lengths(self, place: int) -> Ints:
        """Positions of each sequence of a shard that is read, `[sequences]`; from the end of its object."""
        first = int(self.first[place])
        return self.cache.sequence_lengths(int(self.shard[place]))[first : first + int(self.sequences[place])]


def open_split(
    cache: Cache, split: str, *, skip: int = 0, max_positions: int | None = None, allow_partial: bool = False
) -> Table:
    """The sequences of a split of a cache, in the order of the data.

    skip: sequences left out at the start. max_positions: of the rest, the first whole sequences up to so many
    positions. allow_partial: read a cache of which shards are missing.

    Raises StreamError where nothing is left, where shards are missing, and for a held-out split of a cache that has
    none; CacheError where the cache cannot be read.
    """
    manifest = cache.manifest
    if pairs := overlaps(manifest):
        raise StreamError(
            f"{cache!r}: shards {pairs[0][0]} and {pairs[0][1]} hold some of the same sequences: they are of two "
            "plans. `fastkd verify` names them all; delete those of one plan."
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
        raise StreamError(f"{cache!r}: found no shard of split {split!r}. Capture it first.")
    content = manifest.column("content_sha256").take(inside).to_pylist()
    shard, sequences, positions = number[inside], sequences[inside], positions[inside]
    table = Table(cache, shard, np.zeros(len(shard), np.int64), sequences, positions, "")
    table = _skipped(table, skip)
    if max_positions is not None:
        table = _up_to(table, max_positions)
    if not len(table.shard):
        raise StreamError(
            f"skip, max_positions: got {skip} and {max_positions}, which leave nothing of the {int(sequences.sum())} "
            f"sequences ({int(positions.sum())} positions) of split {split!r} in {cache!r}."
        )
    digest = hashlib.sha256()
    for column in (table.shard, table.first, table.sequences, table.positions):
        digest.update(column.astype("<i8").tobytes())
    kept = np.isin(shard, table.shard)
    digest.update(b"".join(c for c, k in zip(content, kept.tolist(), strict=True) if k))
    return replace(table, content=digest.hexdigest())


def _shards_of(cache: Cache, plan: CapturePlan | None, split: str) -> tuple[int, int]:
    """The numbers of the shards of a split: from, to below."""
    if split not in SPLITS:
        raise StreamError(f"split: got {split!r}; expected one of {', '.join(SPLITS)}.")
    if plan is None:
        if split == "held_out":
            raise StreamError(
                f"split: found 'held_out', and {cache!r} has no {PLAN_KEY}: no documents were held out when it was "
                "made. Keep some of it apart with skip and max_positions."
            )
        return 0, 2**62
    if split == "train":
        return 0, plan.train_shards
    if plan.train_shards >= plan.shards:
        raise StreamError(
            f"split: found 'held_out', and {cache!r} was captured without (held_out=0). Capture with a fraction of "
            "documents held out, or keep some of it apart with skip and max_positions."
        )
    return plan.train_shards, plan.shards


def _check_complete(cache: Cache, plan: CapturePlan | None, there: Ints, begin: int, end: int) -> None:
    """StreamError where shards are missing that were planned; without a plan, between those of an unsealed cache."""
    if plan is not None:
        expected = end - begin
        missing = np.setdiff1d(np.arange(begin, end), there)
    else:
        if cache.sealed:
            return
        ranges = gaps(there)
        missing = np.concatenate([np.zeros(0, np.int64), *(np.arange(a, b + 1) for a, b in ranges)])
        expected = len(there) + len(missing)
    if len(missing):
        raise StreamError(
            f"{cache!r}: {len(missing)} of the {expected} shards of this split are missing "
            f"({len(missing) / expected:.1%}; the first is {missing[0]}). Run the capture again, which writes only "
            "what is missing, or read what is there with allow_partial=True."
        )


def _skipped(table: Table, skip: int) -> Table:
    """The table without its first sequences."""
    if not skip:
        return table
    ends = np.cumsum(table.sequences)
    place = int(np.searchsorted(ends, skip, side="right"))
    table = _rows(table, slice(place, None))
    if not len(table.shard):
        return table
    left_out = skip - int(ends[place] - table.sequences[0])
    return _with(table, 0, left_out, int(table.sequences[0])) if left_out else table


def _up_to(table: Table, max_positions: int) -> Table:
    """The first whole sequences of the table that have up to so many positions."""
    ends = np.cumsum(table.positions)
    place = int(np.searchsorted(ends, max_positions, side="right"))
    if place == len(ends):
        return table
    room = max_positions - int(ends[place] - table.positions[place])
    count = int(np.searchsorted(np.cumsum(table.lengths(place)), room, side="right"))
    if not count:
        return _rows(table, slice(place))
    return _with(_rows(table, slice(place + 1)), place, 0, count)


def _rows(table: Table, some: slice) -> Table:
    shard, first, sequences, positions = (
        table.shard[some],
        table.first[some],
        table.sequences[some],
        table.positions[some],
    )
    return replace(table, shard=shard, first=first, sequences=sequences, positions=positions)


def _with(table: Table, place: int, begin: int, end: int) -> Table:
    """The table with sequences begin to end of what it had of one shard."""
    positions = int(table.lengths(place)[begin:end].sum())
    first, sequences, of = table.first.copy(), table.sequences.copy(), table.positions.copy()
    first[place] += begin
    sequences[place], of[place] = end - begin, positions
    return replace(table, first=first, sequences=sequences, positions=of)


def describe(table: Table) -> dict[str, Any]:
    """What a loader's fingerprint says of it."""
    return {"spec": table.cache.spec.hash, "sequences": int(table.sequences.sum()), "content": table.content}
