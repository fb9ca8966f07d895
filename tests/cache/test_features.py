"""Features: what goes in comes out, in all shapes; settings, names, bindings, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_cases import POSITIONS, STEP, WIDTH, make_base, make_basis, make_feature_spec, make_states, write_feature

from fastkd.cache import (
    Basis,
    CacheError,
    Commit,
    CorruptShard,
    FeatureSpec,
    Workspace,
    create_feature,
    decode_coordinates,
    decode_states,
    drop_feature,
    encode_hidden,
    open_cache,
    share_basis,
    verify_cache,
)
from fastkd.cache.features.seal import seal_features
from fastkd.cache.stores.base import Entry, Names
from fastkd.cache.stores.memory import MemoryStore


def reference(x_MW: np.ndarray, basis: Basis, step: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, coordinates and states by the formulas of FORMAT.md, in float64, for vectors that are not exact."""
    s = np.sqrt((x_MW.astype(np.float64) ** 2).mean(1)).astype(np.float16).astype(np.float64)
    mean, vectors = basis.mean.astype(np.float64), basis.basis.astype(np.float64)
    codes = np.rint((x_MW / s[:, None] - mean) @ vectors / step)
    z = codes * step + mean @ vectors
    return codes, z, s[:, None] * (z @ vectors.T)


def test_the_codec_follows_its_formulas() -> None:
    basis, x = make_basis(), make_states(1)
    coded = encode_hidden(x, basis, STEP)
    codes, z, states = reference(x, basis, STEP)
    assert coded["exact_rows"].tolist() == [0]
    assert np.array_equal(coded["exact"], x[:1])
    assert not coded["codes"][0].any()
    assert np.array_equal(coded["codes"][1:], codes[1:])
    found_z, found = decode_coordinates(coded, basis, STEP), decode_states(coded, basis, STEP)
    assert np.abs(found_z[1:] - z[1:]).max() < 1e-5
    assert np.abs(found[1:] - states[1:]).max() < 1e-4
    assert np.array_equal(found[0], x[0])
    exact = x[0].astype(np.float64)
    assert np.abs(found_z[0] - exact / np.sqrt((exact**2).mean()) @ basis.basis).max() < 1e-5
    error = (found - x)[1:] / coded["scale"][1:, None]
    assert np.sqrt((error**2).mean()) == pytest.approx(STEP / np.sqrt(12), rel=0.1)


def test_vectors_that_are_kept_exactly() -> None:
    basis = make_basis()
    x = make_states(1, 8, dtype="float32")
    x[1] = 0
    x[2] *= basis.scale * 8.1 / np.sqrt((x[2] ** 2).mean())
    x[3] *= basis.scale / 8.1 / np.sqrt((x[3] ** 2).mean())
    x[4] *= 1e30
    coded = encode_hidden(x, basis, STEP)
    assert coded["exact_rows"].tolist() == [0, 1, 2, 3, 4]
    assert np.isfinite(decode_coordinates(coded, basis, STEP)).all()
    assert np.array_equal(decode_states(coded, basis, STEP)[:5], x[:5])
    assert encode_hidden(x, basis, 1e-4)["exact_rows"].tolist() == [0, 1, 2, 3, 4]
    fine = Basis(basis.mean, basis.basis, basis.scale)
    assert len(encode_hidden(x[5:] + 0, fine, 1e-5)["exact_rows"]) == 3, "codes beyond int16"


def test_the_basis() -> None:
    basis = make_basis()
    basis.check_orthonormal()
    r = make_states(99, 800)
    r /= np.sqrt((r.astype(np.float64) ** 2).mean(1))[:, None]
    z = (r - basis.mean) @ basis.basis
    variance = z[1:].var(0)
    assert (np.diff(variance) <= 1e-6).all(), "components fall"
    assert np.abs(np.corrcoef(z[1:].T) - np.eye(WIDTH)).max() < 0.05
    again = Basis.from_bytes(basis.to_bytes())
    assert again.sha256 == basis.sha256 == make_basis().sha256
    few = Basis.learn(make_states(3, 4))
    few.check_orthonormal()
    Basis.learn(np.zeros((5, 3), np.float32)).check_orthonormal()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("seal", [True, False])
