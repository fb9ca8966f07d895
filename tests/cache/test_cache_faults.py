"""Nothing is lost and nothing is read wrong: damage, kills, races, failing stores, forged metadata."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_cases import make_shard, make_spec
from cache_writer import CacheWriter
from numcodecs.zstd import Zstd

from fastkd.cache import (
    Cache,
    CacheError,
    Commit,
    CorruptShard,
    StoreError,
    create_cache,
    open_cache,
    open_store,
)
from fastkd.cache.shard.container import HASH_LENGTH, check_bytes, digest
from fastkd.cache.stores import MemoryStore

ASIDE = ["object_sha256", "written", "attempt"]  # of a manifest: what differs between two runs that did the same


def write(path: Any, shards: int = 3, seal: bool = True, **changes: Any) -> None:
    spec = make_spec(**({"vocab_size": 40, "k": 3} | changes))
    with create_cache(path, spec) as writer:
        for i in range(shards):
            writer.write_shard(i, **make_shard(spec, positions=12, seed=i), first_sequence=4 * i)
        if seal:
            writer.seal()


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n], equal_nan=True) for n in one)


def swapped(store: MemoryStore, key: str, data: bytes) -> MemoryStore:
    """The same store but for one object."""
    other = MemoryStore()
    for name in ("spec.json", "manifest.parquet", "shards/0.zarr.zip"):
        if name == key:
            other.create(name, data)
        elif any(entry.key == name for entry in store.list("")):
            other.create(name, store.get(name))
    return other


def named(cache: Cache, shard: int) -> bool:
    return any(p.shard == shard for p in cache.verify(deep=False).problems)


# `test_every_bit.py` has a sample of all bits, too
EVERY = pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.soak)])


@EVERY
@pytest.mark.parametrize(("codec", "sealed"), [("default", True), ("portable", False)])
def test_every_flipped_byte_is_noticed(tmp_path: Path, codec: str, sealed: bool, every: int) -> None:
    store = MemoryStore()
    write(store, 1, seal=sealed, codec=codec, vocab_size=20, k=2, draws=1)
    key = "shards/0.zarr.zip"
    good = store.get(key)
    whole = open_cache(store)
    truth = whole.read_shard(0)
    silent = unnamed = 0
    for place in range(0, len(good), every):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        cache = Cache(swapped(store, key, bytes(bad)), whole.spec, whole.manifest if sealed else None)
        try:
            cache.read_shard(0)
            silent += 1
        except CorruptShard as error:
            unnamed += "shard 0" not in str(error)
        if place % 11 == 0:
            unnamed += not named(cache, 0)
    assert (silent, unnamed) == (0, 0), f"of {len(good)} flips"
    assert same(whole.read_shard(0), truth)


def test_a_flip_in_an_array_names_the_array(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "shards" / "0.zarr.zip"
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        chunks = {i.filename: i.header_offset + 30 + len(i.filename) for i in archive.infolist() if "/c/" in i.filename}
    for name, start in chunks.items():
        bad = bytearray(good)
        bad[start + 4] ^= 1
        path.write_bytes(bad)
        array = name.partition("/c/")[0]
        with pytest.raises(CorruptShard, match=f'shard 0 of .*, array "{array}"'):
            open_cache(tmp_path).read_shard(0)
        assert [(p.shard, p.array) for p in open_cache(tmp_path).verify().problems] == [(0, array)]


def test_truncated_removed_swapped_and_strange_objects(tmp_path: Path) -> None:
    write(tmp_path, 3)
    shards = [tmp_path / "shards" / f"{i}.zarr.zip" for i in range(3)]
    good = [p.read_bytes() for p in shards]
    write(tmp_path / "other", 3, teacher="another")

    def check(i: int) -> None:
        cache = open_cache(tmp_path)
        with pytest.raises(CacheError, match=f"shard {i}"):
            cache.read_shard(i)
        assert named(cache, i)
        assert not cache.verify().ok

    for i in range(3):
        for length in [*range(0, len(good[i]), 97), len(good[i]) - 1]:
            shards[i].write_bytes(good[i][:length])
            check(i)
        shards[i].write_bytes(good[i] + b"\0")
        check(i)
        shards[i].write_bytes(good[(i + 1) % 3])
        check(i)
        shards[i].write_bytes((tmp_path / "other" / "shards" / f"{i}.zarr.zip").read_bytes())
        check(i)
        shards[i].unlink()
        check(i)
        shards[i].write_bytes(good[i])
    assert open_cache(tmp_path).verify().ok
    (tmp_path / "shards" / "03.zarr.zip").write_bytes(good[2])
    assert not open_cache(tmp_path).verify().ok
    (tmp_path / "shards" / "03.zarr.zip").rename(shards[2].with_name("3.zarr.zip"))
    assert named(open_cache(tmp_path), 3)


def test_another_run_of_the_same_shard_is_not_the_sealed_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, 1)
    (tmp_path / "one" / "shards" / "0.zarr.zip").write_bytes((tmp_path / "two" / "shards" / "0.zarr.zip").read_bytes())
    with pytest.raises(CorruptShard, match="another object than the one that was sealed"):
        open_cache(tmp_path / "one").read_shard(0)


@EVERY
@pytest.mark.parametrize("name", ["spec.json", "manifest.parquet"])
def test_every_flipped_byte_of_spec_and_manifest_changes_nothing_silently(
    tmp_path: Path, name: str, every: int
) -> None:
    write(tmp_path, 2)
    before = open_cache(tmp_path)
    path = tmp_path / name
    good = path.read_bytes()
    noticed = harmless = 0
    for place in range(0, len(good), every * (1 if name == "spec.json" else 3)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        try:
            cache = open_cache(tmp_path)
        except CacheError:
            noticed += 1
            continue
        # a flip in a field that means nothing to a reader (a comment of the Parquet writer, white space) may pass
        assert cache.spec.hash == before.spec.hash
        assert cache.manifest.equals(before.manifest)
        harmless += 1
    assert noticed > harmless


# --- kills and races -------------------------------------------------------------------------------------------------


def finish(path: Path) -> pa.Table:
    """What a later run makes of it: the rest is written, the cache sealed and whole, nothing left over."""
    write(path, 3)
    cache = open_cache(path)
    report = cache.verify()
    assert report.ok, report.problems
    left = [p for p in path.rglob("*") if p.is_file() and p.parent.name != "shards"]
    assert sorted(p.name for p in left) == ["manifest.parquet", "spec.json"], "leftovers are swept"
    return cache.manifest.drop(ASIDE)


def committed(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (path / "shards").glob("*.zarr.zip")} if path.exists() else {}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[pa.Table, int]:
    """The manifest of an uninterrupted run, and how many steps a kill can come at."""
    path = tmp_path_factory.mktemp("uninterrupted") / "cache"
    steps = int(CacheWriter(path).rest()[-1].split()[-1])
    assert steps > 20
    return finish(path), steps


def test_killed_at_every_step_of_a_commit(tmp_path: Path, uninterrupted: tuple[pa.Table, int]) -> None:
    want, steps = uninterrupted
    for first in range(1, steps + 1, 4):
        batch = {step: CacheWriter(tmp_path / str(step), step) for step in range(first, min(first + 4, steps + 1))}
        for step, process in batch.items():
            process.rest()
            assert process.status == -signal.SIGKILL, f"step {step} of {steps} was not reached"
            there = committed(tmp_path / str(step))
            assert finish(tmp_path / str(step)).equals(want)
            now = committed(tmp_path / str(step))
            assert all(now[name] == data for name, data in there.items()), "a committed object was written again"


def kill_at_random(tmp_path: Path, want: pa.Table, times: int, seed: int) -> None:
    generator = random.Random(seed)
    for number in range(times):
        path = tmp_path / f"kill{number}"
        writer = CacheWriter(path)
        assert writer.line() == "ready"
        time.sleep(generator.uniform(0, 0.12))
        writer.process.kill()
        writer.rest()
        there = committed(path)
        assert finish(path).equals(want)
        assert all(committed(path)[name] == data for name, data in there.items())


def test_killed_at_random_instants(tmp_path: Path, uninterrupted: tuple[pa.Table, int]) -> None:
    kill_at_random(tmp_path, uninterrupted[0], times=6, seed=0)


@pytest.mark.soak
def test_killed_at_two_hundred_random_instants(tmp_path: Path, uninterrupted: tuple[pa.Table, int]) -> None:
    kill_at_random(tmp_path, uninterrupted[0], times=200, seed=1)


def race(tmp_path: Path, want: pa.Table, steps: int, times: int, seed: int) -> None:
    """One writer stops inside its commit; another writes everything; the first wakes up and goes on."""
    generator = random.Random(seed)
    for number in range(times):
        path = tmp_path / f"race{number}"
        sleeper = CacheWriter(path, generator.randint(1, steps), "pause")
        said = []
        while (line := sleeper.line()) not in ("paused", ""):
            said.append(line)
        there = committed(path)
        other = CacheWriter(path)
        out = other.rest()
        assert other.status == 0, out
        winners = committed(path)
        assert len(winners) == 3
        sleeper.wake_up()
        late = sleeper.rest()
        assert sleeper.status == 0
        assert committed(path) == winners, "the late writer changed a committed object"
        assert all(winners[name] == data for name, data in there.items())
        told = [line for line in [*said, *late, *out] if line.endswith(" committed")]
        assert len(told) == len({line.split()[0] for line in told}) <= 3, "two writers were told they had committed"
        assert finish(path).equals(want)


def test_two_writers_race_and_one_is_paused_inside_its_commit(
    tmp_path: Path, uninterrupted: tuple[pa.Table, int]
) -> None:
    race(tmp_path, *uninterrupted, times=4, seed=0)


@pytest.mark.soak
def test_two_writers_race_two_hundred_times(tmp_path: Path, uninterrupted: tuple[pa.Table, int]) -> None:
    race(tmp_path, *uninterrupted, times=200, seed=1)


def test_the_same_shard_by_many_threads_of_many_writers(tmp_path: Path) -> None:
    spec = make_spec()
    writers = [create_cache(tmp_path, spec, threads=2) for _ in range(3)]
    futures = [
        writer.submit_shard(i, **make_shard(spec, seed=i), first_sequence=4 * i) for i in range(4) for writer in writers
    ]
    outcomes = [future.result() for future in futures]
    for i in range(4):
        assert sorted(outcomes[3 * i : 3 * i + 3]) == [Commit.ALREADY_THERE, Commit.ALREADY_THERE, Commit.COMMITTED]
    for writer in writers:
        writer.close()
    assert open_cache(tmp_path).verify().ok


# --- stores that fail ------------------------------------------------------------------------------------------------


class Unreliable:
    """A store whose every n-th request fails; of a creation, after the object was made or before."""

    def __init__(self, store: Any, every: int, after: bool) -> None:
        self.store, self.every, self.after, self.requests = store, every, after, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def _fails(self) -> bool:
        self.requests += 1
        return self.requests % self.every == 0

    def create(self, key: str, data: Any) -> bool:
        fails = self._fails()
        if fails and not self.after:
            raise StoreError(f"unreliable: creating {key}: the line is dead")
        made: bool = self.store.create(key, data)
        if fails:
            raise StoreError(f"unreliable: creating {key}: no answer came")
        return made

    def get(self, key: str) -> bytes:
        if self._fails():
            raise StoreError(f"unreliable: reading {key}: the line is dead")
        data: bytes = self.store.get(key)
        return data

    def get_tail(self, key: str, length: int) -> bytes:
        if self._fails():
            raise StoreError(f"unreliable: reading {key}: the line is dead")
        data: bytes = self.store.get_tail(key, length)
        return data


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("every", [2, 3, 11, 13])
def test_a_store_that_fails_every_nth_request(tmp_path: Path, every: int, after: bool) -> None:
    spec = make_spec()
    store: Any = Unreliable(open_store(tmp_path, create=True), every, after)
    told: dict[int, int] = {}
    for _ in range(40):
        try:
            with create_cache(store, spec) as writer:
                for i in range(3):
                    if writer.write_shard(i, **make_shard(spec, seed=i), first_sequence=4 * i) == Commit.COMMITTED:
                        told[i] = told.get(i, 0) + 1
                writer.seal()
            break
        except StoreError as error:
            assert "unreliable" in str(error)
    else:
        assert every < 11
    assert all(count == 1 for count in told.values()), "a shard is committed once"
    cache = open_cache(tmp_path)
    assert cache.verify().ok
    assert every < 11 or len(cache.shards) == 3
    assert every < 11 or cache.sealed


def test_an_answer_that_is_lost_after_the_commit_is_found_out(tmp_path: Path) -> None:
    spec = make_spec()
    store: Any = Unreliable(open_store(tmp_path, create=True), 10**9, after=True)
    with create_cache(store, spec) as writer:
        create = store.create

        def lost(key: str, data: Any) -> bool:
            create(key, data)
            raise StoreError("no answer came")

        store.create = lost
        assert writer.write_shard(0, **make_shard(spec)) == Commit.COMMITTED
    assert open_cache(tmp_path).verify().ok


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small disk needs more rights")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    spec = make_spec()
    with create_cache(small_disk, spec) as writer:
        for i in range(100):
            try:
                writer.write_shard(i, **make_shard(spec, seed=i), first_sequence=4 * i)
            except StoreError as error:
                assert f"{i}.zarr.zip" in str(error)
                assert "space" in str(error)
                break
        else:
            pytest.fail("the disk never filled")
    cache = open_cache(small_disk)
    assert cache.shards == list(range(i))
    assert i > 1
    assert cache.verify().ok


def test_a_folder_that_may_only_be_read(small_disk: Path) -> None:
    spec = make_spec()
    with create_cache(small_disk, spec) as writer:
        writer.write_shard(0, **make_shard(spec))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    cache = open_cache(small_disk)
    assert cache.verify().ok
    assert len(cache.read_shard(0)["ids"]) == 96
    with pytest.raises(StoreError), create_cache(small_disk, spec) as writer:
        writer.write_shard(1, **make_shard(spec))


# --- forged metadata -------------------------------------------------------------------------------------------------


def reseal(data: bytes) -> bytes:
    return data[:-HASH_LENGTH] + digest(data).encode()


def rezip(data: bytes, change: Callable[[str, bytes], bytes | None], extra: dict[str, bytes] | None = None) -> bytes:
    """The object with changed members and a right hash: what a forger would make."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            content = change(info.filename, old.read(info))
            if content is not None:
                new.writestr(zipfile.ZipInfo(info.filename), content)
        for name, content in (extra or {}).items():
            new.writestr(zipfile.ZipInfo(name), content)
        new.comment = old.comment
    return reseal(buffer.getvalue())


