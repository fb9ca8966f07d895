"""What fails in a capture surfaces whole, leaves nothing inconsistent and nobody waiting; a later call completes it."""

import errno
import io
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from capture_cases import (
    VOCAB,
    Causal,
    Then,
    Without,
    capture,
    completes,
    consistent,
    contents,
    documents,
    nobody_waits,
    uninterrupted,
)

import fastkd
from fastkd.cache import CacheError, StoreError, open_cache
from fastkd.cache import writer as writer_module
from fastkd.cache.stores import MemoryStore
from fastkd.capture import claims as claims_module
from fastkd.capture.teacher_pass import TeacherPass
from fastkd.data.documents import open_documents
from fastkd.data.lengths import lengths_from_npz, lengths_to_npz
from fastkd.errors import DataError


@pytest.fixture(scope="module")
def whole() -> dict[int, str]:
    """What an uninterrupted capture holds."""
    return uninterrupted()


# --- stores that fail ------------------------------------------------------------------------------------------------


class Unreliable(MemoryStore):
    """Every n-th request fails; a creation, before the object is made or after."""

    def __init__(self, every: int, after: bool) -> None:
        super().__init__()
        self.every, self.after, self.requests, self.failed = every, after, 0, 0

    def _fails(self) -> bool:
        self.requests += 1
        fails = self.requests % self.every == 0
        self.failed += fails
        return fails

    def create(self, key: str, data: Any) -> bool:
        fails = self._fails()
        made = super().create(key, data) if self.after or not fails else False
        if fails:
            raise StoreError(f"unreliable: creating {key}")
        return made

    def get(self, key: str) -> bytes:
        if self._fails():
            raise StoreError(f"unreliable: reading {key}")
        return super().get(key)

    def get_tail(self, key: str, length: int) -> bytes:
        if not key.startswith("shards/") and self._fails():
            raise StoreError(f"unreliable: reading {key}")
        return super().get_tail(key, length)

    def list(self, prefix: str) -> Any:
        if self._fails():
            raise StoreError(f"unreliable: listing {prefix}")
        return super().list(prefix)


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("every", [3, 29, 47])
def test_a_store_that_fails_every_nth_request(every: int, after: bool, whole: dict[int, str]) -> None:
    store = Unreliable(every, after)
    for _ in range(40):
        try:
            report = capture(store)
            break
        except StoreError as error:
            assert "unreliable" in str(error)
        requests, store.every = store.requests, 10**9
        consistent(store, whole)
        store.requests, store.every = requests, every
    store.every = 10**9
    assert store.failed > 0  # a failed claim does not stop a capture
    if every > 3:
        assert report.complete
        assert contents(store) == whole
    else:
        completes(store, whole)


def test_a_manifest_that_cannot_be_reached_is_the_stores_fault() -> None:
    """Not the cache's: the job may be tried again."""
    store: Any = MemoryStore()
    capture(store)
    get_tail = store.get_tail

    def broken(key: str, length: int) -> bytes:
        if key == "manifest.parquet":
            raise StoreError("the line is dead")
        data: bytes = get_tail(key, length)
        return data

    store.get_tail = broken
    with pytest.raises(StoreError, match="the line is dead"):
        open_cache(store)


@pytest.mark.parametrize(
    "pattern",
    [
        "claims/lengths/0.json",
        "lengths.npz",
        "plan.json",
        "spec.json",
        "claims/[0-9]+/0.json",
        "claims/4/0.json",
        r"shards/0\.zarr\.zip",
        r"shards/[3-9]\.zarr\.zip",
        "manifest.parquet",
    ],
)
def test_a_disk_that_is_full(pattern: str, whole: dict[int, str]) -> None:
    store = Without(pattern)
    for _ in range(2):
        with pytest.raises(StoreError, match="No space left"):
            capture(store)
        consistent(store, whole)
        nobody_waits(store)
    store.full = False
    completes(store, whole)


