"""Typed forgeries of a shard of a feature, in a process of limited memory; run by tests/cache/test_feature_forgery.py.

As forgery.py: every array is replaced by arrays of every type, by shapes and extremes, every attribute by other values,
with all hashes right. fastkd must refuse the object by name, or read what the plain reader reads; `verify --deep` must
refuse what no writer writes. Prints the counts as JSON.
"""

import json
import random
import resource
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import plain_reader
from cache_cases import unpacked
from feature_cases import STEP, make_base, make_feature_spec, make_states
from forgery import VALUES, forged_arrays, memory

from fastkd.cache import Basis, CacheError, create_feature, encode_hidden, open_cache
from fastkd.cache.shard.container import TYPES, content_hash, pack
from fastkd.cache.stores import MemoryStore

Arrays = dict[str, np.ndarray]
MAP: dict[str, Any] = {"kind": "map", "layer": None, "layers": None, "shape": (3, 2, 2), "positions": "0.5"}
SPECS: dict[str, dict[str, Any]] = {
    "state": {},
    "map": MAP | {"name": "layers.3", "dtype": "float16"},
    "some": {"positions": "counted", "dtype": "float32", "name": "-1", "layer": 30},
}
ATTRIBUTES = (
    "format", "spec", "index", "base", "positions", "vectors", "exact", "content", "attempt", "written", "bytes",
    "record",
)  # fmt: skip


def prepared(name: str) -> tuple[MemoryStore, str, dict[str, Any], Arrays]:
    """A cache with a feature: its store, the key of shard 0, and that shard's attributes and arrays."""
    store = MemoryStore()
    base = make_base(store, 1)
    settings = SPECS[name]
    width = settings.get("shape", (5,))[0]
    dtype = settings.get("dtype", "bfloat16")
    basis = Basis.learn(make_states(9, 300, width, dtype))
    spec = make_feature_spec(base, basis, **settings)
    rows = None if spec.positions == "all" else np.arange(0, 60 * spec.vectors).reshape(60, -1)[::2].ravel()
    vectors = make_states(1, 60 if rows is None else len(rows), width, dtype)
    with create_feature(store, spec, basis) as writer:
        writer.write_shard(0, encode_hidden(vectors, basis, STEP), rows)
    key = f"{spec.folder}shards/0.zarr.zip"
    return store, key, *unpacked(store.get(key))


def cases(attributes: dict[str, Any], arrays: Arrays) -> Iterator[tuple[str, dict[str, Any], Arrays]]:
    """What was forged, and the attributes and arrays of the forged object."""
    yield "nothing", attributes, arrays
    for name in ATTRIBUTES:
        for value in (*VALUES, 59, 60, 61, 119, 120, 121, 2**28, 2**28 + 1):
            yield f"attribute {name} = {value!r}", attributes | {name: value}, arrays
        yield f"no attribute {name}", {n: v for n, v in attributes.items() if n != name}, arrays
    extra = {} if "rows" in arrays else {"rows": np.arange(3, dtype=np.uint32)}
    for name, array in (extra | arrays).items():
        for word, other in forged_arrays(name, array, TYPES):
            yield f"{name}: {word}", attributes, {n: a for n, a in (arrays | {name: other}).items() if a is not None}


def outcome(store: MemoryStore, key: str, attributes: dict[str, Any], arrays: Arrays) -> str:
    """ "read" or "refused". Raises AssertionError, or whatever fastkd raised that is no CacheError."""
    cache = open_cache(store)
    feature = next(iter(cache.features.values()))
    spec = json.loads(feature.spec.to_json())["spec"]
    store.delete(key)
    store.create(key, pack(arrays, attributes, feature.spec, 60, {"codes": 60}))
    problems = feature.verify(deep=True)
    try:
        found = feature.read_codes(0)
        states = feature.read_shard(0)
    except CacheError as error:
        assert "shard 0" in str(error)
        assert problems, "refused, but verify --deep found nothing"
        return "refused"
    basis = {"mean": feature.basis.mean, "basis": feature.basis.basis, "scale": np.array([feature.basis.scale])}
    expected = plain_reader.decode_feature(spec, basis, attributes, arrays)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    plain = states.reshape(60, feature.spec.width, -1).swapaxes(1, 2).reshape(-1, feature.spec.width)
    tolerance = 1e-5 * max(1.0, float(np.abs(expected["states"]).max(initial=0)))
    np.testing.assert_allclose(plain[expected["rows"]], expected["states"], atol=tolerance, rtol=1e-4)
    assert np.isnan(np.delete(plain, expected["rows"], 0)).all()
    if not problems:
        plain_reader.check_feature_values(spec, basis, arrays, expected)
    return "read, and refused by verify --deep" if problems else "read"


def main(name: str, sample: str) -> None:
    """sample: how many cases of the spec `name` are tried, "all" or a number."""
    store, key, attributes, arrays = prepared(name)
    counts, failures = dict[str, int](), list[str]()
    outcome(store, key, attributes, arrays)  # everything is imported
    limit = memory("VmSize") + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, content = memory("VmHWM"), content_hash(arrays)
    chosen = list(range(sum(1 for _ in cases(attributes, arrays))))
    wanted = {0, *(chosen if sample == "all" else random.Random(0).sample(chosen, int(sample)))}
    for number, (what, forged, others) in enumerate(cases(attributes, arrays)):
        if number not in wanted:
            continue
        print(what, file=sys.stderr, flush=True)  # the last line says what the process died of
        own = forged | ({"content": content_hash(others)} if forged.get("content") == content else {})
        try:
            result = outcome(store, key, own, others)
        except Exception as error:
            failures.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
            continue
        counts[result] = counts.get(result, 0) + 1
    print(json.dumps({"counts": counts, "failures": failures, "grown": memory("VmHWM") - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
