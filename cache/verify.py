"""Checks that every shard is the one that was committed: every byte is hashed; deep: every array is also decoded."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from .capture_plan import read_capture_plan
from .errors import CacheError, NotFound, Refused, StoreError
from .manifest import PREFIX, gaps, overlaps, read_manifest, read_object, read_spec, shard_index, table_of
from .shard.container import Damage, content_hash, unpack
from .shard.kind import ShardKind
from .shard.layout import TargetShards
from .spec import CacheSpec
from .stores import Store, open_store


@dataclass(frozen=True)
class Problem:
    """A problem. shard: None for the whole cache. array: None if it is not known, or all of them."""

    shard: int | None
    array: str | None
    what: str

    def __str__(self) -> str:
        place = "the cache" if self.shard is None else f"shard {self.shard}"
        return f"{place}{f', array {self.array}' if self.array else ''}: {self.what}"


@dataclass
class Report:
    """The result of `verify`. False where there is a problem.

    shards, positions, bytes: how many were checked. deep, sealed: whether arrays were decoded, and the cache is sealed.
    unlisted: why a sealed cache's store could not be listed; objects that the manifest does not name were then not
    looked for. missing: numbers of shards that do not exist, as [from, to], up to the last one or the last planned one.
    """

    shards: int = 0
    positions: int = 0
    bytes: int = 0
    deep: bool = False
    sealed: bool = False
    unlisted: str | None = None
    problems: list[Problem] = field(default_factory=list)
    missing: list[list[int]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok


def verify_cache(path_or_store: Any, *, deep: bool = True, progress: bool = False) -> Report:
    """`verify` the cache at a path, a URL or in a store. A spec or a manifest that cannot be read is a problem too.

    Raises CacheError if there is no cache, and StoreError if the store fails.
    """
    store = open_store(path_or_store)
    try:
        spec = read_spec(store)
    except StoreError:
        raise
    except CacheError as error:
        what = str(error).removeprefix(f"{store.describe()}: ")
        if isinstance(error.__cause__, NotFound):
            shards = 0
            with suppress(StoreError):
                shards = sum(1 for _ in store.list(PREFIX))
            if not shards:
                raise
            what = f"spec.json is missing, and {shards} objects in {PREFIX} exist; restore it"
        return Report(deep=deep, problems=[Problem(None, None, what)])
    try:
        return verify(store, spec, read_manifest(store, TargetShards(spec)), deep=deep, progress=progress)
    except StoreError:
        raise
    except CacheError as error:  # shards can be checked without their manifest
        report = Report(deep=deep)
        with suppress(StoreError):
            report = verify(store, spec, None, deep=deep, progress=progress)
        report.problems.insert(0, Problem(None, None, str(error).removeprefix(f"{store.describe()}: ")))
        return report


def verify(
    store: Store, spec: CacheSpec, manifest: pa.Table | None, *, deep: bool = True, progress: bool = False
) -> Report:
    """Check every shard of a cache. manifest: that of a sealed cache.

    Each object is read whole and compared with its own hash, its name, the spec, and the manifest. deep: its arrays are
    decoded as a reader would, and compared with the hash of their contents. Shards that are missing between others,
    that overlap, or that are not in the manifest are problems too. Raises StoreError if the store fails.
    """
    sealed, kind = manifest is not None, TargetShards(spec)
    report = Report(deep=deep, sealed=sealed)
    numbers: dict[str, int | None] = {}
    try:
        numbers = {entry.key: shard_index(entry.key) for entry in store.list(PREFIX)}
    except StoreError as error:  # HTTP has no listing
        if not sealed:
            raise
        report.unlisted = str(error)
    known = {} if manifest is None else {row["shard"]: row for row in manifest.to_pylist()}
    indices = sorted({index for index in numbers.values() if index is not None} | known.keys())
    rows: list[dict[str, Any]] = []
    for index in tqdm(indices, unit="shard", disable=not progress, desc="verify"):
        try:
            data = read_object(store, kind, index)
            report.bytes += len(data)
            row = _checked_row(kind, index, data, known.get(index), deep)
        except NotFound:
            report.problems.append(Problem(index, None, "it is in the manifest, and its object is missing"))
            continue
        except (Damage, Refused, MemoryError) as error:
            what = "there is not enough memory for it" if isinstance(error, MemoryError) else str(error)
            report.problems.append(Problem(index, getattr(error, "array", None), what))
            report.shards += 1
            continue
        report.shards += 1
        if sealed and index not in known:
            what = "it is not in the manifest: it was written after the cache was sealed"
            report.problems.append(Problem(index, None, what))
        rows.append(row)
        report.positions += row["positions"]
    try:
        plan = read_capture_plan(store, spec)
    except StoreError:
        raise
    except CacheError as error:
        plan = None
        report.problems.append(Problem(None, None, str(error).removeprefix(f"{store.describe()}: ")))
    report.missing = gaps(np.array(indices, np.int64), end=0 if plan is None else plan.shards)
    for first, last in [] if sealed else report.missing:
        if 0 < first < max(indices, default=0):  # those before the first may be another writer's, which has not begun
            what = "it is missing" if first == last else f"it and all up to {last} are missing"
            report.problems.append(Problem(first, None, f"{what}, between others that exist"))
    for one, other in overlaps(table_of(rows, kind)):
        report.problems.append(Problem(other, None, f"it holds some of the sequences of shard {one}"))
    for key in sorted(key for key, index in numbers.items() if index is None):
        report.problems.append(Problem(None, None, f"{key!r} is no shard's name"))
    return report


def _checked_row(kind: ShardKind, index: int, data: bytes, known: dict[str, Any] | None, deep: bool) -> dict[str, Any]:
    """The manifest's row of a shard, from its object. Damage if it is wrong. known: the row as it was sealed."""
    row, attributes = kind.row(index, data, len(data))
    if known is not None and known["object_sha256"] != row["object_sha256"]:
        raise Damage("it is another object than the one that was sealed")
    if known is not None and known != row:
        raise Damage("its attributes differ from the manifest")
    if deep:
        arrays = unpack(data, kind.expected(attributes))
        if content_hash(arrays) != attributes["content"]:
            raise Damage("its decoded arrays differ from the hash of its contents")
        kind.check_values(attributes, arrays)
    return row
