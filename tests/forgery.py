"""Typed forgeries of a shard, in a process of limited memory; run by tests/cache/test_forgery.py.

Every array of a shard is replaced by arrays of every type, by shapes and extremes, and every attribute by other values,
with all hashes right. fastkd must refuse the object by name, or read what the plain reader reads; `verify --deep` must
refuse what FORMAT.md does not allow. Prints the counts as JSON.
"""

import json
import random
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plain_reader
from cache_cases import make_shard, unpacked

from fastkd.cache import Cache, CacheError, CacheSpec, Codec, create_cache
from fastkd.cache.shard.container import TYPES, content_hash, pack
from fastkd.cache.stores import MemoryStore

Arrays = dict[str, np.ndarray]
KEY = "shards/0.zarr.zip"
CONTEXTS = Codec(step=0.5, cap=0.5, growth=0.0, contexts=True)
SPECS = {
    "default": CacheSpec(40, 3, temperatures=(1.0, 2.0)),
    "draws": CacheSpec(40, 2, draws=3, codec="portable", temperatures=(1.0,)),
    "contexts": CacheSpec(9, 4, draws=2, codec=CONTEXTS, temperatures=(1.0,)),
    "columns": CacheSpec(40, 3, codec="fast", temperatures=(1.0,), inputs=("example", "weight"), mass=0.5),
}
ATTRIBUTES = (
    "format", "spec", "index", "first_sequence", "sequences", "positions", "counted", "head_entries", "draw_entries",
    "statistics", "content", "attempt", "written", "bytes", "record",
)  # fmt: skip
VALUES = (
    None, True, -1, 0, 1, 2, 23, 24, 25, 2**16, 2**20, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 24.0, 1.5, "", "24",
    "0" * 64, [], [24], {}, {"mass": [1, 2, 3]}, {"sequence_lengths": 2**40}, {"sequence_lengths": -5},
)  # fmt: skip


def shard_of(spec: CacheSpec) -> tuple[dict[str, Any], Arrays]:
    """Attributes and arrays of a shard of 24 positions with everything that the settings allow."""
    shard = make_shard(spec, positions=24, seed=3, sequences=3, uncounted=0.25)
    if "weight" in spec.inputs:
        shard["inputs"]["weight"] = np.linspace(0, 1, 24, dtype=np.float32)
    if spec.settings.contexts:
        shard["inputs"]["tokens"] %= 2
    shard["outcomes"] = np.where(np.arange(24) % 3, spec.vocab_size - 4, spec.vocab_size - 5)
    store = MemoryStore()
    with create_cache(store, spec) as writer:
        writer.write_shard(0, **shard, document_lengths=[10, 14])
    return unpacked(store.get(KEY))


