"""The cache against other formats of the same targets: bytes, error, reading and writing.

    fastkd bench formats                  # makes 32 windows of real targets first, unless they exist
    python bench/bench_formats.py         # with all targets: see make_targets.py

Times are of one core, from arrays to a file and back. fastkd's files also hold the tail at four temperatures, the
tokens, and hashes of everything; the other files hold only the entries.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastkd.bench.bench_cache import kl
from fastkd.bench.cache_targets import (
    TARGETS,
    Arrays,
    load,
    one_core,
    shard_of,
    spec_of,
    targets,
)
from fastkd.bench.formats import (
    DRAWS,
    FiveBytes,
    Format,
    Parquet,
    Polynomial,
    Sampled,
    Zarr,
)
from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.bench.timing import Run, interleaved
from fastkd.cache import Workspace, create_cache, open_cache

Array = NDArray[Any]
OURS = "fastkd, default"
OTHERS: dict[str, Format] = {
    "int32 and float16, Parquet": Parquet(),
    "int32 and float16, Zarr": Zarr(),
    "five bytes an entry": FiveBytes(),
    "17-bit ids and a polynomial": Polynomial(),
}
CODECS = ("fast", "default", "smallest")


def samples(hybrid: Arrays, seed: int = 0) -> tuple[Array, Array]:
    """DRAWS tokens per row from the whole distribution, equal ones merged: ids and counts `[n, DRAWS]`, entries first.

    A draw in the tail is one of the tokens drawn from it before. hybrid: targets with top-k entries and draws.
    """
    random = np.random.default_rng(seed)
    head = hybrid["draws"] == 0
    weight = np.where(head, np.exp(hybrid["logprobs"]), 0.0)
    tail = np.where(head, 0, hybrid["draws"]).astype(np.float64)
    total = np.maximum(tail.sum(1, keepdims=True), 1)
    weight += tail / total * np.maximum(1 - weight.sum(1, keepdims=True), 0)
    ends = weight.cumsum(1)
    at = (random.random((len(ends), DRAWS, 1)) * ends[:, None, -1:] >= ends[:, None, :]).sum(2)
    counts = np.zeros(weight.shape, np.int64)
    np.add.at(counts, (np.arange(len(ends))[:, None], at), 1)
    by = np.argsort(-counts, axis=1, kind="stable")[:, :DRAWS]
    return np.take_along_axis(hybrid["ids"], by, 1), np.take_along_axis(counts, by, 1)


def with_rest(ids: Array, logprobs: Array) -> Arrays:
    """Entries, and the rest of the probability as their tail at T = 1, for a format that stores none."""
    rest = np.maximum(1 - np.exp(logprobs.astype(np.float64)).sum(1, keepdims=True), 1e-9)
    return {"ids": ids, "logprobs": logprobs, "tail": np.log(rest)}


def bench(table: Table, ask: RunConfig, data: Callable[[], Arrays], rounds: int) -> None:
    """Every format with the same 64 entries per position; the sampled format with its own."""
    one_core()
    found = data()
    shard, hybrid = shard_of(found, "top64"), shard_of(found, "hybrid")
    ids, logprobs = shard["ids"].astype(np.int32), shard["logprobs"]
    n = len(ids)
    table.title(f"{n} positions of SmolLM2-135M over English prose, 64 entries each")
    drawn = samples(hybrid)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        writes: dict[str, Run] = {}
        reads: dict[str, Run] = {}
        for codec in CODECS:
            name, place = f"fastkd, {codec}", root / codec
            writes[name] = partial(_write, place, shard, spec_of(found, codec=codec))
        for name, other in OTHERS.items():
            writes[name] = partial(other.write, root / name, ids, logprobs)
            reads[name] = partial(other.read, root / name)
        sampled = f"{DRAWS} draws, 24 bits an entry"
        writes[sampled] = partial(Sampled().write, root / sampled, *drawn)
        reads[sampled] = partial(Sampled().read, root / sampled)
        written = interleaved(writes, device="cpu", rounds=rounds, warmup=1)
        space = Workspace()
        for codec in CODECS:
            cache = open_cache(root / codec)
            reads[f"fastkd, {codec}"] = lambda cache=cache: cache.read_shard(0, into=space)  # type: ignore[misc]
        read = interleaved(reads, device="cpu", rounds=rounds, warmup=1)
        for name in writes:
            place = root / (name.removeprefix("fastkd, "))
            files = [p for p in place.rglob("*") if p.is_file()] if place.is_dir() else [place]
            size = sum(p.stat().st_size for p in files) / n
            ours = name.startswith("fastkd")
            table.value(f"{name}: bytes a position", size, "bytes", better="lower" if ours else "")
            if name == sampled:
                note = f"{(drawn[1] > 0).sum(1).mean():.1f} entries per row; unbiased, so no error per row"
                table.absent(f"{name}: KL at T=1", note)
            else:
                back = open_cache(place).read_shard(0) if ours else with_rest(*OTHERS[name].read(place))
                error = float(kl(shard, back, 1.0).mean())
                table.value(f"{name}: KL at T=1, mean", error * 1e4, "1e-4 nats", better="lower" if ours else "")
        for what, times in (("written", written), ("read", read)):
            for name in writes:
                table.value(f"{name}: {what}", times.time(name).inverse(n / 1e3), "M positions/s")
                if name != OURS:
                    table.ratio(f"{what}: {OURS}, speed against {name}", times.ratio(name, OURS), name, better="higher")


def _write(place: Path, shard: Arrays, spec: Any) -> None:
    if place.exists():
        shutil.rmtree(place)
    with create_cache(place, spec) as writer:
        writer.write_shard(0, **shard)
        writer.seal()


def cases(ask: RunConfig) -> Sequence[Case]:
    """One case, in which all formats alternate."""
    run = partial(bench, ask=ask, data=partial(targets, ask), rounds=ask.times(3, 9))
    return [Case("formats", run)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=Path, default=TARGETS)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    table = Table("cpu", "formats")
    ask = RunConfig("cpu", full=True)
    run = partial(bench, ask=ask, data=partial(load, args.targets), rounds=9)
    run_cases([Case("formats", run)], table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
