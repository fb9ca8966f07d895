"""The manifest: one row a shard, made from what they say of themselves, and written once when a cache is sealed."""

import hashlib
import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import CacheError

KEY = "manifest.parquet"
STATISTICS = ("mean", "p05", "p50", "p95")
_COUNTS = ("first_sequence", "sequences", "positions", "counted", "head_entries", "draw_entries", "bytes")
SCHEMA = pa.schema(
    [pa.field("shard", pa.int64(), nullable=False)]
    + [pa.field(name, pa.int64(), nullable=False) for name in _COUNTS]
    + [pa.field(f"{what}_{which}", pa.float64()) for what in ("mass", "entropy") for which in STATISTICS]
    + [pa.field("content_sha256", pa.binary(32), nullable=False)]
    + [pa.field("object_sha256", pa.binary(32), nullable=False)]
    + [pa.field("written", pa.int64(), nullable=False), pa.field("attempt", pa.string(), nullable=False)]
)
_MOST_SHARDS = 2**26


def row_of(attributes: Mapping[str, Any], size: int, object_sha256: str) -> dict[str, Any]:
    """The row of a shard of `size` bytes. CacheError where its attributes do not say what they must."""
    try:
        row: dict[str, Any] = {"shard": attributes["index"], "bytes": size, "written": attributes["written"]}
        row |= {name: attributes[name] for name in _COUNTS if name != "bytes"}
        for what in ("mass", "entropy"):
            values = attributes["statistics"][what]
            row |= {f"{what}_{which}": values[i] for i, which in enumerate(STATISTICS)}
        row["content_sha256"] = bytes.fromhex(attributes["content"])
        row["object_sha256"] = bytes.fromhex(object_sha256)
        row["attempt"] = attributes["attempt"]
        if not all(type(row[name]) is int and 0 <= row[name] < 2**62 for name in ("shard", "written", *_COUNTS)):
            raise ValueError("a count is no natural number")
        statistics = [row[f"{what}_{which}"] for what in ("mass", "entropy") for which in STATISTICS]
        if not all(value is None or _is_number(value) for value in statistics):
            raise ValueError("a statistic is no number")
        if len(row["content_sha256"]) != 32 or len(row["object_sha256"]) != 32 or not isinstance(row["attempt"], str):
            raise ValueError("a hash or the attempt is not what it should be")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CacheError(f"its attributes are not those of a shard ({error!r})") from error
    return row


def table_of(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """The manifest of these rows, by falling of no order but the shard's number."""
    return pa.Table.from_pylist(sorted(rows, key=lambda r: r["shard"]), schema=SCHEMA)


def to_parquet(table: pa.Table, spec_hash: str) -> bytes:
    """manifest.parquet: the table, the cache it belongs to, and a hash of its contents."""
    metadata = {b"fastkd.spec": spec_hash.encode(), b"fastkd.sha256": _digest(table, spec_hash).encode()}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes, spec_hash: str) -> pa.Table:
    """The table in manifest.parquet. CacheError where it is damaged or belongs to another cache."""
    cure = "Delete it and seal the cache again: it is made from the shards, and they are not touched by that."
    try:
        file = pq.ParquetFile(pa.BufferReader(data), thrift_string_size_limit=2**26, thrift_container_size_limit=2**22)
        if file.metadata.num_rows > _MOST_SHARDS:
            raise ValueError(f"{file.metadata.num_rows} rows")
        if file.schema_arrow.remove_metadata() != SCHEMA:
            raise ValueError(f"its columns are {', '.join(file.schema_arrow.names)}")
        table = file.read()
        if (np.diff(table.column("shard").to_numpy()) <= 0).any():
            raise ValueError("its shards do not ascend")
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise CacheError(f"{KEY}: not readable as a manifest ({error}). {cure}") from error
    metadata = table.schema.metadata or {}
    if metadata.get(b"fastkd.spec") != spec_hash.encode():
        raise CacheError(f"{KEY}: it belongs to a cache of other settings. {cure}")
    if metadata.get(b"fastkd.sha256") != _digest(table, spec_hash).encode():
        raise CacheError(f"{KEY}: its contents differ from its own hash. {cure}")
    return table.replace_schema_metadata(None)


def overlaps(table: pa.Table) -> list[tuple[int, int]]:
    """Pairs of shards that hold some of the same sequences."""
    shard, first, count = (table.column(n).to_numpy() for n in ("shard", "first_sequence", "sequences"))
    by = np.argsort(first, kind="stable")
    late = np.flatnonzero(first[by][1:] < (first + count)[by][:-1])
    return [(int(shard[by][i]), int(shard[by][i + 1])) for i in late]


def gaps(table: pa.Table) -> list[int]:
    """The numbers of shards between the first, 0, and the last that are not there (the first thousand of them)."""
    shard = np.concatenate([[-1], table.column("shard").to_numpy()])
    missing: list[int] = []
    for i in np.flatnonzero(np.diff(shard) > 1):
        missing += range(int(shard[i]) + 1, min(int(shard[i + 1]), int(shard[i]) + 1 + 1000 - len(missing)))
        if len(missing) >= 1000:
            break
    return missing


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**62  # neither NaN nor infinite


def _digest(table: pa.Table, spec_hash: str) -> str:
    total = hashlib.sha256(spec_hash.encode())
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        total.update(f"{name}:{len(column)};".encode())
        for buffer in _canonical(column):
            total.update(buffer)
    return total.hexdigest()


def _canonical(column: pa.Array) -> list[Any]:
    """Bytes that depend on the values alone, not on offsets or on what stands under a null."""
    if pa.types.is_string(column.type):
        return ["\0".join(column.to_pylist()).encode()]
    if pa.types.is_fixed_size_binary(column.type):
        return [b"".join(column.to_pylist())]
    return [np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).view(np.uint8)]
