"""Opening and reading a cache: speed against plain pcodec, several orders, memory. Part of `bench_cache.py`."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.pcodec import PCodec

from fastkd.bench.cache_targets import Arrays, one_core, repeated, shard_of, spec_of
from fastkd.bench.records import opening as open_records
from fastkd.bench.records import records, write_records
from fastkd.bench.table import Table
from fastkd.bench.timing import interleaved
from fastkd.cache import Workspace, create_cache, open_cache


def read(table: Table, data: Arrays, rounds: int) -> None:
    """Decoding speed against plain pcodec of the same targets, in the same run."""
    one_core()
    base = shard_of(data, "top64")
    shard = repeated(base, 4)
    n = len(shard["ids"])
    table.title(f"reading whole shards of {n} positions, one core, from the page cache")
    plain = {
        "ids": PCodec().encode(shard["ids"].astype(np.uint16).reshape(-1)),
        "float16": PCodec().encode(shard["logprobs"].astype(np.float16).reshape(-1)),
        "float32": PCodec().encode(shard["logprobs"].reshape(-1)),
    }
    print(
        f"  plain: pcodec of ids (uint16) and log-probabilities (float16), in memory, without checks, into new arrays: "
        f"{(len(plain['ids']) + len(plain['float16'])) / n:.1f} bytes per position"
    )
    out = {
        "ids": np.empty(n * 64, np.uint16),
        "float16": np.empty(n * 64, np.float16),
        "float32": np.empty(n * 64, np.float32),
    }

    def plainly(*names: str, reuse: bool = False) -> None:
        for name in names:
            PCodec().decode(plain[name], out=out[name] if reuse else None)

    space = Workspace()
    with tempfile.TemporaryDirectory() as folder:
        caches = {}
        for codec in ("fast", "default", "smallest", "portable"):
            place = f"{folder}/{codec}"
            with create_cache(place, spec_of(data, codec=codec)) as writer:
                writer.write_shard(0, **shard)
                writer.seal()
            caches[codec] = open_cache(place)
        runs: dict[str, Any] = {
            "plain": lambda: plainly("ids", "float16"),
            "plain, into arrays used before": lambda: plainly("ids", "float16", reuse=True),
        }
        for codec, cache in caches.items():
            runs[f"{codec}, decoded"] = lambda cache=cache: cache.read_shard(0)
            runs[f"{codec}, decoded into arrays used before"] = lambda cache=cache: cache.read_shard(0, into=space)
        times = interleaved(runs, device="cpu", rounds=rounds, warmup=1)
        for name in runs:
            floors = {"default, decoded": ">= 0.8"}
            rate = times.time(name).inverse(n / 1e3)
            table.value(name, rate, "M positions/s", floors.get(name, ""), line=name, at={"N": n})
        for name in runs:
            if not name.startswith("plain"):
                other = "plain, into arrays used before" if name.endswith("before") else "plain"
                limit = ">= 0.4" if name.startswith("default, decoded") else ""
                table.ratio(f"{name}: speed", times.ratio(other, name), other, limit, better="higher")
        shuffled(table, data, base, Path(folder) / "many", rounds)
        memory(table, Path(folder) / "many")


def shuffled(table: Table, data: Arrays, base: Arrays, place: Path, rounds: int) -> None:
    """Shards in another order, and sequences in a shuffled order within two shards at a time."""
    shards = 12
    sequences = len(base["sequence_lengths"])
    with create_cache(place, spec_of(data)) as writer:
        for index in range(shards):
            writer.write_shard(index, **base, first_sequence=index * sequences)
        writer.seal()
    cache = open_cache(place)
    n = shards * len(base["ids"])
    space = Workspace()
    generator = np.random.default_rng(0)
    order = generator.permutation(shards).tolist()
    window = 32

    def by_sequence() -> None:
        for start in range(0, shards, 2):
            pair = order[start : start + 2]
            numbers = np.concatenate([np.arange(sequences) + index * sequences for index in pair])
            generator.shuffle(numbers)
            for first in range(0, len(numbers), window):
                cache.sequences(numbers[first : first + window])

    times = interleaved(
        {
            "in order": lambda: [cache.read_shard(i, into=space) and None for i in range(shards)],
            "shuffled shards": lambda: [cache.read_shard(i, into=space) and None for i in order],
            "shuffled sequences": by_sequence,
        },
        device="cpu",
        rounds=rounds,
        warmup=1,
    )
    for name in times:
        limit = "" if name == "in order" else ">= 0.9"
        table.value(name, times.time(name).inverse(n / 1e3), "M positions/s")
        if limit:
            table.ratio(f"{name}: speed", times.ratio("in order", name), "in order", limit, better="higher")


MEMORY = """
import sys
from fastkd.cache import open_cache
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024
cache = open_cache(sys.argv[1])
cache.manifest, cache.shards
if len(sys.argv) < 3:
    import fastkd.cache.encoding.targets, numcodecs.pcodec
    print(peak())
    sys.exit()
arrays = cache.sequences([0])
shard = sum(a.nbytes for a in arrays.values()) / len(arrays["ids"]) * cache.manifest.column("positions")[0].as_py()
del arrays
base = int(sys.argv[2])
total = sum(cache.manifest.column("sequences").to_pylist())
for first in range(0, total, total // 4):
    arrays = cache.sequences(range(first, min(first + 8, total)))
print((peak() - base) / shard)
"""


def memory(table: Table, place: Path) -> None:
    """Memory of a worker that reads sequences, in decoded shards."""
    command = [sys.executable, "-c", MEMORY, str(place)]
    before = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    out = subprocess.run([*command, before], check=True, capture_output=True, text=True).stdout
    table.value(
        "memory of a worker over all shards", float(out), "decoded shards", note="the last shard, and one being decoded"
    )


def opening(table: Table, data: Arrays, rounds: int) -> None:
    """Opening a sealed cache of 100,000 shards, of which only the manifest exists."""
    shards = 100_000
    table.title(f"opening a sealed cache of {shards:,} shards")
    with tempfile.TemporaryDirectory() as folder:
        size = write_records(folder, spec_of(data), records(shards))
        found = open_records(folder, shards, rounds)
    table.value("requests", found.requests, "requests", "<= 2", better="lower")
    table.value("time", found.seconds, "s", "<= 1")
    table.value("memory", found.megabytes, "MB", "<= 200")
    table.value("manifest, a shard", size / shards, "bytes", better="lower")
