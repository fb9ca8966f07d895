"""What a store holds: the spec, the ends of its shards, and the manifest, one row per shard, that seals a cache."""

import hashlib
import io
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .errors import CacheError, CorruptShard, NotFound, StoreError, expect
from .progress import Shown, shown
from .shard.container import TAIL_LENGTH, Damage, check_bytes
from .shard.kind import MANIFEST, SHARDS, ShardKind
from .shard.kind import shard_index as shard_index
from .shard.kind import shard_key as shard_key
from .spec import MOST_JSON, MOST_SHARDS, CacheSpec
from .stores import Store
from .target_shards import STATISTICS as STATISTICS
from .target_shards import TargetShards

SPEC_KEY = "spec.json"
KEY = MANIFEST
PREFIX = SHARDS
SCHEMA = TargetShards.schema()
T = TypeVar("T")
MOST_MANIFEST = 2**28  # bytes
_ROW = 64  # bytes that a row takes at least, compressed: two hashes
_REQUESTS = 16  # at a time: the end of a shard is small, and most of the time is latency


def listed(store: Store, folder: str = "") -> dict[int, int]:
    """The shards in a store: their numbers, ascending, and the size of each in bytes. folder: as in `ShardKind`."""
    found = ((shard_index(entry.key, folder), entry.size) for entry in store.list(f"{folder}{PREFIX}"))
    return dict(sorted((index, size) for index, size in found if index is not None))


def read_twice(store: Store, read: Callable[[], T]) -> T:
    """What `read` returns. If it finds damage it is called again: bytes may have changed on their way, not at rest.
    Raises Damage, and CacheError with the name of the store."""
    try:
        return read()
    except StoreError:
        raise
    except (Damage, CacheError):
        pass
    try:
        return read()
    except StoreError:
        raise
    except CacheError as error:
        raise CacheError(f"{store.describe()}: {error}") from error


def read_spec(store: Store) -> CacheSpec:
    """The spec of the cache in a store. CacheError if there is none, or none that this version can read."""
    try:
        return read_twice(store, lambda: CacheSpec.from_json(store.get_tail(SPEC_KEY, MOST_JSON + 1)))
    except NotFound as error:
        raise CacheError(f"{store.describe()}: there is no cache here (no {SPEC_KEY}).") from error


def read_manifest(store: Store, kind: ShardKind) -> pa.Table | None:
    """The manifest of a sealed set of shards; None for one that is not sealed. CacheError if it is damaged."""
    try:
        return read_twice(store, lambda: from_parquet(store.get_tail(kind.manifest_key, MOST_MANIFEST + 1), kind))
    except NotFound:
        return None


def read_object(store: Store, kind: ShardKind, index: int) -> bytes:
    """A shard's object, whole. Damage if it differs from its own hash."""
    return read_twice(store, lambda: check_bytes(store.get(kind.key(index))))


def scan(store: Store, kind: ShardKind, sizes: dict[int, int], *, progress: Shown = False) -> pa.Table:
    """The manifest of these shards, from their ends: one small request each.

    sizes: bytes of each shard, by number. progress: see `Shown`. Raises CorruptShard if an end is damaged.
    """

    def row(index: int, size: int) -> dict[str, Any]:
        try:
            key = kind.key(index)
            return read_twice(store, lambda: kind.row(index, store.get_tail(key, TAIL_LENGTH), size)[0])
        except Damage as damage:
            raise corrupt(store, kind, index, damage) from damage

    with ThreadPoolExecutor(_REQUESTS) as pool:
        rows = pool.map(row, sizes, sizes.values())
        return table_of(shown(rows, len(sizes), "scan", progress), kind)


def corrupt(store: Store, kind: ShardKind, index: int, damage: Damage) -> CorruptShard:
    """The error to raise for a damaged shard: which one, which array, and the next step."""
    where = f', array "{damage.array}"' if damage.array else ""
    return CorruptShard(
        f"shard {index} of {kind.label}{store.describe()}{where}: {damage}. Delete {kind.key(index)} and, if it "
        f"exists, {kind.manifest_key}, and capture again with the same settings: only what is missing is written."
    )


def table_of(rows: Iterable[Mapping[str, Any]], kind: ShardKind) -> pa.Table:
    """The manifest of these rows, sorted by shard."""
    return pa.Table.from_pylist(sorted(rows, key=lambda r: r["shard"]), schema=kind.schema())


