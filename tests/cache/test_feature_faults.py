"""Features: nothing is lost and nothing is read wrong. Damage, kills, races, drops, other stores."""

import hashlib
import pickle
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cache_cases import make_shard
from cache_writer import CacheWriter
from feature_cases import STEP, make_base, make_basis, make_feature_spec, make_states, write_feature

from fastkd.cache import (
    Cache,
    CacheError,
    Commit,
    CorruptShard,
    Feature,
    ReadOnly,
    StoreError,
    Workspace,
    create_cache,
    create_feature,
    decode_states,
    drop_feature,
    encode_hidden,
    open_cache,
    share_basis,
)
from fastkd.cache.stores import MemoryStore

ASIDE = ["object_sha256", "written", "attempt"]  # of a manifest: what differs between two runs that did the same


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def small(place: Any, seal: bool = True, **changes: Any) -> Cache:
    """A cache of one shard with a feature of a few bytes, with a block."""
    base = make_base(place, 1, seal=seal)
    basis = make_basis(4)
    changes["block"] = hashlib.sha256(b"weights").hexdigest()
    spec = make_feature_spec(base, basis, **changes)
    with create_feature(place, spec, basis, b"weights") as writer:
        writer.write_shard(0, encode_hidden(make_states(0, width=4), basis, STEP))
        if seal:
            writer.seal()
    return open_cache(place)


