"""Reads what a store holds: the spec, the manifest, and the manifest's rows from the shards themselves."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from .errors import CacheError, CorruptShard, NotFound, StoreError
from .manifest import KEY, from_parquet, row_of, table_of
from .shard.container import TAIL_LENGTH, Damage, stored_digest
from .shard.layout import shard_attributes
from .spec import CacheSpec
from .stores import Store

SPEC_KEY = "spec.json"
PREFIX = "shards/"
_NAME = re.compile(r"shards/(0|[1-9][0-9]{0,17})\.zarr\.zip")
_REQUESTS = 16  # at a time: the end of a shard is small, and most of the time is latency


def shard_key(index: int) -> str:
    """The name of a shard's object."""
    return f"{PREFIX}{index}.zarr.zip"


def shard_index(key: str) -> int | None:
    """The number in the name of a shard's object; None for any other name."""
    match = _NAME.fullmatch(key)
    return int(match[1]) if match else None


def listed(store: Store) -> dict[int, int]:
    """The shards in a store: their numbers, ascending, and the size of each in bytes."""
    found = ((shard_index(entry.key), entry.size) for entry in store.list(PREFIX))
    return dict(sorted((index, size) for index, size in found if index is not None))


def read_spec(store: Store) -> CacheSpec:
    """The spec of the cache in a store. CacheError if there is none, or none that this version can read."""
    try:
        data = store.get(SPEC_KEY)
    except NotFound as error:
        raise CacheError(f"{store.describe()}: there is no cache here (no {SPEC_KEY}).") from error
    try:
        return CacheSpec.from_json(data)
    except CacheError as error:
        raise CacheError(f"{store.describe()}: {error}") from error


def read_manifest(store: Store, spec: CacheSpec) -> pa.Table | None:
    """The manifest of a sealed cache; None for one that is not sealed. CacheError if it is damaged."""
    try:
        data = store.get(KEY)
    except NotFound:
        return None
    try:
        return from_parquet(data, spec.hash)
    except CacheError as error:
        raise CacheError(f"{store.describe()}: {error}") from error


def shard_row(spec: CacheSpec, index: int, end: bytes, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest's row of a shard of `size` bytes, and its attributes, from its object or the end of it. Damage, or
    CacheError, if it is not this shard of this cache."""
    attributes = shard_attributes(end, spec, index)
    return row_of(attributes, size, stored_digest(end)), attributes


def scan(store: Store, spec: CacheSpec, sizes: dict[int, int], *, progress: bool = False) -> pa.Table:
    """The manifest of these shards, from their ends: one small request each.

    sizes: bytes of each shard, by number. progress: a bar on stderr. Raises CorruptShard if an end is damaged.
    """

    def row(index: int, size: int) -> dict[str, Any]:
        try:
            return shard_row(spec, index, store.get_tail(shard_key(index), TAIL_LENGTH), size)[0]
        except StoreError:
            raise
        except (Damage, CacheError) as error:
            raise corrupt(store, index, error) from error

    with ThreadPoolExecutor(_REQUESTS) as pool:
        rows = pool.map(row, sizes, sizes.values())
        return table_of(tqdm(rows, total=len(sizes), unit="shard", disable=not progress, desc="scan", leave=False))


def corrupt(store: Store, index: int, error: Exception) -> CorruptShard:
    """The error to raise for a damaged shard: which one, which array, and the next step."""
    array = getattr(error, "array", None)
    where = f', array "{array}"' if array else ""
    return CorruptShard(
        f"shard {index} of {store.describe()}{where}: {error}. Delete {shard_key(index)} and, if it exists, "
        "manifest.parquet, and capture again with the same settings: only what is missing is written."
    )