def test_renewals_of_claims_may_fail(whole: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "FIRST_SECONDS", 1e-6)
    store = Without(r"claims/[0-9]+/[1-9][0-9]*\.json")
    completes(store, whole)
    assert store.refused > len(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small disk needs more rights")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def test_a_real_disk_fills_and_is_then_made_larger(small_disk: Path, whole: dict[int, str]) -> None:
    store = fastkd.cache.open_store(small_disk)
    with pytest.raises(StoreError, match="space"):
        capture(small_disk)
    assert 0 < consistent(store, whole) < len(whole)
    nobody = {path: path.read_bytes() for path in (small_disk / "shards").iterdir()}
    remount(small_disk, "size=10m")
    completes(store, whole)
    assert all(path.read_bytes() == data for path, data in nobody.items())


def test_a_folder_that_may_only_be_read(small_disk: Path, whole: dict[int, str]) -> None:
    remount(small_disk, "size=10m")
    remount(small_disk, "ro")
    teacher = Causal()
    with pytest.raises(CacheError, match="got a place that cannot be written"):
        capture(small_disk, teacher=teacher)
    assert not list(small_disk.iterdir())
    remount(small_disk, "rw")
    assert capture(small_disk).complete
    remount(small_disk, "ro")
    assert capture(small_disk).complete, "there is nothing to do"
    assert contents(small_disk) == whole


# --- data that change ------------------------------------------------------------------------------------------------


def written(path: Path, data: list[list[int]]) -> Path:
    table = pa.table({"tokens": pa.array(data, pa.list_(pa.int32()))})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        pyarrow.feather.write_feather(table, path, compression="uncompressed")
    else:
        path.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in data))
    os.utime(path, (1e9, 1e9))
    return path


