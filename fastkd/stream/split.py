"""The sequences that a loader reads: one cache or a mixture, with the data set of examples, and a split of each."""

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..cache.capture_plan import PLAN_KEY, RESTORE_PLAN, CapturePlan, read_capture_plan
from ..cache.errors import CacheError, NotFound, type_name
from ..cache.manifest import gaps, overlaps
from ..cache.reader import Cache, open_cache
from ..cache.spec import CacheSpec
from ..data.examples import EXAMPLE_COLUMNS, Examples
from ..data.lengths import LENGTHS_KEY, lengths_from_npz
from ..data.packing import DIVIDED_BY, divide
from ..errors import DataError, StreamError
from ..utils.words import words_of
from .mixture import SMALLEST_SHARE

Ints = NDArray[np.int64]
SPLITS = ("train", "held_out")


class ShardOrigin(Protocol):
    """What shards come from: a `Cache`, or the plan of a capture whose shards are not written. Its `repr` names it."""

    @property
    def spec(self) -> CacheSpec: ...

    def sequence_lengths(self, index: int) -> Any:
        """Positions of each sequence of a shard, `[sequences]`."""


@dataclass(frozen=True, eq=False)
class ShardTable:
    """The sequences to read, one row per shard, `[shards]` each: all sequences of the shard, or consecutive ones.

    origin: what the shards come from. shard: the number there. first: the number of its first sequence to read.
    sequences, positions: to read. content: a hash of these columns and of what the shards hold.
    """

    origin: ShardOrigin
    shard: Ints
    first: Ints
    sequences: Ints
    positions: Ints
    content: str = ""

    def lengths(self, row: int) -> Ints:
        """The positions of each sequence to read from a shard, `[sequences]`. Reads the end of the shard's object."""
        first = int(self.first[row])
        lengths: Ints = self.origin.sequence_lengths(int(self.shard[row]))[first : first + int(self.sequences[row])]
        return lengths

    @property
    def cache(self) -> Cache:
        """The cache that the shards come from. StreamError if they come from none."""
        if not isinstance(self.origin, Cache):
            raise StreamError(f"{self.origin!r}: got no cache; expected one here.")
        return self.origin

    def describe(self) -> dict[str, Any]:
        """For a loader's fingerprint."""
        return {"spec": self.origin.spec.hash, "sequences": int(self.sequences.sum()), "content": self.content}

    def part(self, skip: int, max_positions: int | None) -> "ShardTable":
        """Without the first `skip` sequences; of the rest, the first whole ones with at most `max_positions`."""
        first, sequences, positions = self.first.copy(), self.sequences.copy(), self.positions.copy()
        skipped = np.clip(skip - (np.cumsum(sequences) - sequences), 0, sequences)
        for row in np.flatnonzero(skipped).tolist():
            positions[row] = self.lengths(row)[skipped[row] :].sum() if skipped[row] < sequences[row] else 0
        first, sequences = first + skipped, sequences - skipped
        ends = np.cumsum(positions)
        if max_positions is not None and max_positions < ends[-1]:
            last = int(np.searchsorted(ends, max_positions, side="right"))
            room = np.cumsum(self.lengths(last)[skipped[last] :])
            count = int(np.searchsorted(room, max_positions - (ends[last] - positions[last]), side="right"))
            sequences[last], positions[last] = count, room[count - 1] if count else 0
            sequences[last + 1 :] = 0
        kept = sequences > 0
        return ShardTable(self.origin, *(column[kept] for column in (self.shard, first, sequences, positions)))


def nothing_left(table: ShardTable, split: str, skip: int, max_positions: int | None, limit: str) -> StreamError:
    """The error for a part of a split, `table`, in which there is nothing. limit: what the caller calls
    `max_positions`."""
    given = {name: value for name, value in (("skip", skip or None), (limit, max_positions)) if value is not None}
    of = f"the {int(table.sequences.sum())} sequences ({int(table.positions.sum())} positions) of split {split!r}"
    where = f" in {table.origin!r}" if isinstance(table.origin, Cache) else ""
    expected = "less" if list(given) == ["skip"] else "more" if list(given) == [limit] else "at least one sequence"
    leave = "leaves" if len(given) == 1 else "leave"
    names, values = ", ".join(given), " and ".join(map(str, given.values()))
    return StreamError(f"{names}: got {values}, which {leave} nothing of {of}{where}; expected {expected}.")


