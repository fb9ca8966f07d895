"""Sealed caches that have a manifest and no shards, to measure large ones."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fastkd.cache import CacheSpec, open_store
from fastkd.cache.manifest import KEY, SCHEMA, to_parquet

POSITIONS = 2**20  # per shard
SEQUENCES = 512  # per shard, 2048 positions each

# Run in a separate process: prints requests, seconds, and the growth of peak memory in MB.
_OPEN = """
import os, sys, time
import fastkd.cache, pyarrow.parquet
from fastkd.cache import open_cache, open_store
store = open_store(sys.argv[1])
asked = []
def counted(call):
    return lambda key, *size: (asked.append(key), call(key, *size))[1]
store.get, store.get_tail = counted(store.get), counted(store.get_tail)
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) / 1024
base = peak()
start = time.perf_counter()
cache = open_cache(store)
assert len(cache.shards) == int(sys.argv[2])
seconds = time.perf_counter() - start
print(len(asked), seconds, peak() - base, flush=True)
os._exit(0)  # threads of libraries sometimes abort at the end of a process
"""


class Opening(NamedTuple):
    """The cost of opening a cache."""

    requests: float
    seconds: float
    megabytes: float


def records(shards: int, seed: int = 0) -> pa.Table:
    """The manifest of a number of shards, with values that vary as those of real shards do."""
    random = np.random.default_rng(seed)
    number = np.arange(shards, dtype=np.int64)
    draws = random.integers(14_000_000, 16_000_000, shards)
    columns: dict[str, pa.Array] = {
        "shard": pa.array(number),
        "first_sequence": pa.array(SEQUENCES * number),
        "sequences": pa.array(np.full(shards, SEQUENCES)),
        "positions": pa.array(np.full(shards, POSITIONS)),
        "counted": pa.array(np.full(shards, POSITIONS)),
        "head_entries": pa.array(np.full(shards, 48 * POSITIONS)),
        "draw_entries": pa.array(draws),
        "bytes": pa.array(95_000_000 + draws),
        "written": pa.array(1_800_000_000 + number),
        "attempt": pa.array([random.bytes(16).hex() for _ in range(shards)]),
    }
    for field in SCHEMA:
        if field.name not in columns and pa.types.is_floating(field.type):
            columns[field.name] = pa.array(random.random(shards))
        elif field.name not in columns:  # a hash
            columns[field.name] = pa.FixedSizeBinaryArray.from_buffers(
                field.type, shards, [None, pa.py_buffer(random.bytes(32 * shards))]
            )
    return pa.Table.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def write_records(folder: Path | str, spec: CacheSpec, table: pa.Table) -> int:
    """Write a sealed cache with these records and no shards. Returns the size of its manifest in bytes."""
    store = open_store(str(folder), create=True)
    store.create("spec.json", spec.to_json())
    manifest = to_parquet(table, spec.hash)
    store.create(KEY, manifest)
    return len(manifest)


def opening(folder: Path | str, shards: int, rounds: int) -> Opening:
    """Medians over `rounds` of opening a cache in a separate process."""
    command = [sys.executable, "-c", _OPEN, str(folder), str(shards)]
    found = [
        [float(x) for x in subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()]
        for _ in range(rounds)
    ]
    return Opening(*np.median(np.array(found), 0).tolist())
