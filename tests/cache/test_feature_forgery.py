"""Shards of features that somebody made up, under right hashes: refused by name, or read as the plain reader reads."""

from collections.abc import Callable

import feature_forgery
import numpy as np
import pytest
from feature_cases import make_base, make_feature_spec
from feature_forgery import SPECS, Arrays, prepared
from forgery import run_script

from fastkd.cache import Basis, CorruptShard, open_cache
from fastkd.cache.shard.container import content_hash, pack
from fastkd.cache.stores import MemoryStore


@pytest.mark.parametrize("name", ["map"])
def test_typed_forgeries_of_features(name: str) -> None:
    assert sum(run_script(feature_forgery.__file__, name, "100").values()) >= 100


@pytest.mark.soak
@pytest.mark.parametrize("name", SPECS)
def test_every_typed_forgery_of_features(name: str) -> None:
    assert sum(run_script(feature_forgery.__file__, name, "all").values()) > 1000


def forged(name: str, changes: Callable[[Arrays], Arrays]) -> tuple[MemoryStore, str]:
    """A cache with a feature whose shard has other arrays, under right hashes; and the feature's name."""
    store, key, attributes, arrays = prepared(name)
    feature = next(iter(open_cache(store).features.values()))
    arrays = arrays | changes(arrays)
    store.delete(key)
    store.create(key, pack(arrays, attributes | {"content": content_hash(arrays)}, feature.spec, 60))
    return store, feature.name


def put(array: np.ndarray, at: object, value: float) -> np.ndarray:
    changed = array.copy()
    changed[at] = value
    return changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            lambda a: {"exact_rows": put(a["exact_rows"], 0, 120)},
            r'"exact_rows": got rows up to 125; expected .* below 120',
        ),
        (lambda a: {"rows": put(a["rows"], 0, 31)}, r'"rows": got rows up to 89; expected .* below 60'),
        (lambda a: {"rows": put(a["rows"], 3, 2**32 - 1)}, '"rows": got rows up to'),
        (lambda a: {"scale": put(a["scale"], 5, np.inf)}, '"scale": got NaN or an infinity'),
        (lambda a: {"exact": put(a["exact"], (0, 1), np.nan)}, '"exact": got NaN or an infinity'),
    ],
)
def test_numbers_outside_their_range(changes: Callable[[Arrays], Arrays], message: str) -> None:
    store, name = forged("map", changes)
    feature = open_cache(store).features[name]
    with pytest.raises(CorruptShard, match=message):
        feature.read_shard(0)
    assert feature.verify()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda a: {"codes": put(a["codes"], (0, 4 * 3 + 1), -(2**15))}, "got numbers below -32767"),
        (lambda a: {"codes": put(a["codes"], (0, 2), 1)}, "got numbers other than 0 in exact rows"),
        (lambda a: {"codes": put(a["codes"], (0, 7), 1)}, "beyond the last component"),
        (lambda a: {"scale": put(a["scale"], 0, 1)}, "other than 0 in exact rows"),
        (lambda a: {"scale": put(a["scale"], 0, -0.0)}, "or negative ones"),
        (lambda a: {"scale": put(a["scale"], 3, 0)}, "that only exact rows have"),
        (lambda a: {"scale": put(a["scale"], 3, 3e4)}, "that only exact rows have"),
        (lambda a: {"scale": put(a["scale"], 3, -10)}, "or negative ones"),
    ],
)
def test_verify_deep_finds_features_that_no_writer_writes(changes: Callable[[Arrays], Arrays], message: str) -> None:
    store, name = forged("map", changes)
    cache = open_cache(store)
    assert np.isfinite(cache.features[name].read_shard(0)).any()
    assert cache.verify(deep=False).ok
    assert [(p.feature, p.shard, message in p.what) for p in cache.verify().problems] == [(name, 0, True)]


def test_verify_deep_finds_a_basis_that_is_not_orthonormal() -> None:
    store = MemoryStore()
    base = make_base(store, 1)
    basis = Basis(np.zeros(3), np.eye(3) * 1.01, 1.0)
    spec = make_feature_spec(base, basis)
    store.create(f"{spec.folder}basis.zarr.zip", basis.to_bytes())
    store.create(f"{spec.folder}spec.json", spec.to_json())
    assert open_cache(store).verify(deep=False).ok
    assert "not orthonormal" in str(open_cache(store).verify().problems[0])