def test_states_in_and_out(tmp_path: Path, dtype: str, seal: bool) -> None:
    base = make_base(tmp_path, seal=seal)
    spec = write_feature(tmp_path, base, seal=seal, dtype=dtype)
    cache = open_cache(tmp_path)
    assert list(cache.features) == ["20"]
    feature = cache.features["20"]
    assert (feature.spec, feature.name, feature.shards, feature.sealed) == (spec, "20", [0, 1, 2], seal)
    assert feature.block is None
    into = Workspace()
    for i in range(3):
        x, coded = make_states(i, dtype=dtype), encode_hidden(make_states(i, dtype=dtype), feature.basis, STEP)
        found = feature.read_codes(i, into=into)
        assert {name: a.dtype.name for name, a in found.items()} == {
            "codes": "int16", "scale": "float32", "exact_rows": "int64", "exact": "float32", "rows": "int64"
        }  # fmt: skip
        assert all(np.array_equal(found[name], array) for name, array in coded.items())
        assert found["rows"].tolist() == list(range(POSITIONS))
        assert found["codes"].flags.c_contiguous
        assert np.array_equal(feature.read_shard(i), decode_states(coded, feature.basis, STEP))
        assert np.array_equal(feature.read_shard(i)[0], x[0]), "sinks are exact"
    assert cache.verify().ok


def test_some_positions_of_a_map(tmp_path: Path) -> None:
    base = make_base(tmp_path, 1)
    shape, chosen = (4, 3, 2), np.array([1, 5, 6, POSITIONS - 1])
    maps = np.random.default_rng(0).standard_normal((POSITIONS, *shape)).astype(np.float32)
    vectors = maps.transpose(0, 2, 3, 1).reshape(-1, 4)
    basis = Basis.learn(vectors)
    spec = make_feature_spec(
        base,
        basis,
        name="layers.3",
        kind="map",
        layer=None,
        layers=None,
        shape=shape,
        positions="0.25",
        dtype="float32",
    )
    rows = (chosen[:, None] * 6 + np.arange(6)).ravel()
    with create_feature(tmp_path, spec, basis) as writer:
        writer.write_shard(0, encode_hidden(vectors[rows], basis, STEP), rows)
    feature = open_cache(tmp_path).features["layers.3"]
    assert np.array_equal(feature.read_codes(0)["rows"], rows)
    found = feature.read_shard(0)
    assert found.shape == (POSITIONS, *shape)
    assert np.isfinite(found).all(axis=(1, 2, 3)).nonzero()[0].tolist() == chosen.tolist()
    assert np.isnan(np.delete(found, chosen, 0)).all()
    assert np.abs(found[chosen] - maps[chosen]).max() < 0.2


def test_attention_maps_and_names(tmp_path: Path) -> None:
    base = make_base(tmp_path, 1)
    maps = np.random.default_rng(0).random((POSITIONS, 3, 2)).astype(np.float32)
    basis = Basis.learn(maps.reshape(-1, 6))
    kinds: Any = {"kind": "attention_map", "layer": None, "layers": None, "shape": (3, 2), "dtype": "float32"}
    for name in ("layers.3:at", "a/b c", "%41"):
        with create_feature(tmp_path, make_feature_spec(base, basis, name=name, **kinds), basis) as writer:
            writer.write_shard(0, encode_hidden(maps.reshape(-1, 6), basis, STEP))
    features = open_cache(tmp_path).features
    assert set(features) == {"layers.3:at", "a/b c", "%41"}
    for name in features:
        assert np.abs(features[name].read_shard(0) - maps).max() < STEP
    for name in ("", ".", "..", "a\n", "x" * 201, 3):
        with pytest.raises(CacheError, match="name: got"):
            make_feature_spec(base, basis, name=name, **kinds)


def test_states_by_their_other_names(tmp_path: Path) -> None:
    base = make_base(tmp_path, 1)
    write_feature(tmp_path, base, 1)
    assert open_cache(tmp_path).features["-11"].name == "20"
    write_feature(tmp_path, base, 1, name="-1", layer=30)
    features = open_cache(tmp_path).features
    assert [features[name].name for name in ("-1", "30", "20", "-11")] == ["-1", "-1", "20", "20"]
    assert list(features) == ["20", "-1"]
    assert "30" in features
    for name in ("21", "29", "-2", "layers.3"):
        assert name not in features
        with pytest.raises(KeyError):
            features[name]


