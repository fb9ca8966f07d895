"""The manifest: one row per shard, made from the shards' attributes, and written once when a cache is sealed."""

import hashlib
import io
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

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
_ROW = 64  # bytes that a row takes at least, compressed: two hashes
_ATTEMPT = re.compile("[0-9a-f]{32}")


def row_of(attributes: Mapping[str, Any], size: int, object_sha256: str) -> dict[str, Any]:
    """The row of a shard of `size` bytes. CacheError if its attributes are not those of a shard."""
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
            raise ValueError("a count is no integer from 0 on")
        statistics = [row[f"{what}_{which}"] for what in ("mass", "entropy") for which in STATISTICS]
        if not all(value is None or _is_number(value) for value in statistics):
            raise ValueError("a statistic is no number")
        if (
            len(row["content_sha256"]) != 32
            or len(row["object_sha256"]) != 32
            or not _ATTEMPT.fullmatch(row["attempt"])
        ):
            raise ValueError("a hash or the attempt is malformed")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CacheError(f"its attributes are not those of a shard ({error!r})") from error
    return row


def table_of(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """The manifest of these rows, sorted by shard."""
    return pa.Table.from_pylist(sorted(rows, key=lambda r: r["shard"]), schema=SCHEMA)


def to_parquet(table: pa.Table, spec_hash: str) -> bytes:
    """manifest.parquet: the table, the cache it belongs to, and a hash of its contents."""
    metadata = {b"fastkd.spec": spec_hash.encode(), b"fastkd.sha256": _digest(table, spec_hash).encode()}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes, spec_hash: str) -> pa.Table:
    """The table in manifest.parquet. CacheError if it is damaged or belongs to another cache."""
    step = "Delete it and seal the cache again: it is made from the shards, which stay as they are."
    try:
        file = pq.ParquetFile(
            pa.BufferReader(data),
            read_dictionary=["attempt"],  # one long text may be that of many rows: keep it once
            thrift_string_size_limit=2**26,
            thrift_container_size_limit=2**22,
        )
        if file.metadata.num_rows > min(_MOST_SHARDS, len(data) // _ROW):
            raise ValueError(f"{file.metadata.num_rows} rows in {len(data)} bytes")
        table = file.read(use_threads=False)  # no threads that a short process must end
        metadata = table.schema.metadata or {}
        table = _with_plain_attempts(table).replace_schema_metadata(None)
        if table.schema != SCHEMA:
            raise ValueError(f"its columns are {', '.join(table.schema.names)}")
        if (np.diff(table.column("shard").to_numpy()) <= 0).any():
            raise ValueError("its shards do not ascend")
        found = _digest(table, spec_hash)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise CacheError(f"{KEY}: not readable as a manifest ({error}). {step}") from error
    if metadata.get(b"fastkd.spec") != spec_hash.encode():
        raise CacheError(f"{KEY}: it belongs to a cache of other settings. {step}")
    if metadata.get(b"fastkd.sha256") != found.encode():
        raise CacheError(f"{KEY}: its contents differ from its own hash. {step}")
    return table


def _with_plain_attempts(table: pa.Table) -> pa.Table:
    """The attempts as text, after a check that they are short."""
    column = table.column("attempt")
    if pa.types.is_dictionary(column.type):
        for chunk in column.chunks:
            if chunk.dictionary.nbytes > 64 * (len(chunk.dictionary) + 1):
                raise ValueError("its attempts are longer than 32 characters")
        column = column.cast(pa.string())
    return table.set_column(table.schema.get_field_index("attempt"), SCHEMA.field("attempt"), column)


def overlaps(table: pa.Table) -> list[tuple[int, int]]:
    """Pairs of shards that hold some of the same sequences."""
    shard, first, count = (table.column(n).to_numpy() for n in ("shard", "first_sequence", "sequences"))
    by = np.argsort(first, kind="stable")
    late = np.flatnonzero(first[by][1:] < (first + count)[by][:-1])
    return [(int(shard[by][i]), int(shard[by][i + 1])) for i in late]


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
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


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
    """Bytes that depend on the values alone, not on offsets or on the bytes under a null."""
    if pa.types.is_string(column.type):
        return ["\0".join(column.to_pylist()).encode()]
    if pa.types.is_fixed_size_binary(column.type):
        return [b"".join(column.to_pylist())]
    return [np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).view(np.uint8)]
