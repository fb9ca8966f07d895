"""Window plans for ten million documents, with targets of 60 seconds and 1 GB; each figure from a separate process.

    python bench/bench_plan.py            # --documents 10000000

The first part plans from given lengths (about 600 tokens a document). The second opens, hashes, measures and plans a
Parquet file of ids (about 64 tokens a document, 2.6 GB in a temporary folder), and then reads shards.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from fastkd.bench.run import run_cases, to_stderr
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table

VOCAB = 49152

CHILD = """
import json, sys, time
import numpy as np
from fastkd.data.documents import open_documents
from fastkd.capture.window_plan import WindowPlanSettings, make_window_plan
from fastkd.capture.rows import read_shard_rows
place, settings = sys.argv[1], json.loads(sys.argv[2])
figures = {}
def timed(name, run):
    start = time.perf_counter()
    result = run()
    figures[name] = time.perf_counter() - start
    return result
if place.endswith(".npy"):
    fingerprint, lengths = "none", np.load(place)
else:
    documents = timed("opened", lambda: open_documents(place, vocab_size=49152))
    fingerprint = timed("hashed", documents.fingerprint)
    lengths = timed("measured", documents.lengths)
plan = timed("planned", lambda: make_window_plan(lengths, WindowPlanSettings(**settings), fingerprint))
timed("written", plan.to_json)
figures["all"] = sum(figures.values())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
figures["GB"] = int(peak.split()[1]) * 1024 / 1e9
figures["fill"] = plan.totals["positions"] / plan.windows / plan.settings.context
figures["windows"], figures["shards"] = plan.windows, plan.shards
if not place.endswith(".npy"):
    train, held_out = range(0, plan.train_shards, max(1, plan.train_shards // 4)), range(plan.train_shards, plan.shards)
    for name, some in (("train", train), ("held out", held_out[:2])):
        read = timed(name, lambda: sum(len(read_shard_rows(plan, documents, i)) for i in some))
        figures[name] = read / figures[name] / 1e6
print(json.dumps(figures))
"""


def lengths_of(documents: int, mean: float) -> NDArray[np.int32]:
    """Lognormal lengths, like those of web text; one in a thousand is empty."""
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(np.log(mean) - 0.5, 1.0, documents), 1e6).astype(np.int32)
    lengths[::1000] = 0
    return lengths


def write_parquet(path: Path, lengths: NDArray[np.int32]) -> None:
    """A file of random ids, in row groups of 100,000 documents."""
    generator = np.random.default_rng(1)
    schema = pa.schema([("input_ids", pa.list_(pa.uint16()))])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in tqdm(range(0, len(lengths), 100_000), desc="documents", leave=False, disable=None):
            some = lengths[start : start + 100_000]
            offsets = np.concatenate([[0], np.cumsum(some)]).astype(np.int32)
            ids = generator.integers(0, VOCAB, int(offsets[-1]), np.uint16)
            writer.write_table(pa.table([pa.ListArray.from_arrays(offsets, ids)], schema=schema))


def figures(place: Path, **settings: object) -> dict[str, float]:
    """The figures of a fresh process."""
    command = [sys.executable, "-c", CHILD, str(place), json.dumps(settings)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def report(table: Table, name: str, found: dict[str, float]) -> None:
    """The rows of one run."""
    for part in ("opened", "hashed", "measured", "planned"):
        if part in found:
            table.value(f"{name}: {part}", found[part], "s")
    table.value(f"{name}: in all", found["all"], "s", "<= 60")
    table.value(f"{name}: peak memory", found["GB"], "GB", "<= 1", note="the interpreter and its libraries included")
    table.value(f"{name}: the windows' places in use", found["fill"], "share", better="higher")


def from_lengths(table: Table, documents: int) -> None:
    """Plans from given lengths."""
    table.title(f"{documents:,} documents of some 600 tokens, from their lengths")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "lengths.npy"
        np.save(place, lengths_of(documents, 600))
        kinds: dict[str, dict[str, object]] = {
            "pack, context 2048": {"context": 2048, "overlap": 64},
            "pack, context 512": {"context": 512, "overlap": 64},
            "pack, context 131072": {"context": 131072},
            "keep, context 2048": {"context": 2048, "packing": "keep"},
        }
        for name, settings in kinds.items():
            report(table, name, figures(place, held_out=0.01, **settings))


def from_parquet(table: Table, documents: int) -> None:
    """Plans from a file, and reads of its shards."""
    table.title(f"{documents:,} documents of some 64 tokens, from a Parquet file")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "ids.parquet"
        start = time.perf_counter()
        write_parquet(place, lengths_of(documents, 64))
        print(f"  (made in {time.perf_counter() - start:.0f} s, {place.stat().st_size / 1e9:.2f} GB)")
        found = figures(place, context=2048, held_out=0.01)
    report(table, "Parquet", found)
    for split in ("train", "held out"):
        table.value(f"Parquet: rows of {split} shards", found[split], "M positions/s")


def sections(documents: int) -> list[Case]:
    """Both parts."""
    return [
        Case("from lengths", partial(from_lengths, documents=documents)),
        Case("from Parquet", partial(from_parquet, documents=documents)),
    ]


def cases(ask: RunConfig) -> Sequence[Case]:
    """300,000 documents; full: ten million."""
    return sections(ask.size(300_000, 10_000_000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    table = Table("cpu", "plan")
    run_cases(sections(args.documents), table, to_stderr)
    table.save(args.json)


if __name__ == "__main__":
    main()