def test_a_feature_of_other_settings_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    spec, basis = write_feature(tmp_path, base), make_basis()
    with create_feature(tmp_path, FeatureSpec(**{**spec.__dict__, "notes": "other notes"}), basis) as writer:
        assert writer.spec == spec
        assert writer.write_shard(0, encode_hidden(make_states(0), basis, STEP)) == Commit.ALREADY_THERE
    with pytest.raises(CacheError, match=r"one of other settings exists \(step: 0.06 and 0.2\)"):
        create_feature(tmp_path, make_feature_spec(base, basis, step=0.2), basis)
    with pytest.raises(CacheError, match="base: got"):
        create_feature(tmp_path, make_feature_spec(base, basis, base="0" * 64, name="21", layer=21), basis)
    other = Basis.learn(make_states(5, 300))
    assert share_basis(tmp_path, "20", other).sha256 == basis.sha256
    with pytest.raises(CacheError, match="basis: got"):
        create_feature(tmp_path, spec, other)
    with pytest.raises(CacheError, match="block: got"):
        create_feature(tmp_path, spec, basis, b"block")


def test_a_spec_of_values_of_other_types_is_refused(tmp_path: Path) -> None:
    """As JSON can hold: none of them may end in another error."""
    base = make_base(tmp_path, 1)
    spec = make_feature_spec(base, Basis.learn(make_states(9, 300, 5, "bfloat16")))
    for name in ("base", "name", "kind", "layer", "layers", "shape", "step", "positions", "seed", "dtype", "basis"):
        for value in ([], ["state"], {}, True, 0.25, "x", None):
            if (name, value) != ("step", 0.25):
                with pytest.raises((CacheError, TypeError) if name == "shape" else CacheError):
                    FeatureSpec(**{**spec.__dict__, name: value})


def test_a_feature_needs_its_cache_and_its_shard(tmp_path: Path) -> None:
    base = make_base(tmp_path / "one", 2)
    basis = make_basis()
    with create_feature(tmp_path / "one", make_feature_spec(base, basis), basis) as writer:
        with pytest.raises(CacheError, match="the cache has no shard 2"):
            writer.write_shard(2, encode_hidden(make_states(2), basis, STEP))
        writer.write_shard(1, encode_hidden(make_states(1), basis, STEP))
    (tmp_path / "one" / "shards" / "1.zarr.zip").unlink()
    with pytest.raises(CacheError, match=r"shard 1: .* has none"):
        open_cache(tmp_path / "one").features["20"].read_shard(1)
    make_base(tmp_path / "two", 3, shard_positions=4096)
    (tmp_path / "one" / "shards" / "1.zarr.zip").write_bytes((tmp_path / "two/shards/0.zarr.zip").read_bytes())
    with pytest.raises(CorruptShard):
        open_cache(tmp_path / "one").features["20"].read_shard(1)


def test_a_dropped_feature_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    base = make_base(tmp_path, seal=True)
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    write_feature(tmp_path, base, seal=True)
    write_feature(tmp_path, base, name="-1", layer=30)
    assert drop_feature(tmp_path, "20") == 6
    assert list(open_cache(tmp_path).features) == ["-1"]
    writer = create_feature(tmp_path, open_cache(tmp_path).features["-1"].spec, make_basis())
    assert drop_feature(tmp_path, "-1") == 5
    with writer, pytest.raises(CacheError, match="dropped meanwhile"):
        writer.write_shard(0, encode_hidden(make_states(0), make_basis(), STEP))
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before
    assert not (tmp_path / "features").exists()
    with pytest.raises(CacheError, match="there is no feature 20"):
        drop_feature(tmp_path, "20")


def test_a_feature_that_is_dropped_while_others_are_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, seal=True)
    write_feature(tmp_path, base)
    write_feature(tmp_path, base, name="-1", layer=30)
    cache = open_cache(tmp_path)
    monkeypatch.setattr(type(cache.features), "__iter__", lambda self: iter(["19", "20", "-1"]))
    assert list(seal_features(cache)) == ["20", "-1"]


class Growing(MemoryStore):
    """A store into which a running capture commits the last shard, of targets and feature, when features are listed."""

    def list(self, prefix: str) -> Iterator[Entry]:
        self.grown |= prefix.startswith("features/")
        return super().list(prefix)

    def _entries(self, folders: Names) -> Iterator[Entry]:
        return (entry for entry in super()._entries(folders) if self.grown or not entry.key.endswith("/2.zarr.zip"))

    grown = False


def test_shards_that_are_committed_while_they_are_verified() -> None:
    store = Growing()
    base = make_base(store, seal=False)
    write_feature(store, base, seal=False)
    store.grown = False
    report = verify_cache(store)
    assert store.grown
    assert report.problems == []
    assert (report.shards, report.features["20"].shards) == (2, 3)