def to_parquet(table: pa.Table, spec_hash: str) -> bytes:
    """manifest.parquet: the table, the cache it belongs to, and a hash of its contents."""
    metadata = {b"fastkd.spec": spec_hash.encode(), b"fastkd.sha256": _digest(table, spec_hash).encode()}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes, kind: ShardKind) -> pa.Table:
    """The table in manifest.parquet. CacheError if it is damaged or belongs to another cache."""
    schema, spec_hash, key = kind.schema(), kind.spec_hash, kind.manifest_key
    step = "Delete it and seal the cache again: it is made from the shards, which stay as they are."
    expect(len(data) <= MOST_MANIFEST, key, f"{len(data)} bytes or more", f"at most {MOST_MANIFEST}")
    try:
        file = pq.ParquetFile(
            pa.BufferReader(data),
            read_dictionary=["attempt"],  # one long text may be that of many rows: keep it once
            thrift_string_size_limit=2**26,
            thrift_container_size_limit=2**22,
        )
        if file.metadata.num_rows > min(MOST_SHARDS, len(data) // _ROW):
            raise ValueError(f"{file.metadata.num_rows} rows in {len(data)} bytes")
        table = file.read(use_threads=False)  # no threads that a short process must end
        metadata = table.schema.metadata or {}
        table = _with_plain_attempts(table, schema).replace_schema_metadata(None)
        if table.schema != schema:
            raise ValueError(f"its columns are {', '.join(table.schema.names)}")
        for name in ("shard", *kind.counts, "bytes", "written"):
            values = table.column(name).to_numpy()
            if (values < 0).any() or (values >= 10**18).any() or (name == "shard" and (np.diff(values) <= 0).any()):
                raise ValueError(f"{name}: numbers out of their range, or shards that do not ascend")
        found = _digest(table, spec_hash)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise CacheError(f"{key}: not readable as a manifest ({error}). {step}") from error
    if metadata.get(b"fastkd.spec") != spec_hash.encode():
        raise CacheError(f"{key}: it belongs to a cache of other settings. {step}")
    if metadata.get(b"fastkd.sha256") != found.encode():
        raise CacheError(f"{key}: its contents differ from its own hash. {step}")
    return table


def _with_plain_attempts(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The attempts as text, after a check that they are short."""
    column = table.column("attempt")
    if pa.types.is_dictionary(column.type):
        for chunk in column.chunks:
            if chunk.dictionary.nbytes > 64 * (len(chunk.dictionary) + 1):
                raise ValueError("its attempts are longer than 32 characters")
        column = column.cast(pa.string())
    return table.set_column(table.schema.get_field_index("attempt"), schema.field("attempt"), column)


def _digest(table: pa.Table, spec_hash: str) -> str:
    """sha256 of the values alone, not of offsets or of the bytes under a null."""
    total = hashlib.sha256(spec_hash.encode())
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        total.update(f"{name}:{len(column)};".encode())
        if pa.types.is_string(column.type):
            total.update("\0".join(column.to_pylist()).encode())
        elif pa.types.is_fixed_size_binary(column.type):
            total.update(b"".join(column.to_pylist()))
        else:
            total.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).view(np.uint8).data)
    return total.hexdigest()


def overlaps(table: pa.Table) -> list[tuple[int, int]]:
    """Pairs of shards that hold some of the same sequences."""
    shard, first, count = (table.column(n).to_numpy() for n in ("shard", "first_sequence", "sequences"))
    by = np.argsort(first, kind="stable")
    late = np.flatnonzero(first[by][1:] < (first + count)[by][:-1])
    return [(int(shard[by][i]), int(shard[by][i + 1])) for i in late]


def refuse_overlaps(store: Store, table: pa.Table) -> None:
    """CacheError if two shards hold some of the same sequences."""
    for one, other in overlaps(table)[:1]:
        raise CacheError(
            f"{store.describe()}: shards {one} and {other} hold some of the same sequences; first_sequence must come "
            "from one plan. Read them one by one, with read_shard."
        )


def gaps(starts: NDArray[np.int64], counts: NDArray[np.int64] | int = 1, *, end: int = 0) -> list[list[int]]:
    """The numbers that no range covers, below the last one that is covered and below `end`: [from, to], inclusive.

    starts, counts: where each range begins, and how many numbers it covers.
    """
    by = np.argsort(starts, kind="stable")
    covered = np.concatenate([[0], np.maximum.accumulate((starts + counts)[by])])
    found = [[int(covered[i]), int(starts[by][i]) - 1] for i in np.flatnonzero(starts[by] > covered[:-1])]
    return found + [[int(covered[-1]), end - 1]] * bool(end > covered[-1])


def runs(numbers: Collection[int]) -> list[list[int]]:
    """Numbers as ranges [from, to], both included."""
    array = np.array(sorted(numbers), np.int64)
    parts = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1)
    return [[int(part[0]), int(part[-1])] for part in parts if len(part)]