def forged_arrays(name: str, array: np.ndarray, types: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray | None]]:
    """Other arrays in the place of one, each with a word that says how it was made."""
    yield "missing", None
    yield "huge", np.zeros(2**24, array.dtype)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in types:
            dtype = np.dtype(kind)
            same = array.astype(dtype)
            limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype) if dtype.kind in "iu" else None
            low, high = (limits.min, limits.max) if limits else (False, True)
            yield f"{kind}: same", same
            for word, value in (("low", low), ("high", high), ("-1", np.array(-1).astype(dtype)), ("0", 0)):
                yield f"{kind}: all {word}", np.full(array.shape, value, dtype)
                for at in {0, array.size // 2, array.size - 1} if array.size else ():
                    one = same.copy()
                    one.reshape(-1)[at] = value
                    yield f"{kind}: {word} at {at}", one
            if dtype.kind == "f":
                yield f"{kind}: nan", np.full(array.shape, np.nan, dtype)
                yield f"{kind}: -inf", np.full(array.shape, -np.inf, dtype)
            if dtype == array.dtype or kind == "int16":
                yield f"{kind}: more by one", same + dtype.type(1)
                yield f"{kind}: twice", same + same
                yield f"{kind}: reversed", np.ascontiguousarray(same[..., ::-1])
                yield f"{kind}: rolled", np.roll(same, 1, -1)
            yield f"{kind}: shorter", same[..., :-1]
            yield f"{kind}: longer", np.concatenate([same, same[..., :1]], axis=-1)
            yield f"{kind}: empty", same[..., :0]
            yield f"{kind}: other dimensions", same.reshape(-1) if same.ndim == 2 else same.reshape(1, -1)


def cases(spec: CacheSpec) -> Iterator[tuple[str, dict[str, Any], Arrays]]:
    """What was forged, and the attributes and arrays of the forged object."""
    attributes, arrays = shard_of(spec)
    yield "nothing", attributes, arrays
    for name in ATTRIBUTES:
        for value in VALUES:
            yield f"attribute {name} = {value!r}", attributes | {name: value}, arrays
        yield f"no attribute {name}", {n: v for n, v in attributes.items() if n != name}, arrays
    extra = {f"head/context_{name}": np.zeros(1, np.uint16) for name in ("tokens", "counts", "values")}
    for name, array in (extra | arrays).items():
        for word, other in forged_arrays(name, array, TYPES):
            yield f"{name}: {word}", attributes, {n: a for n, a in (arrays | {name: other}).items() if a is not None}


def outcome(spec: CacheSpec, attributes: dict[str, Any], arrays: Arrays) -> str:
    """ "read" or "refused". Raises AssertionError, or whatever fastkd raised that is no CacheError."""
    data = pack(arrays, attributes, spec.settings, 24)
    store = MemoryStore()
    store.create("spec.json", spec.to_json())
    store.create(KEY, data)
    cache = Cache(store, spec, None)
    report = cache.verify(deep=True)
    for call in (cache.attributes, cache.sequence_lengths):
        try:
            call(0)
        except CacheError as error:
            assert "shard 0" in str(error)
    try:
        found = cache.read_shard(0)
    except CacheError as error:
        assert "shard 0" in str(error)
        assert not report.ok, "refused, but verify --deep found nothing"
        return "refused"
    expected = plain_reader.decode(json.loads(spec.to_json())["spec"], attributes, arrays)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    if report.ok:
        plain_reader.check_values(asdict(spec), expected)
    return "read" if report.ok else "read, and refused by verify --deep"


def memory(word: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(word))
    return 1024 * int(line.split()[1])


def main(name: str, sample: str) -> None:
    """sample: how many cases of the spec `name` are tried, "all" or a number."""
    spec, counts, failures = SPECS[name], dict[str, int](), list[str]()
    outcome(spec, *shard_of(spec))  # everything is imported
    limit = memory("VmSize") + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = memory("VmHWM")
    chosen = list(range(sum(1 for _ in cases(spec))))
    if sample != "all":
        chosen = random.Random(0).sample(chosen, int(sample))
    wanted = {0, *chosen}
    for number, (what, attributes, arrays) in enumerate(cases(spec)):
        if number not in wanted:
            continue
        print(what, file=sys.stderr, flush=True)  # the last line says what the process died of
        attributes = dict(attributes)
        if attributes.get("content") == shard_content(spec):
            attributes["content"] = content_hash(arrays)
        try:
            result = outcome(spec, attributes, arrays)
        except Exception as error:
            failures.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
            continue
        counts[result] = counts.get(result, 0) + 1
    print(json.dumps({"counts": counts, "failures": failures, "grown": memory("VmHWM") - before}))


def run_script(script: str, name: str, sample: str) -> dict[str, int]:
    """Run this script, or another one like it, in a process of its own; how many cases had which result."""
    done = subprocess.run([sys.executable, "-W", "ignore", script, name, sample], capture_output=True, text=True)
    assert done.returncode == 0, f"died of {done.stderr.splitlines()[-1:]}"
    report = json.loads(done.stdout)
    assert not report["failures"], "\n".join(report["failures"][:20])
    assert report["grown"] < 2**29, "memory"
    counts: dict[str, int] = report["counts"]
    assert counts["refused"] > counts["read"] > 0
    return counts


_contents: dict[str, str] = {}


def shard_content(spec: CacheSpec) -> str:
    """The hash of the arrays of `shard_of`."""
    if spec.hash not in _contents:
        _contents[spec.hash] = content_hash(shard_of(spec)[1])
    return _contents[spec.hash]


if __name__ == "__main__":
    main(*sys.argv[1:])