def edited(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[str, bytes], bytes]:
    def change(member: str, content: bytes) -> bytes:
        if member != name:
            return content
        document = json.loads(content)
        edit(document)
        return json.dumps(document).encode()

    return change


def own(d: dict[str, Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = d["attributes"]["fastkd"]
    return attributes


FORGERIES: dict[str, Callable[[str, bytes], bytes | None]] = {
    "huge shape": edited("head/values/zarr.json", lambda d: d.update(shape=[2**60])),
    "large shape": edited("head/values/zarr.json", lambda d: d.update(shape=[2**31])),
    "negative shape": edited("head/values/zarr.json", lambda d: d.update(shape=[-1])),
    "longer": edited("head/values/zarr.json", lambda d: d.update(shape=[40])),
    "shorter": edited("head/values/zarr.json", lambda d: d.update(shape=[20])),
    "another type": edited("head/values/zarr.json", lambda d: d.update(data_type="float64")),
    "objects": edited("head/values/zarr.json", lambda d: d.update(data_type="object")),
    "pickles": edited("head/values/zarr.json", lambda d: d.update(codecs=[{"name": "numcodecs.pickle"}])),
    "no codecs": edited("head/values/zarr.json", lambda d: d.update(codecs=None)),
    "deep": lambda m, c: b"[" * 100_000 if m == "tail/zarr.json" else c,
    "no json": lambda m, c: b"\xff\xfe" if m == "tail/zarr.json" else c,
    "no chunk": lambda m, c: None if m == "head/values/c/0" else c,
    "no tail": lambda m, c: None if m.startswith("tail/") else c,
    "no tokens": lambda m, c: None if m.startswith("inputs/tokens") else c,
    "no attributes": lambda m, c: None if m == "zarr.json" else c,
    "positions": edited("zarr.json", lambda d: own(d).update(positions=10**12)),
    "positions as text": edited("zarr.json", lambda d: own(d).update(positions="many")),
    "fewer positions": edited("zarr.json", lambda d: own(d).update(positions=11)),
    "garbage chunk": lambda m, c: bytes(len(c)) if m == "head/firsts/c/0" else c,
    "other chunk": lambda m, c: b"pco!" + os.urandom(60) if m == "head/firsts/c/0" else c,
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_shards_are_refused(tmp_path: Path, forgery: str) -> None:
    write(tmp_path, 1, seal=False)
    path = tmp_path / "shards" / "0.zarr.zip"
    path.write_bytes(rezip(path.read_bytes(), FORGERIES[forgery]))
    cache = open_cache(tmp_path)
    try:
        cache.read_shard(0)
    except CorruptShard as error:
        assert "shard 0" in str(error)
    else:
        assert forgery == "other chunk", forgery
    assert not cache.verify().ok


def test_members_that_climb_out_touch_nothing(tmp_path: Path) -> None:
    write(tmp_path / "cache", 1, seal=False)
    path = tmp_path / "cache" / "shards" / "0.zarr.zip"
    extra = {"../../escape": b"x", "/etc/escape": b"x", "head/../../../escape/zarr.json": b"{}"}
    path.write_bytes(rezip(path.read_bytes(), lambda m, c: c, extra))
    before = sorted(tmp_path.rglob("*"))
    cache = open_cache(tmp_path / "cache")
    with pytest.raises(CorruptShard, match="shard 0"):
        cache.read_shard(0)
    assert sorted(tmp_path.rglob("*")) == before


def test_fuzzed_objects_never_read_wrong(tmp_path: Path) -> None:
    """Random damage under a right hash: refused, or read; never a crash, a hang, or an unbounded allocation."""
    write(tmp_path, 1, seal=False, k=2, draws=2)
    path = tmp_path / "shards" / "0.zarr.zip"
    good = path.read_bytes()
    generator = random.Random(5)
    cache = open_cache(tmp_path)
    refused = 0
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            bad[generator.randrange(len(bad) - HASH_LENGTH)] = generator.randrange(256)
        path.write_bytes(reseal(bytes(bad)))
        try:
            cache.read_shard(0)
        except CacheError:
            refused += 1
    assert refused > 100


def test_fuzzed_manifests_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 2)
    path = tmp_path / "manifest.parquet"
    good = path.read_bytes()
    generator = random.Random(6)
    truth = open_cache(tmp_path).manifest
    for number in range(300):
        bad = bytearray(good)
        if number % 3 == 0:
            bad = bad[: generator.randrange(len(bad))]
        else:
            for _ in range(generator.randint(1, 8)):
                bad[generator.randrange(len(bad))] = generator.randrange(256)
        path.write_bytes(bad)
        try:
            assert open_cache(tmp_path).manifest.equals(truth)
        except CacheError as error:
            assert "manifest.parquet" in str(error)
    for table in (pa.table({"shard": [0]}), pa.table({"shard": ["../../x"]})):
        pq.write_table(table, path)
        with pytest.raises(CacheError, match=r"manifest\.parquet: not readable as a manifest"):
            open_cache(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{", b"[" * 10**6, b'{"format": "fastkd-cache"}', b"\x80\x04."]
)
def test_specs_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "spec.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"spec\.json"):
        open_cache(tmp_path)


def test_nothing_here_unpickles() -> None:
    folder = Path(sys.modules["fastkd.cache"].__file__ or "").parent
    for path in folder.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "allow_pickle" not in text, path
        assert "np.load" not in text, path


def test_a_group_for_zarr_is_checked_too(tmp_path: Path) -> None:
    write(tmp_path, 2)
    shards = [tmp_path / "shards" / f"{i}.zarr.zip" for i in range(2)]
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(CorruptShard, match="shard 0"):
        open_cache(tmp_path).zarr_group(0)
    with pytest.raises(CacheError, match="shard 7"):
        open_cache(tmp_path).zarr_group(7)


def test_arrays_that_nobody_knows_are_left_alone(tmp_path: Path) -> None:
    """A small object can hold a gigabyte of zeros."""
    write(tmp_path, 1, seal=False)
    path = tmp_path / "shards" / "0.zarr.zip"
    meta = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [2**27],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**27]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1, "checksum": True}}],
    }
    bomb = Zstd(level=1, checksum=True).encode(np.zeros(2**27, np.uint8))
    assert len(bomb) < 2**17
    truth = open_cache(tmp_path).read_shard(0)
    extra = {"junk/zarr.json": json.dumps(meta).encode(), "junk/c/0": bomb}
    path.write_bytes(rezip(path.read_bytes(), lambda m, c: c, extra))
    tracemalloc.start()
    try:
        assert same(open_cache(tmp_path).read_shard(0), truth)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    # the same under a name that is known: more numbers than the shard can have
    extra = {"outcomes/zarr.json": json.dumps(meta).encode(), "outcomes/c/0": bomb}
    path.write_bytes(rezip(path.read_bytes(), lambda m, c: c, extra))
    with pytest.raises(CorruptShard, match='array "outcomes"'):
        open_cache(tmp_path).read_shard(0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first_sequence", 10**30),
        ("first_sequence", -5),
        ("attempt", "\ud800"),
        ("attempt", "x" * 10**6),
        ("sequences", 0),
        ("sequences", 10**9),
        ("head_entries", 10**12),
        ("written", -1),
        ("statistics", {}),
    ],
)
def test_forged_attributes_are_refused_by_every_reader(tmp_path: Path, name: str, value: Any) -> None:
    write(tmp_path, 1, seal=False)
    path = tmp_path / "shards" / "0.zarr.zip"
    path.write_bytes(rezip(path.read_bytes(), edited("zarr.json", lambda d: own(d).update({name: value}))))
    cache = open_cache(tmp_path)
    calls: list[Callable[[], Any]] = [
        lambda: cache.read_shard(0),
        lambda: cache.zarr_group(0),
        lambda: cache.manifest,
        lambda: cache.sequences([0]),
    ]
    for call in calls:
        with pytest.raises(CacheError, match="shard 0"):
            call()
    assert not cache.verify().ok


