"""What lies in a store: the spec, and one row a shard, read from the shards themselves."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from .errors import CacheError, CorruptShard, NotFound, StoreError
from .manifest import row_of, table_of
from .shard.container import TAIL_LENGTH, Damage, read_attributes, stored_digest
from .shard.layout import check_attributes
from .spec import CacheSpec
from .stores import Store

SPEC_KEY = "spec.json"
PREFIX = "shards/"
_NAME = re.compile(r"shards/(0|[1-9][0-9]{0,17})\.zarr\.zip")
_REQUESTS = 16  # at a time: a shard's end is small, and what takes time is the asking


def shard_key(index: int) -> str:
    """The name of a shard's object."""
    return f"{PREFIX}{index}.zarr.zip"


def shard_index(key: str) -> int | None:
    """The number in the name of a shard's object; None for any other name."""
    match = _NAME.fullmatch(key)
    return int(match[1]) if match else None


def listed(store: Store) -> dict[int, int]:
    """The shards that a store holds, by number, with the size of each in bytes."""
    found = ((shard_index(entry.key), entry.size) for entry in store.list(PREFIX))
    return dict(sorted((index, size) for index, size in found if index is not None))


def read_spec(store: Store) -> CacheSpec:
    """The spec of the cache in a store."""
    try:
        data = store.get(SPEC_KEY)
    except NotFound as error:
        raise CacheError(f"{store.describe()}: there is no cache here (no {SPEC_KEY}).") from error
    try:
        return CacheSpec.from_json(data)
    except CacheError as error:
        raise CacheError(f"{store.describe()}: {error}") from error


def row(store: Store, spec: CacheSpec, index: int, size: int) -> dict[str, Any]:
    """The manifest's row of a shard. CorruptShard where its end is not that of this shard of this cache."""
    try:
        end = store.get_tail(shard_key(index), TAIL_LENGTH)
        attributes = read_attributes(end)
        check_attributes(attributes, spec, index)
        return row_of(attributes, size, stored_digest(end))
    except StoreError:
        raise
    except (Damage, CacheError) as error:
        raise corrupt(store, index, error) from error


def scan(store: Store, spec: CacheSpec, sizes: dict[int, int], *, progress: bool = False) -> pa.Table:
    """The manifest of these shards, from their ends: one small request each. progress: a bar on stderr."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        rows = pool.map(lambda item: row(store, spec, *item), sizes.items())
        return table_of(tqdm(rows, total=len(sizes), unit="shard", disable=not progress, desc="scan", leave=False))


def corrupt(store: Store, index: int, error: Exception) -> CorruptShard:
    """The error to raise for a damaged shard: which one, which array, and what to do."""
    array = getattr(error, "array", None)
    where = f', array "{array}"' if array else ""
    return CorruptShard(
        f"shard {index} of {store.describe()}{where}: {error}. Delete {shard_key(index)} and, where it is there, "
        "manifest.parquet, and capture again with the same settings: only what is missing is written."
    )