class Swapped(MemoryStore):
    """Another store but for one object."""

    def __init__(self, store: Any, key: str, data: bytes) -> None:
        super().__init__("swapped")
        self.store, self.key, self.data = store, key, data

    def _entries(self, folders: list[str]) -> Any:
        return self.store._entries(folders)

    def _read(self, key: str, length: int | None) -> bytes:
        data = self.data if key == self.key else self.store._read(key, length)
        return data[-(length or 0) :]


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "name", ["spec.json", "basis.zarr.zip", "block.safetensors", "shards/0.zarr.zip", "manifest.parquet"]
)
def test_every_flipped_byte_of_a_feature_is_noticed(name: str, every: int) -> None:
    store = MemoryStore()
    truth = small(store).features["20"]
    values, key = truth.read_shard(0), f"features/20/{name}"
    good = store.get(key)
    silent, harmless = [], 0
    for place in range(0, len(good), every * {"manifest.parquet": 11, "basis.zarr.zip": 3}.get(name, 1)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        cache = Cache(Swapped(store, key, bytes(bad)), truth._cache.spec, truth._cache.manifest)
        try:
            opened = Feature(cache, truth.spec, truth.basis, truth.manifest) if "shards" in name else None
            feature = opened or cache.features["20"]
            found = feature.read_shard(0)
            same = feature.block == b"weights" and np.array_equal(found, values) and feature.spec == truth.spec
            assert feature.manifest.equals(truth.manifest)
        except CacheError as error:
            assert "features/20" in str(error) or "feature 20" in str(error) or "spec.json" in str(error), error
            if place % 97 == 0:
                assert any(p.feature == "20" for p in cache.verify(deep=False).problems)
            continue
        except KeyError:
            continue
        # a flip in a field that means nothing to a reader (Parquet's comments, white space, notes) may pass
        harmless += 1
        if not same or name not in ("manifest.parquet", "spec.json"):
            silent.append(place)
    assert not silent, f"of {len(good)} flips"
    assert harmless < len(good) / 6


def test_truncated_removed_swapped_and_strange_objects_of_a_feature(tmp_path: Path) -> None:
    base = make_base(tmp_path, 2)
    write_feature(tmp_path, base, 2, seal=True)
    folder = tmp_path / "features/20"
    good = files(folder)

    def check(shard: int | None = None) -> None:
        with pytest.raises((CacheError, KeyError)):
            open_cache(tmp_path).features["20"].read_shard(shard or 0)
        problems = open_cache(tmp_path).verify(deep=False).problems
        assert any((p.feature, p.shard) == ("20", shard) for p in problems), problems

    for name, data in good.items():
        shard = int(name[7]) if name.startswith("shards/") else None
        path = folder / name
        if name != "manifest.parquet":
            for length in [0, 1, len(data) // 2, len(data) - 1]:
                if data[:length] != data.rstrip():  # a spec without its last line feed is a spec
                    path.write_bytes(data[:length])
                    check(shard)
            path.write_bytes(data + b"\0" if name != "spec.json" else data + b"}")
            check(shard)
        if shard is not None:
            path.write_bytes(good[f"shards/{1 - shard}.zarr.zip"])
            check(shard)
            path.unlink()
            check(shard)
        path.write_bytes(data)
    assert open_cache(tmp_path).verify().ok
    for name in ("spec.json", "basis.zarr.zip"):
        (folder / name).unlink()
        check()
        (folder / name).write_bytes(good[name])
    (folder / "shards/03.zarr.zip").write_bytes(b"")
    (tmp_path / "features/stray").write_bytes(b"")
    problems = [str(p) for p in open_cache(tmp_path).verify().problems]
    assert problems == [
        "the cache: 'features/stray' belongs to no feature",
        "feature 20: 'features/20/shards/03.zarr.zip' is no shard's name",
    ]


def test_another_cache_another_name(tmp_path: Path) -> None:
    small(tmp_path / "one")
    make_base(tmp_path / "two", 1, teacher="another")
    shutil.copytree(tmp_path / "one/features", tmp_path / "two/features")
    with pytest.raises(CacheError, match=r"feature 20 of .*two: it belongs to a cache of other settings"):
        open_cache(tmp_path / "two").features["20"]
    assert "cache of other settings" in str(open_cache(tmp_path / "two").verify().problems[0])
    shutil.copytree(tmp_path / "one/features/20", tmp_path / "one/features/21")
    with pytest.raises(CacheError, match=r"features/21/spec\.json: name: got '20'; expected '21'"):
        open_cache(tmp_path / "one").features["21"]
    assert [p.feature for p in open_cache(tmp_path / "one").verify().problems] == ["21"]


@pytest.mark.parametrize("seal", [True, False])
def test_shards_of_others_are_refused(tmp_path: Path, seal: bool) -> None:
    """Of another feature, of another run, of another shard of the cache, and without one."""
    base = make_base(tmp_path, 2, seal=seal)
    write_feature(tmp_path, base, 2)
    write_feature(tmp_path, base, 2, name="21", layer=21)
    one, other = (tmp_path / f"features/{name}/shards/0.zarr.zip" for name in ("20", "21"))
    mine = one.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(CorruptShard, match=f"shard 0 of feature 20 of .*: {message}"):
            open_cache(tmp_path).features["20"].read_codes(0)
        assert [(p.feature, p.shard) for p in open_cache(tmp_path).verify(deep=False).problems] == [("20", 0)]

    one.write_bytes(other.read_bytes())
    refused("it belongs to a feature of other settings")
    one.write_bytes(mine)
    make_base(tmp_path / "again", 2, seal=False)
    with create_feature(tmp_path, open_cache(tmp_path).features["20"].spec, make_basis()) as writer:
        writer.seal()
    write_feature(tmp_path / "again", base, 2)
    one.write_bytes((tmp_path / "again/features/20/shards/0.zarr.zip").read_bytes())
    refused("it is another object than the one that was sealed")
    one.write_bytes(mine)
    (tmp_path / "features/20/manifest.parquet").unlink()
    if not seal:  # the cache's shard 0 was replaced
        (tmp_path / "shards/0.zarr.zip").unlink()
        with create_cache(tmp_path, base) as base_writer:
            base_writer.write_shard(0, **make_shard(base, 60, seed=77))
        refused_base = "it belongs to another shard of the cache than the one of this number that is there"
        with pytest.raises(CorruptShard, match=refused_base):
            open_cache(tmp_path).features["20"].read_codes(0)
        assert {p.feature for p in open_cache(tmp_path).verify(deep=False).problems} == {"20", "21"}
        with (
            create_feature(tmp_path, open_cache(tmp_path).features["20"].spec, make_basis()) as writer,
            pytest.raises(CacheError, match="the existing one is of another plan"),
        ):
            writer.write_shard(0, encode_hidden(make_states(0), make_basis(), STEP))


class Flipping(MemoryStore):
    """Flips a bit of the first read of each object."""

    def __init__(self, store: Any) -> None:
        super().__init__("flipping")
        self.store, self.seen = store, set[str]()

    def _entries(self, folders: list[str]) -> Any:
        return self.store._entries(folders)

    def _read(self, key: str, length: int | None) -> bytes:
        data = bytearray(self.store._read(key, length))
        if key not in self.seen:
            self.seen.add(key)
            data[len(data) // 2] ^= 4
        return bytes(data)


def test_a_bit_of_a_feature_flipped_in_transit_is_no_damage() -> None:
    store = MemoryStore()
    values = small(store).features["20"].read_shard(0)
    feature = open_cache(Flipping(store)).features["20"]
    assert np.array_equal(feature.read_shard(0), values)
    assert feature.block == b"weights"
    assert open_cache(Flipping(store)).verify().ok


# --- kills, races, many writers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bare") / "cache"
    make_base(path, 3, seal=True)
    return path


def finished(path: Path, bare: Path) -> pa.Table:
    """What a later run makes of a feature: whole, sealed, the cache as before, and nothing left over."""
    write_feature(path, open_cache(path).spec, seal=True)
    cache = open_cache(path)
    assert cache.verify().ok, cache.verify().problems
    names = {"spec.json", "basis.zarr.zip", "manifest.parquet", *(f"shards/{i}.zarr.zip" for i in range(3))}
    assert files(path).keys() - files(bare).keys() == {f"features/20/{name}" for name in names}
    assert files(bare).items() <= files(path).items()
    return cache.features["20"].manifest.drop(ASIDE)


def killed(bare: Path, tmp_path: Path, job: str, every: int) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """Copies of a cache in which a process was killed at its steps, and what it had committed."""
    shutil.copytree(bare, tmp_path / "whole")
    steps = int(CacheWriter(tmp_path / "whole", job=job).rest()[-1].split()[-1])
    assert steps > 20
    for first in range(1, steps + 1, 4 * every):
        batch = {}
        for step in range(first, min(first + 4 * every, steps + 1), every):
            shutil.copytree(bare, tmp_path / str(step))
            batch[step] = CacheWriter(tmp_path / str(step), step, job=job)
        for step, process in batch.items():
            process.rest()
            assert process.status == -signal.SIGKILL, f"step {step} of {steps} was not reached"
            yield tmp_path / str(step), files(tmp_path / str(step))
            shutil.rmtree(tmp_path / str(step))


def kills_of_a_writer(bare: Path, tmp_path: Path, every: int) -> None:
    shutil.copytree(bare, tmp_path / "want")
    want = finished(tmp_path / "want", bare)
    for path, there in killed(bare, tmp_path, "feature", every):
        assert open_cache(path).verify().ok
        assert finished(path, bare).equals(want)
        now = files(path)
        kept = {name: data for name, data in there.items() if not name.startswith("attempts/")}
        assert all(now[name] == data for name, data in kept.items()), "a committed object was written again"


def kills_of_a_drop(bare: Path, tmp_path: Path, every: int) -> None:
    shutil.copytree(bare, tmp_path / "with")
    finished(tmp_path / "with", bare)
    for path, there in killed(tmp_path / "with", tmp_path, "drop", every):
        features = open_cache(path).features
        assert list(features) == (["20"] if "features/20/spec.json" in there else [])
        if features:
            assert open_cache(path).verify().ok
        left = any("shards" in name for name in there if name.startswith("features/"))
        if left and not features:
            assert [p.feature for p in open_cache(path).verify().problems] == ["20"]
            with pytest.raises(CacheError, match="Drop it again"):
                write_feature(path, open_cache(path).spec)
        if any(name.startswith("features/") for name in there):
            drop_feature(path, "20")
        assert files(path) == files(bare)
        finished(path, bare)


def test_killed_while_a_feature_is_written(bare: Path, tmp_path: Path) -> None:
    kills_of_a_writer(bare, tmp_path, 7)


def test_killed_while_a_feature_is_dropped(bare: Path, tmp_path: Path) -> None:
    kills_of_a_drop(bare, tmp_path, 5)


@pytest.mark.soak
def test_killed_at_every_step_of_a_feature(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    kills_of_a_writer(bare, tmp_path / "a", 1)
    kills_of_a_drop(bare, tmp_path / "b", 1)


def test_many_writers_of_one_feature(tmp_path: Path) -> None:
    """Each learns a basis of its own; the first one's is used by all, and every shard is committed once."""
    base = make_base(tmp_path, 6, seal=True)
    start, commits, failures = threading.Barrier(4), list[Commit](), list[BaseException]()

    def work(me: int) -> None:
        try:
            start.wait()
            basis = share_basis(tmp_path, "20", type(make_basis()).learn(make_states(me, 200)))
            spec = make_feature_spec(base, basis)
            with create_feature(tmp_path, spec, basis, threads=2) as writer:
                futures = [writer.submit_shard(i, encode_hidden(make_states(i), basis, STEP)) for i in range(6)]
                commits.extend(future.result() for future in futures)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert commits.count(Commit.COMMITTED) == 6
    feature = open_cache(tmp_path).features["20"]
    for i in range(6):
        coded = encode_hidden(make_states(i), feature.basis, STEP)
        assert np.array_equal(feature.read_shard(i), decode_states(coded, feature.basis, STEP))
    assert open_cache(tmp_path).verify().ok


def test_a_shard_of_a_feature_waits_for_that_of_the_cache(tmp_path: Path) -> None:
    base = make_base(tmp_path, 1)
    basis, coming = make_basis(), Future[Commit]()
    with create_feature(tmp_path, make_feature_spec(base, basis), basis) as writer:
        future = writer.submit_shard(1, encode_hidden(make_states(1), basis, STEP), after=coming)
        assert not future.done()
        make_base(tmp_path, 2)
        coming.set_result(Commit.COMMITTED)
        assert future.result() == Commit.COMMITTED
        failed = Future[Commit]()
        failed.set_exception(StoreError("the line is dead"))
        assert isinstance(writer.submit_shard(1, {}, after=failed).exception(), StoreError)
    assert open_cache(tmp_path).features["20"].shards == [1]


def test_sealed_and_then_added_to(tmp_path: Path) -> None:
    base = make_base(tmp_path, 2, seal=True)
    spec, basis = write_feature(tmp_path, base, 1, seal=True), make_basis()
    with create_feature(tmp_path, spec, basis) as writer:
        assert writer.write_shard(0, encode_hidden(make_states(0), basis, STEP)) == Commit.ALREADY_THERE
        with pytest.raises(CacheError, match=r"the feature is sealed, and shard 1 .* delete features/20/manifest"):
            writer.write_shard(1, encode_hidden(make_states(1), basis, STEP))
    with pytest.raises(CacheError, match=r"shard 1: feature 20 of .* has none of this number"):
        open_cache(tmp_path).features["20"].read_shard(1)
    (tmp_path / "features/20/manifest.parquet").unlink()
    write_feature(tmp_path, base, 2, seal=True)
    assert open_cache(tmp_path).features["20"].shards == [0, 1]
    empty = make_feature_spec(base, basis, name="21", layer=21)
    with create_feature(tmp_path, empty, basis) as writer, pytest.raises(CacheError, match="no shard to seal"):
        writer.seal()


# --- other stores ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_zip_and_http(tmp_path: Path, server: str) -> None:
    base = make_base(tmp_path / "cache", seal=True)
    write_feature(tmp_path / "cache", base, seal=True)
    kinds: Any = {"kind": "map", "layer": None, "layers": None, "shape": (12, 1, 1), "name": "layers.3"}
    write_feature(tmp_path / "cache", base, seal=True, **kinds)
    expected = open_cache(tmp_path / "cache").features["20"].read_shard(1)
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "cache")
    zipped = open_cache(tmp_path / "zipped.zip")
    assert set(zipped.features) == {"20", "layers.3"}
    assert zipped.verify().ok
    remote = open_cache(f"{server}/cache")
    for cache in (zipped, remote):
        assert np.array_equal(cache.features["20"].read_shard(1), expected)
        assert cache.features["layers.3"].read_shard(1).shape == (60, 12, 1, 1)
        assert "19" not in cache.features
        with pytest.raises(ReadOnly, match="deletes nothing"):
            drop_feature(cache.store, "20")
    with pytest.raises(StoreError, match="HTTP has no listing"):
        list(remote.features)
    assert remote.features["20"].verify() == []
    assert remote.verify().ok


def test_features_in_other_processes(tmp_path: Path) -> None:
    base = make_base(tmp_path, 1, seal=True)
    write_feature(tmp_path, base, 1)
    feature = open_cache(tmp_path).features["20"]
    again = pickle.loads(pickle.dumps(feature))
    assert np.array_equal(again.read_shard(0), feature.read_shard(0))
    into = Workspace()
    assert np.shares_memory(feature.read_codes(0, into=into)["codes"], feature.read_codes(0, into=into)["codes"])
    assert replace(feature.spec, notes="x").hash == feature.spec.hash