def test_a_manifest_that_multiplies_one_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    table = open_cache(tmp_path).manifest
    rows = pa.Table.from_pylist(table.to_pylist() * 1500, schema=table.schema)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 1500, pa.int32()), ["a" * 2**20])
    for name, column in (("shard", pa.array(range(1500), table.schema.field("shard").type)), ("attempt", text)):
        rows = rows.set_column(rows.column_names.index(name), name, column)
    # without Arrow's own schema: the column is text, whose one value is kept once
    pq.write_table(rows, tmp_path / "manifest.parquet", compression="zstd", store_schema=False)
    assert pq.read_schema(tmp_path / "manifest.parquet").field("attempt").type == pa.string()
    tracemalloc.start()
    try:
        with pytest.raises(CacheError, match=r"manifest\.parquet: not readable as a manifest \(1500 rows in \d+ bytes"):
            open_cache(tmp_path)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("change", [{"required": []}, {"version": True}])
def test_a_spec_that_hides_what_it_needs_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    document = json.loads(make_spec(codec="smallest").to_json()) | change
    (tmp_path / "spec.json").write_text(json.dumps(document))
    with pytest.raises(CacheError, match=r"spec\.json"):
        open_cache(tmp_path)


def test_the_hash_covers_every_byte_before_it(tmp_path: Path) -> None:
    write(tmp_path, 1)
    data = (tmp_path / "shards" / "0.zarr.zip").read_bytes()
    assert data[-HASH_LENGTH:].decode() == digest(data)
    check_bytes(data)
