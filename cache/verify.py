"""Is every shard the one that was committed? Every byte is read and hashed; deep: every array is decoded as well."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from .capture_plan import planned_shards
from .errors import CacheError, NotFound, StoreError
from .manifest import gaps, overlaps, row_of, table_of
from .reader import Cache, open_cache
from .scan import (
    PREFIX,
    SPEC_KEY,
    read_spec,
    shard_index,
    shard_key,
)
from .shard.container import (
    Damage,
    check_bytes,
    content_hash,
    read_attributes,
    stored_digest,
    unpack,
)
from .shard.layout import check_attributes, decode_shard, known_arrays
from .stores import Entry, Store, open_store


@dataclass(frozen=True)
class Problem:
    """What is wrong: with which shard (None: with the cache), and in which array (None: not known, or all)."""

    shard: int | None
    array: str | None
    what: str

    def __str__(self) -> str:
        place = "the cache" if self.shard is None else f"shard {self.shard}"
        return f"{place}{f', array {self.array}' if self.array else ''}: {self.what}"


@dataclass
class Report:
    """What `verify` found. Falsy where there is a problem. unlisted: why a sealed cache's store could not be listed;
    what lies there beside the shards of the manifest was then not looked for."""

    shards: int = 0
    positions: int = 0
    bytes: int = 0
    deep: bool = False
    sealed: bool = False
    unlisted: str | None = None
    problems: list[Problem] = field(default_factory=list)
    # Of an unsealed cache: numbers below the highest that are not there, as [from, to].
    missing: list[list[int]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok


def verify_cache(path_or_store: Any, *, deep: bool = True, progress: bool = False) -> Report:
    """`verify` of a cache that may not even open: a spec or a manifest that cannot be read is a problem too.

    Raises CacheError where there is no cache, and StoreError where the store fails.
    """
    store = open_store(path_or_store)
    try:
        return verify(open_cache(store), deep=deep, progress=progress)
    except StoreError:
        raise
    except CacheError as error:
        found = Problem(None, None, str(error).removeprefix(f"{store.describe()}: "))
        if isinstance(error.__cause__, NotFound):
            if not (there := _shards_without_spec(store)):
                raise
            found = Problem(None, None, f"{SPEC_KEY} is missing, and {there} objects in {PREFIX} are there; restore it")
    report = Report(deep=deep)
    # The shards need no manifest, and whoever mends it wants to know how they are. Where it is the spec that cannot be
    # read, or there is no listing, the one problem says enough.
    with suppress(CacheError):
        report = verify(Cache(store, read_spec(store), None), deep=deep, progress=progress)
    report.problems.insert(0, found)
    return report


def verify(cache: Cache, *, deep: bool = True, progress: bool = False) -> Report:
    """Check every shard of a cache.

    Each object is read whole and compared with its own hash, its name, the spec, and (sealed) the manifest. deep: its
    arrays are decoded as a reader would, and their contents compared with the hash of them. Shards that are missing
    between others, that overlap, or that a sealed cache does not know are problems too. Raises StoreError where the
    store fails.
    """
    report = Report(deep=deep, sealed=cache.sealed)
    entries: list[Entry] = []
    try:
        entries = list(cache.store.list(PREFIX))
    except StoreError as error:  # HTTP has no listing
        if not cache.sealed:
            raise
        report.unlisted = str(error)
    numbers = {entry.key: shard_index(entry.key) for entry in entries}
    there = {index for index in numbers.values() if index is not None}
    known = {row["shard"]: row for row in cache.manifest.to_pylist()} if cache.sealed else {}
    rows: list[dict[str, Any]] = []
    indices = sorted(there | known.keys())
    for index in tqdm(indices, unit="shard", disable=not progress, desc="verify"):
        for problem in _check(cache, index, known.get(index), deep, report, rows):
            report.problems.append(problem)
    table = table_of(rows)
    report.missing = gaps(np.array(indices, np.int64), end=planned_shards(cache.store))
    if not cache.sealed:  # else who sealed it was told
        for first, last in report.missing:
            if (
                0 < first < max(indices, default=0)
            ):  # what comes before the first may be another writer's, who has not begun
                what = "it is missing" if first == last else f"it and all up to {last} are missing"
                report.problems.append(Problem(first, None, f"{what}, between others that are there"))
    for one, other in overlaps(table):
        report.problems.append(Problem(other, None, f"it holds some of the sequences of shard {one}"))
    for key in sorted(key for key, index in numbers.items() if index is None):
        report.problems.append(Problem(None, None, f"{key} is no shard's name"))
    return report


def _check(
    cache: Cache, index: int, known: dict[str, Any] | None, deep: bool, report: Report, rows: list[dict[str, Any]]
) -> Iterator[Problem]:
    try:
        data = cache.store.get(shard_key(index))
    except NotFound:
        yield Problem(index, None, "it is in the manifest, and its object is missing")
        return
    report.shards += 1
    report.bytes += len(data)
    try:
        check_bytes(data)
        attributes = read_attributes(data)
        check_attributes(attributes, cache.spec, index)
        row = row_of(attributes, len(data), stored_digest(data))
        if cache.sealed and known is None:
            yield Problem(index, None, "it is not in the manifest: it was written after the cache was sealed")
        elif known is not None and known["object_sha256"] != row["object_sha256"]:
            raise Damage("it is another object than the one that was sealed")
        elif known is not None and known != row:
            raise Damage("the manifest says something else of it")
        if deep:
            arrays = unpack(data, known_arrays(cache.spec, attributes))
            if content_hash(arrays) != attributes.get("content"):
                raise Damage("what it decodes to differs from the hash of it")
            _check_decoded(decode_shard(cache.spec, attributes, arrays), attributes)
    except (Damage, CacheError) as error:
        yield Problem(index, getattr(error, "array", None), str(error))
        return
    rows.append(row)
    report.positions += row["positions"]


def _shards_without_spec(store: Store) -> int:
    try:
        return sum(1 for _ in store.list(PREFIX))
    except StoreError:
        return 0


def _check_decoded(decoded: dict[str, Any], attributes: dict[str, Any]) -> None:
    """The counts that the shard gives of itself."""
    used = decoded["logprobs"] > -np.inf
    drawn = decoded["draws"] > 0 if "draws" in decoded else np.zeros_like(used)
    counts = {
        "counted": int(used.any(1).sum()),
        "head_entries": int((used & ~drawn).sum()),
        "draw_entries": int(drawn.sum()),
        "sequences": len(decoded["sequence_lengths"]),
        "positions": len(used),
    }
    for name, value in counts.items():
        if attributes.get(name) != value:
            raise Damage(f"it says {attributes.get(name)} {name}, and holds {value}")