def open_split(
    cache: Cache,
    split: str,
    *,
    skip: int = 0,
    max_positions: int | None = None,
    allow_partial: bool = False,
    limit: str = "max_positions",
) -> ShardTable:
    """The sequences of a split of a cache, in the order of the data.

    skip: leave out the first sequences. max_positions: then take the first whole sequences with at most that many
    positions together. allow_partial: accept a cache with missing shards. limit: what the caller calls max_positions,
    for errors.

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
    plan = plan_of(cache)
    begin, end = _shards_of(cache, plan, split)
    inside = np.flatnonzero((number >= begin) & (number < end))
    inside = inside[np.argsort(first_sequence[inside], kind="stable")]
    if not allow_partial:
        _check_complete(cache, plan, number[inside], begin, end)
    if not len(inside):
        raise StreamError(f"{cache!r}: got no shard of split {split!r}; expected at least one. Capture it first.")
    content = manifest.column("content_sha256").take(inside).to_pylist()
    shard = number[inside]
    whole = ShardTable(cache, shard, np.zeros(len(shard), np.int64), sequences[inside], positions[inside])
    table = whole.part(skip, max_positions)
    if not len(table.shard):
        raise nothing_left(whole, split, skip, max_positions, limit)
    digest = hashlib.sha256()
    for column in (table.shard, table.first, table.sequences, table.positions):
        digest.update(column.astype("<i8").tobytes())
    kept = np.isin(shard, table.shard)
    digest.update(b"".join(c for c, k in zip(content, kept.tolist(), strict=True) if k))
    return replace(table, content=digest.hexdigest())


def plan_of(cache: Cache) -> CapturePlan | None:
    """The plan that a cache was captured by; None for a cache without a plan.

    Raises CacheError if the plan is missing, damaged or another one's: which documents are held out is then unknown.
    The plan of an older version has no hash of itself: it is computed again from the lengths of the documents; without
    them, a warning says that it is not checked.
    """
    plan = read_capture_plan(cache.store, cache.spec)
    if plan is None or plan.hashed:
        return plan
    try:
        documents = plan.totals.get("documents", 0)
        lengths = lengths_from_npz(cache.store.get(LENGTHS_KEY), plan.dataset, LENGTHS_KEY, documents)
        if lengths is None:
            raise DataError(f"{LENGTHS_KEY} belongs to other data")
    except (NotFound, DataError) as error:
        warnings.warn(
            f"{cache!r}: {PLAN_KEY} is of an older version, without a hash of itself, and cannot be checked ({error}): "
            f"shards from {plan.train_shards} on are taken as held out.",
            stacklevel=2,
        )
        return plan
    try:
        with np.errstate(all="raise"):
            found = divide(lengths, **{name: plan.settings[name] for name in DIVIDED_BY})
        expected = found.train_shards, len(found.shards) - 1
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise CacheError(
            f"{cache!r}: {PLAN_KEY}: damaged: its settings are none ({error!r}). {RESTORE_PLAN}"
        ) from error
    if (plan.train_shards, plan.shards) != expected:
        raise CacheError(
            f"{cache!r}: {PLAN_KEY}: damaged: got {plan.train_shards} training shards of {plan.shards}; expected "
            f"{expected[0]} of {expected[1]}, by {LENGTHS_KEY}. {RESTORE_PLAN}"
        )
    return plan


def has_held_out(cache: Cache) -> bool:
    """Whether documents were held out when the cache was captured. Raises what `plan_of` does."""
    plan = plan_of(cache)
    return plan is not None and plan.train_shards < plan.shards


def _shards_of(cache: Cache, plan: CapturePlan | None, split: str) -> tuple[int, int]:
    """The numbers of the shards of a split: begin, end."""
    if split not in SPLITS:
        raise StreamError(f"split: got {split!r}; expected one of {', '.join(SPLITS)}.")
    if split == "train":
        return 0, 2**62 if plan is None else plan.train_shards
    if plan is None or plan.train_shards >= plan.shards:
        documents = words_of(cache.spec.inputs).documents
        why = f"has no {PLAN_KEY}, so no {documents} were held out" if plan is None else "was captured with held_out=0"
        raise StreamError(
            f"split: got 'held_out', but {cache!r} {why}. Capture with a fraction of the {documents} held out, or set "
            "some data apart with skip and max_positions."
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
            f"{cache!r}: {len(missing)} of the {expected} shards of this split "
            f"{'is' if len(missing) == 1 else 'are'} missing ({len(missing) / expected:.1%}; the first is "
            f"{missing[0]}). Run the capture again, which writes only what is missing, or read the shards that exist "
            "with allow_partial=True."
        )


def open_sources(cache: Any) -> tuple[list[Cache], list[Fraction]]:
    """The caches and their weights, of one cache or of a mixture: [(cache, weight), ...], or [cache, ...] for weights
    by which an epoch has each of their sequences once."""
    if not isinstance(cache, (list, tuple)):
        cache = [(cache, 1)]
    if cache and not any(isinstance(entry, (list, tuple)) for entry in cache):
        opened = [one if isinstance(one, Cache) else open_cache(one) for one in cache]
        cache = [(one, max(1, train_positions(one)) if len(opened) > 1 else 1) for one in opened]
    caches, weights = [], []
    for entry in cache:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise StreamError(
                f"cache: got {entry!r} in a mixture with weights; expected pairs of a cache and its weight."
            )
        weight = entry[1]
        if isinstance(weight, (bool, str)) or not hasattr(weight, "__float__") or not 0 < float(weight) < math.inf:
            raise StreamError(f"cache: got the weight {weight!r} for {entry[0]!r}; expected a positive number.")
        weights.append(Fraction(float(weight)))
        caches.append(entry[0] if isinstance(entry[0], Cache) else open_cache(entry[0]))
    if not caches:
        raise StreamError("cache: got an empty mixture; expected a cache, or pairs of a cache and its weight.")
    return caches, weights


def train_positions(cache: Cache) -> int:
    """Positions of the training split."""
    begin, end = _shards_of(cache, plan_of(cache), "train")
    shard, positions = (cache.manifest.column(name).to_numpy() for name in ("shard", "positions"))
    return int(positions[(shard >= begin) & (shard < end)].sum())


def check_alike(caches: Sequence[Cache]) -> None:
    """StreamError if the caches of a mixture cannot be used for one student. Of the tokenizer, its identity counts: a
    cache of text and one of conversations differ in template, ends of documents and positions that count."""
    for cache in caches:
        for name in ("vocab_size", "temperatures", "draw_temperature", "tokenizer"):
            ours, first = (
                c.spec.provenance.tokens if name == "tokenizer" else getattr(c.spec, name) for c in (cache, caches[0])
            )
            if ours != first:
                raise StreamError(
                    f"cache: {caches[0]!r} and {cache!r} cannot be mixed: {name} is {first!r} in one and {ours!r} in "
                    "the other. Capture one of them again."
                )


def shares_of(tables: Sequence[ShardTable], weights: Sequence[Fraction]) -> list[Fraction]:
    """The part of the sequences to take from each cache, so that its part of the positions is its weight."""
    per_sequence = [
        weight * int(t.sequences.sum()) / int(t.positions.sum()) for t, weight in zip(tables, weights, strict=True)
    ]
    shares = [part / sum(per_sequence, Fraction(0)) for part in per_sequence]
    for table, share in zip(tables, shares, strict=True):
        if share < SMALLEST_SHARE:
            raise StreamError(
                f"cache: the weight of {table.origin!r} comes to {float(share):.1e} of the sequences; expected at "
                "least 1e-6."
            )
    return shares


def check_data(caches: Sequence[Cache], data: Any) -> None:
    """StreamError if the caches cannot be read with this data: data with a cache of text; none with a cache of
    examples, other examples than those in its spec (naming the differences), or labels outside the teacher's classes.
    """
    for cache in caches:
        columns = cache.spec.inputs
        if "tokens" in columns:
            if data is not None:
                raise StreamError(f"data: got {type_name(data)} for {cache!r}, which is of text. Leave it out.")
            continue
        if not set(EXAMPLE_COLUMNS) <= set(columns):
            raise StreamError(
                f"{cache!r}: got input columns {', '.join(columns) or 'none'}; expected `tokens` for text, or "
                f"{' and '.join(EXAMPLE_COLUMNS)} for examples. Capture it with fastkd.capture."
            )
        if not isinstance(data, Examples):
            raise StreamError(
                f"data: got {type_name(data)} with {cache!r}, a cache of examples, which it does not contain; expected "
                "those that it was captured from, labelled (--data module:factory)."
            )
        _check_same(cache, data)
        if not data.labelled:
            raise StreamError(f"data: got no labels, and {cache!r} contains none. Use Examples(..., labels=...).")
        if data.classes > cache.spec.vocab_size:
            raise StreamError(
                f"data: got a label {data.classes - 1}; expected classes from 0 to {cache.spec.vocab_size - 1}, those "
                f"of the teacher of {cache!r}."
            )


def _check_same(cache: Cache, data: Examples) -> None:
    theirs, ours = cache.spec.provenance.dataset_sha256, data.fingerprint()
    if theirs == ours:
        return
    if theirs is None:
        raise StreamError(
            f"{cache!r}: its spec has no hash of the data set (dataset: {cache.spec.dataset!r}), so the data cannot be "
            "checked. Capture it with fastkd.capture."
        )
    plan = plan_of(cache)
    counts = plan and (("examples", plan.totals.get("documents"), len(data)),
                       ("copies", plan.settings.get("context"), data.copies))  # fmt: skip
    differences = [f"{name}: {a} in the cache, {b} here" for name, a, b in counts or () if a != b]
    raise StreamError(
        f"data: got sha256 {ours[:12]}…; expected {theirs[:12]}…, the data set that {cache!r} was captured from "
        f"({'; '.join(differences) or 'the values of the examples, their augmentation, or its seed differ'})."
    )
