"""A cache of 10^12 positions, with a manifest and no shards: opening it, and the order of an epoch.

fastkd bench scale [--full]
python bench/bench_scale.py
"""

import argparse
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fastkd.bench.records import POSITIONS, SEQUENCES, opening, records, write_records
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import figure
from fastkd.cache import CacheSpec
from fastkd.stream.epoch_order import order

ALL = 10**12  # positions
SHARDS_OPEN = 8


def bench_manifest(table: Table, positions: int, rounds: int) -> None:
    """Sealing and opening."""
    shards = -(-positions // POSITIONS)
    table.title(f"the manifest of {positions:,} positions: {shards:,} shards of {POSITIONS:,}")
    at = {"positions": float(positions)}
    spec = CacheSpec(vocab_size=49_152, k=48, draws=16, teacher="records alone")
    rows = records(shards)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        size = write_records(folder, spec, rows)
        table.value("written, of records at hand", time.perf_counter() - begun, "s", line="written", at=at)
        found = opening(folder, shards, rounds)
    table.value("manifest", size / 1e6, "MB", line="manifest", at=at, better="lower")
    table.value("opened: requests", found.requests, "requests", "<= 2", better="lower")
    table.value("opened: time", found.seconds, "s", line="opened", at=at)
    table.value("opened: memory", found.megabytes, "MB", line="opened", at=at)


def bench_order(table: Table, positions: int, places: int) -> None:
    """Beginning an epoch, and taking steps at random positions of it, as a loader that resumes does."""
    shards = -(-positions // POSITIONS)
    sequences = np.full(shards, SEQUENCES, np.int64)
    table.title(f"the order of {positions:,} positions: {shards * SEQUENCES:,} sequences, {SHARDS_OPEN} shards open")
    at = {"positions": float(positions)}
    tracemalloc.start()
    begun = time.perf_counter()
    epoch = order(sequences, seed=0, epoch=1, shards_open=SHARDS_OPEN)
    seconds = time.perf_counter() - begun
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    table.value("an epoch begun", seconds, "s", line="begun", at=at)
    table.value("memory of it, at most", peak / 1e6, "MB", line="begun", at=at)
    far, near = [], []
    starts = np.random.default_rng(0).integers(0, len(epoch) - 2 * SEQUENCES, places)
    for start in starts.tolist():
        begun = time.perf_counter()
        first = epoch.take(start, start + SEQUENCES)
        middle = time.perf_counter()
        second = epoch.take(start + SEQUENCES, start + 2 * SEQUENCES)
        far.append((middle - begun) * 1e3)
        near.append((time.perf_counter() - middle) * 1e3)
        taken = np.concatenate([first.shard, second.shard]) * SEQUENCES + np.concatenate(
            [first.sequence, second.sequence]
        )
        if len(np.unique(taken)) != 2 * SEQUENCES:
            raise AssertionError(f"the order repeats a sequence after place {start}")
    table.value(f"a step of {SEQUENCES} sequences, at a random place", figure(far), "ms", line="a step", at=at)
    table.value("the step behind it", figure(near), "ms")
    read = np.sort(epoch.shards)
    if not np.array_equal(read, np.arange(shards)):
        raise AssertionError("the order does not read every shard once")


def cases(ask: RunConfig) -> Sequence[Case]:
    """A case for each size, the largest last."""
    found = []
    for positions in ask.size((10**10, ALL), (10**9, 10**10, 10**11, ALL)):
        name = f"10^{len(str(positions)) - 1} positions"
        found.append(Case(f"manifest, {name}", partial(bench_manifest, positions=positions, rounds=ask.times(1, 3))))
        found.append(Case(f"order, {name}", partial(bench_order, positions=positions, places=ask.size(20, 200))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    table = Table("cpu", "scale")
    run_cases(cases(RunConfig("cpu", full=True)), table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
