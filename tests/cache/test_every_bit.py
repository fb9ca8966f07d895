"""Every bit of every object of a small cache, flipped: noticed, or the same data."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from cache_cases import make_shard, make_spec

from fastkd.cache import Cache, CacheError, create_cache, open_cache, verify_cache
from fastkd.cache.capture_plan import CapturePlan, read_capture_plan
from fastkd.cache.provenance import Identity, Provenance
from fastkd.cache.stores import MemoryStore
from fastkd.capture.prepare import lengths_from_npz, lengths_to_npz
from fastkd.errors import DataError

DATASET, PLAN = "d" * 64, "a" * 64
SHARD = "shards/0.zarr.zip"


SOURCE = Provenance(Identity.of("a teacher"), dataset_sha256=DATASET, plan_sha256=PLAN, draw_seed=7)
SPEC = make_spec(vocab_size=20, k=2, draws=1, shard_positions=64, notes="of a test", **SOURCE.texts())


def made() -> dict[str, bytes]:
    """The objects of a sealed cache of one shard, with its plan and the lengths of its documents."""
    store = MemoryStore()
    settings = {"context": 8, "seed": 7, "shard_positions": 64, "held_out": 0.5}
    totals = {"documents": 2, "windows": 2, "shards": 1, "positions": 12, "tokens": 12}
    with create_cache(store, SPEC) as writer:
        store.create("plan.json", CapturePlan(settings, DATASET, totals, 1, PLAN).to_json())
        store.create("lengths.npz", lengths_to_npz(np.array([5, 7], np.int32), DATASET))
        writer.write_shard(0, **make_shard(SPEC, positions=12, sequences=2), document_lengths=[5, 7])
        writer.seal()
    return {entry.key: store.get(entry.key) for entry in store.list("")}


def contents(store: MemoryStore) -> dict[str, Any]:
    """All that is read from the objects."""
    cache = open_cache(store)
    lengths = lengths_from_npz(store.get("lengths.npz"), DATASET, "lengths.npz")
    assert lengths is not None, "of another data set"
    return {
        "spec": cache.spec.hash,
        "provenance": cache.spec.provenance,
        "manifest": cache.manifest.to_pylist(),
        "shard": {name: array.tobytes() for name, array in cache.read_shard(0).items()},
        "attributes": cache.attributes(0),
        "sequence lengths": cache.sequence_lengths(0).tolist(),
        "plan": read_capture_plan(store),
        "lengths": lengths.tolist(),
    }


def read_shard(store: MemoryStore) -> Any:
    """A shard as that of a cache that is not sealed: its own hash alone must do."""
    cache = Cache(store, SPEC, None)
    return cache.read_shard(0)["ids"].tobytes(), cache.attributes(0), cache.sequence_lengths(0).tolist()


# What is enough to notice a flip in an object: reading it, without the others.
READERS: dict[str, Callable[[MemoryStore], Any]] = {
    "spec.json": lambda store: (open_cache(store).spec.hash, open_cache(store).spec.provenance),
    "manifest.parquet": lambda store: open_cache(store).manifest.to_pylist(),
    "plan.json": read_capture_plan,
    "lengths.npz": lambda store: contents(store)["lengths"],
    SHARD: read_shard,
}


def flipped(objects: dict[str, bytes], key: str, bits: Iterable[int]) -> tuple[int, int]:
    """How many flips were noticed, and how many changed nothing. AssertionError for any that changed data silently."""
    whole = MemoryStore()
    for name, data in objects.items():
        whole.create(name, data)
    read = READERS[key]
    truth = read(whole)
    noticed = harmless = 0
    for bit in bits:
        data = bytearray(objects[key])
        data[bit // 8] ^= 1 << bit % 8
        whole._objects[key] = bytes(data)
        try:
            found = read(whole)
        except (CacheError, DataError, AssertionError):
            noticed += 1
            continue
        assert found == truth, f"{key}: bit {bit} changed data, and nobody noticed"
        harmless += 1
    whole._objects[key] = objects[key]
    assert contents(whole)
    assert verify_cache(whole).ok
    return noticed, harmless


@pytest.fixture(scope="module")
def objects() -> dict[str, bytes]:
    return made()


@pytest.mark.parametrize("key", READERS)
def test_a_sample_of_all_bits(objects: dict[str, bytes], key: str) -> None:
    """Every 29th, or 97th, so that all places in a byte and all fields come up."""
    noticed, harmless = flipped(objects, key, range(0, 8 * len(objects[key]), 97 if "manifest" in key else 29))
    assert noticed > 10 * harmless if key == SHARD else noticed > harmless


@pytest.mark.soak
@pytest.mark.parametrize("key", READERS)
def test_all_bits(objects: dict[str, bytes], key: str) -> None:
    noticed, harmless = flipped(objects, key, range(8 * len(objects[key])))
    assert noticed + harmless == 8 * len(objects[key])
    assert harmless == 0 if key == SHARD else noticed > harmless