@pytest.mark.parametrize("change", ["cut off", "emptied", "gone", "other"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl"])
def test_a_file_that_changes_between_planning_and_reading(suffix: str, change: str, tmp_path: Path) -> None:
    """Of an Arrow file that is mapped into memory, what is cut off would kill the process."""
    data, store = documents(), MemoryStore()
    path = written(tmp_path / f"data{suffix}", data)
    assert capture(store, path).complete
    whole, good, store = contents(store), path.read_bytes(), MemoryStore()

    def act() -> None:
        if change == "cut off":
            with open(path, "r+b") as file:
                file.truncate(len(good) // 3)
        elif change == "emptied":
            path.write_bytes(b"")
        elif change == "gone":
            path.unlink()
        else:
            written(path, [[(token + 1) % VOCAB for token in tokens] for tokens in data])
            os.utime(path)

    # the first shard is being run, the second read ahead
    with pytest.raises(DataError, match=rf"data\{suffix}: the file (was changed after|became shorter|is gone)"):
        capture(store, path, Then(3, act))
    assert consistent(store, whole) < len(whole)
    nobody_waits(store)
    if change == "other":
        with pytest.raises(CacheError, match="now: data: sha256 "):
            capture(store, path)
    path.write_bytes(good)
    completes(store, whole, data=path)


def test_a_file_that_changes_while_it_is_measured(tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", documents())
    data = open_documents(path, vocab_size=VOCAB)
    fingerprint = data.fingerprint()
    with open(path, "ab") as file:
        file.write(b'{"tokens": [1, 2, 3]}\n')
    with pytest.raises(DataError, match="was changed after it was opened"):
        data.lengths()
    with pytest.raises(DataError, match="was changed after it was opened"):
        data.fingerprint()
    assert open_documents(path, vocab_size=VOCAB).fingerprint() != fingerprint


def texts(broken: Callable[[str], bool]) -> Any:
    def tokenizer(text: str) -> list[int]:
        if broken(text):
            raise KeyError("no such word")
        return [ord(c) % VOCAB for c in text]

    lines = [f"document number {n} " * (n % 5 + 1) for n in range(20)]
    return open_documents(lines, tokenizer=tokenizer, tokenizer_fingerprint="the same", vocab_size=VOCAB)


@pytest.mark.parametrize("first", [True, False])
def test_a_tokenizer_that_fails_at_one_document(first: bool) -> None:
    """While the data are measured; or later, while they are read."""
    store, seen = MemoryStore(), []

    def broken(text: str) -> bool:
        seen.append(text)
        return "number 13" in text and (first or seen.count(text) > 1)

    store_of_all = MemoryStore()
    assert capture(store_of_all, texts(lambda text: False)).complete
    whole = contents(store_of_all)
    with pytest.raises(DataError, match=r"document 13 \(from 0\): the tokenizer failed: KeyError: 'no such word'"):
        capture(store, texts(broken))
    consistent(store, whole)
    nobody_waits(store)
    completes(store, whole, data=texts(lambda text: False))


def test_lengths_that_are_damaged_are_named(whole: dict[int, str]) -> None:
    store = MemoryStore()
    capture(store)
    good = store.get("lengths.npz")
    truth, noticed = lengths_from_npz(good, fingerprint := documents_fingerprint(), "there"), 0
    for place in range(len(good)):
        for bad in (good[:place], good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :]):
            try:
                assert lengths_from_npz(bad, fingerprint, "there").tolist() == truth.tolist()
            except DataError as error:
                assert re.match("there: .*Delete it", str(error))
                noticed += 1
    assert noticed > len(good)
    store._objects["lengths.npz"] = good[:70]
    with pytest.raises(DataError, match=r"memory://, lengths\.npz: no lengths can be read .* Delete it"):
        capture(store)
    store._objects["lengths.npz"] = lengths_to_npz(truth[1:], fingerprint)
    with pytest.raises(DataError, match=r"got the lengths of 29 documents; expected 30\. Delete it"):
        capture(store)
    del store._objects["lengths.npz"]
    assert capture(store).complete
    assert store.get("lengths.npz") == good


def documents_fingerprint() -> str:
    return open_documents(documents(), vocab_size=VOCAB).fingerprint()


def test_lengths_of_other_data_are_not_taken(whole: dict[int, str]) -> None:
    """A worker was killed between lengths and plan; then the data changed."""
    store = Without("plan.json")
    with pytest.raises(StoreError):
        capture(store)
    store.full = False
    expected = MemoryStore()
    capture(expected, documents(seed=1))
    assert capture(store, documents(seed=1)).complete
    assert store.get("plan.json") == expected.get("plan.json")


# --- teachers and writers that fail ----------------------------------------------------------------------------------


class OfOnesOwn(Exception):
    """A teacher's."""


@pytest.mark.parametrize("error", [OfOnesOwn("the power is out"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("at", ["first", "middle", "last"])
def test_a_teacher_that_fails(error: BaseException, at: str, whole: dict[int, str]) -> None:
    counting = Causal()
    assert capture(MemoryStore(), teacher=counting).complete
    calls = len(counting.calls)
    # before the first there is the call that finds out how wide its logits are
    after = {"first": 1, "middle": calls // 2, "last": calls - 1}[at]
    store = MemoryStore()

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        capture(store, teacher=Then(after, fail))
    assert raised.value is error
    there = consistent(store, whole)
    assert there < len(whole)
    assert (there > 0) == (at != "first")
    nobody_waits(store)
    completes(store, whole)


def test_an_error_in_the_writer_stops_the_teacher_at_the_next_shard(
    whole: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, teacher, encode = MemoryStore(), Causal(), writer_module.encode_targets
    encoded, told = [], threading.Event()

    def broken(*args: Any) -> Any:
        encoded.append(len(teacher.calls))
        if len(encoded) == 3:
            told.wait()  # until the teacher is at the next shard
            raise CacheError("logprobs: they do not descend")
        return encode(*args)

    monkeypatch.setattr(writer_module, "encode_targets", broken)
    run, asked = TeacherPass.run, []

    def counted(teacher_pass: TeacherPass, rows: Any, batches: Any, data: Any, shard: int, **more: Any) -> Any:
        asked.append(shard)
        submitted = teacher_pass.on_batch.__self__._submitted  # type: ignore[attr-defined]  # of the runner
        if len(asked) == 4:
            told.set()
            while submitted and not all(f.done() for futures in submitted.values() for f in futures.values()):
                time.sleep(0.001)
        return run(teacher_pass, rows, batches, data, shard, **more)

    monkeypatch.setattr(TeacherPass, "run", counted)
    with pytest.raises(CacheError, match="they do not descend"):
        capture(store, teacher=teacher)
    assert asked == [0, 1, 2, 3]
    assert consistent(store, whole) in (2, 3)
    nobody_waits(store)
    monkeypatch.undo()
    completes(store, whole)


def test_an_error_in_the_writer_after_the_last_shard(whole: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    store, encode, calls = MemoryStore(), writer_module.encode_targets, []

    def broken(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == len(whole):
            raise MemoryError("no room for the last shard")
        return encode(*args)

    monkeypatch.setattr(writer_module, "encode_targets", broken)
    with pytest.raises(MemoryError, match="no room for the last"):
        capture(store)
    assert consistent(store, whole) == len(whole) - 1
    nobody_waits(store)
    monkeypatch.undo()
    completes(store, whole)


def test_a_reader_that_goes_away_does_not_end_a_capture(whole: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        number = errno.EPIPE

        def write(self, text: str) -> int:
            raise OSError(self.number, os.strerror(self.number))

    monkeypatch.setattr("sys.stdout", Gone())
    monkeypatch.setattr("sys.stderr", Gone())
    completes(MemoryStore(), whole, progress="events")
    completes(MemoryStore(), whole, progress="lines")
    Gone.number = errno.EIO  # a terminal's
    completes(MemoryStore(), whole, progress="bar")


def test_an_unknown_kind_of_progress_is_refused() -> None:
    with pytest.raises(ValueError, match="progress: got 'bars'; expected one of none, bar, lines, events"):
        capture(MemoryStore(), progress="bars")
