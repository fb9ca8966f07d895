"""What fails in a capture surfaces whole, leaves nothing inconsistent and nobody waiting; a later call completes it."""

import errno
import io
import json
import os
import queue
import re
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from capture_cases import VOCAB, Causal, contents, documents
from torch import Tensor

import fastkd
from fastkd.cache import CacheError, StoreError, create_cache, open_cache, verify_cache
from fastkd.cache import writer as writer_module
from fastkd.cache.stores import MemoryStore
from fastkd.data.documents import open_documents
from fastkd.data.lengths import lengths_from_npz, lengths_to_npz
from fastkd.errors import DataError, TeacherError
from fastkd.settings import CaptureSettings
from fastkd.teacher import claims as claims_module
from fastkd.teacher import job as job_module
from fastkd.teacher.claims import Claims
from fastkd.teacher.job import CaptureReport, Job, Stop
from fastkd.teacher.modules import ModuleTeacher
from fastkd.teacher.pipeline import Ask, Runner
from fastkd.teacher.prepare import keep_plan, prepare

SMALL: dict[str, Any] = {
    "k": 5,
    "draws": 3,
    "context": 16,
    "shard_positions": 64,
    "batch_tokens": 40,
    "held_out": 0.2,
    "fingerprint": "the same",
}


def capture(out: Any, data: Any = None, teacher: Any = None, **changes: Any) -> CaptureReport:
    return fastkd.capture(teacher or Causal(), documents() if data is None else data, out, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def whole() -> dict[int, str]:
    """What an uninterrupted capture holds."""
    store: Any = MemoryStore()
    assert capture(store).complete
    return contents(store)


def consistent(store: Any, whole: dict[int, str]) -> int:
    """What is there after a failure is right, and no thread goes on with it; how many shards there are."""
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fastkd") and "topk" not in t.name]
    if not any(entry.key == "spec.json" for entry in store.list("")):
        assert not list(store.list("shards/"))
        return 0
    problems = verify_cache(store, deep=True).problems
    assert [problem for problem in problems if "it is missing" not in problem.what] == []
    there = contents(store)
    assert there.items() <= whole.items()
    return len(there)


def nobody_waits(store: Any) -> None:
    """What is not written may be taken by a worker on another machine, at once."""
    names = {entry.key.split("/")[1] for entry in store.list("claims/")}
    there = {Path(entry.key).name.split(".")[0] for entry in store.list("shards/")}
    if any(entry.key == "lengths.npz" for entry in store.list("")):
        there.add("lengths")
    other = Claims(store, 7, 8)
    other._me["host"] = "elsewhere"
    assert {name: other.take(name) for name in names - there} == dict.fromkeys(names - there, 0.0)
    for name in other.held:
        other.drop(name)


def completes(store: Any, whole: dict[int, str], **changes: Any) -> None:
    """A later call writes what is missing, and the cache is the one that nobody interrupted."""
    before = len(list(store.list("shards/")))
    report = capture(store, **changes)
    assert report.complete
    assert report.shards_written == len(whole) - before
    assert contents(store) == whole
    assert verify_cache(store, deep=True).ok
    assert open_cache(store).sealed


# --- stores that fail ------------------------------------------------------------------------------------------------


class Unreliable(MemoryStore):
    """Every n-th request fails; a creation, before the object is made or after."""

    def __init__(self, every: int, after: bool) -> None:
        super().__init__()
        self.every, self.after, self.requests = every, after, 0

    def _fails(self) -> bool:
        self.requests += 1
        return self.requests % self.every == 0

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

    def list(self, prefix: str) -> Any:
        if self._fails():
            raise StoreError(f"unreliable: listing {prefix}")
        return super().list(prefix)


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("every", [3, 29, 47])
def test_a_store_that_fails_every_nth_request(every: int, after: bool, whole: dict[int, str]) -> None:
    store, failures = Unreliable(every, after), 0
    for _ in range(40):
        try:
            report = capture(store)
            break
        except StoreError as error:
            assert "unreliable" in str(error)
            failures += 1
        requests, store.every = store.requests, 10**9
        consistent(store, whole)
        store.requests, store.every = requests, every
    store.every = 10**9
    assert failures > 0
    if every > 3:
        assert report.complete
        assert contents(store) == whole
    else:
        completes(store, whole)


def test_a_manifest_that_cannot_be_reached_is_the_stores_fault() -> None:
    """Not the cache's: the job may be tried again."""
    store: Any = MemoryStore()
    capture(store)
    get = store.get

    def broken(key: str) -> bytes:
        if key == "manifest.parquet":
            raise StoreError("the line is dead")
        data: bytes = get(key)
        return data

    store.get = broken
    with pytest.raises(StoreError, match="the line is dead"):
        open_cache(store)


class Without(MemoryStore):
    """Has no room for objects of these names, as long as it is full."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern, self.full, self.refused = re.compile(pattern), True, 0

    def create(self, key: str, data: Any) -> bool:
        if self.full and self.pattern.fullmatch(key):
            self.refused += 1
            raise StoreError(f"memory: creation of {key!r} failed: No space left on device.")
        return super().create(key, data)


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
    with pytest.raises(StoreError, match=r"(?i)read-only"):
        capture(small_disk, teacher=teacher)
    assert not list(small_disk.iterdir())
    remount(small_disk, "rw")
    assert capture(small_disk).complete
    remount(small_disk, "ro")
    assert capture(small_disk).complete, "there is nothing to do"
    assert contents(small_disk) == whole


# --- data that change ------------------------------------------------------------------------------------------------


class Then(Causal):
    """Does something at its n-th batch."""

    def __init__(self, after: int, action: Callable[[], Any]) -> None:
        super().__init__()
        self.after, self.action = after, action

    def forward(self, tokens: Tensor) -> Any:
        if len(self.calls) == self.after:
            self.action()
        return super().forward(tokens)


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
    with pytest.raises(DataError, match=rf"data\{suffix}: the file (was changed after|cannot be found)"):
        capture(store, path, Then(3, act))
    assert consistent(store, whole) < len(whole)
    nobody_waits(store)
    if change == "other":
        with pytest.raises(CacheError, match=r"\(data: sha256 "):
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
    with pytest.raises(DataError, match=r"the lengths of 29 documents, where there are 30\. Delete it"):
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
    ask, asked = Job._ask, []

    def counted(job: Job, index: int, *args: Any) -> Any:
        asked.append(index)
        if len(asked) == 4:
            told.set()
            while job._submitted and not all(future.done() for future in job._submitted.values()):
                time.sleep(0.001)
        return ask(job, index, *args)

    monkeypatch.setattr(Job, "_ask", counted)
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
    with pytest.raises(ValueError, match="progress: found 'bars'; one of none, bar, lines, events"):
        capture(MemoryStore(), progress="bars")


# --- several workers -------------------------------------------------------------------------------------------------


class Overtaken(MemoryStore):
    """Before an object of this name is made, somebody else does something."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key, self.action = key, lambda: None

    def create(self, key: str, data: Any) -> bool:
        if key == self.key:
            self.key = ""
            self.action()
        return super().create(key, data)


@pytest.mark.parametrize("key", ["claims/lengths/0.json", "lengths.npz", "plan.json", "spec.json"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 15}, "context: (15 and 16|16 and 15)"),
        ({"batch_tokens": 41, "k": 6}, "batch_tokens: (41 and 40|40 and 41)"),
        ({"k": 6}, "k: 6 and 5"),
        ({"teacher": Causal(seed=1), "fingerprint": "another"}, "teacher: 'another' and 'the same'"),
        ({"seed": 4}, "seed: (4 and 0|0 and 4)"),
        ({"data": documents(seed=1)}, "data: sha256|these are the lengths of the dataset"),
    ],
)
def test_of_two_that_begin_at_once_with_other_settings_one_is_refused(
    changes: dict[str, Any], message: str, key: str, whole: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "FIRST_SECONDS", 0.01)
    store, refused = Overtaken(key), []

    def attempt(**some: Any) -> None:
        try:
            assert capture(store, **some).complete
        except (CacheError, DataError) as error:
            assert not isinstance(error, StoreError)
            refused.append((some, str(error)))

    store.action = lambda: attempt(**changes)
    attempt()
    assert len(refused) == 1
    assert re.search(message, refused[0][1])
    if refused[0][0]:
        completes(store, whole)
    else:
        assert capture(store, **changes).shards_written == 0


def prepared(store: Any, claims: Claims, **options: Any) -> Job:
    """A job whose spec and plan are in the store."""
    data, settings = open_documents(documents(), vocab_size=VOCAB), CaptureSettings(**without(SMALL))
    teacher = ModuleTeacher(Causal(), vocab_size=VOCAB, fingerprint="the same")
    found = prepare(teacher, data, settings, store, claims)
    keep_plan(store, found.plan)
    runner = Runner(teacher, Ask(k=settings.k, draws=settings.draws, seed=settings.seed))
    job = Job(runner, data, found.plan, store, claims, **options)
    job.spec = found.spec  # type: ignore[attr-defined]
    return job


def without(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "fingerprint"}


def run(job: Job) -> CaptureReport:
    with create_cache(job._store, job.spec) as writer:  # type: ignore[attr-defined]
        return job.run(writer)


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds < 10
        self.now += seconds


def test_a_worker_that_died_elsewhere_is_waited_for_and_then_taken_over(whole: dict[int, str]) -> None:
    store, clock = MemoryStore(), Clock()
    gone = Claims(store, 1, 2, clock)
    gone._me["host"] = "elsewhere"
    for name in ("1", "3"):
        assert gone.take(name) == 0.0
    clock.now += 30
    gone.keep()
    begun = clock.now
    job = prepared(store, Claims(store, 0, 2, clock), rank=0, world_size=2, sleep=clock.sleep)
    report = run(job)
    assert report.complete
    assert report.shards_written == len(whole)
    assert contents(store) == whole
    assert clock.now == pytest.approx(begun + 90), "as long as it had worked, and a minute"


def test_a_stop_ends_the_wait_for_others(whole: dict[int, str]) -> None:
    store, clock, stop = MemoryStore(), Clock(), Stop()
    other = Claims(store, 1, 2, clock)
    other._me["host"] = "elsewhere"
    assert other.take("5") == 0.0

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        stop()

    report = run(prepared(store, Claims(store, 0, 2, clock), rank=0, world_size=2, stop=stop, sleep=sleep))
    assert report.missing == [[5, 5]]
    assert report.status == 75
    assert consistent(store, whole) == len(whole) - 1


def test_only_what_is_run_is_read(whole: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """While another works at some of the shards that are left."""
    store, clock, read, rows = MemoryStore(), Clock(), [], job_module.rows
    other = Claims(store, 1, 2, clock)
    other._me["host"] = "elsewhere"
    held = ["4", "7"]
    for name in held:
        assert other.take(name) == 0.0

    def counted(plan: Any, data: Any, index: int) -> Any:
        read.append(index)
        return rows(plan, data, index)

    monkeypatch.setattr(job_module, "rows", counted)
    assert run(prepared(store, Claims(store, 0, 2, clock), rank=0, world_size=2, sleep=clock.sleep)).complete
    assert contents(store) == whole
    # what was read ahead and turned out to be another's is read once more, not each time
    assert len(read) <= len(whole) + 2 * len(held)


def test_a_cache_that_was_sealed_too_early_is_refused_before_the_teacher_runs(whole: dict[int, str]) -> None:
    store, stop = MemoryStore(), Stop()
    assert not capture(store, teacher=Then(12, stop), stop=stop).complete
    with fastkd.cache.open_writer(store) as writer:
        writer.seal()
    teacher = Causal()
    with pytest.raises(CacheError, match=r"the cache is sealed, with \d of 11 shards. .* delete manifest.parquet"):
        capture(store, teacher=teacher)
    assert len(teacher.calls) == 1
    del store._objects["manifest.parquet"]
    completes(store, whole)


# --- several processes as one worker ---------------------------------------------------------------------------------


class Threads:
    """A group of two, for threads that stand for processes."""

    def __init__(self, leader: bool, line: "queue.Queue[Any]") -> None:
        self.leader, self.line = leader, line

    def share(self, value: Any) -> Any:
        if self.leader:
            self.line.put(value)
            return value
        return self.line.get(timeout=60)


def together(store: Any, **changes: Any) -> dict[str, Any]:
    """A capture by a group of two: what each of them returned or raised."""
    line: queue.Queue[Any] = queue.Queue()
    found: dict[str, Any] = {}
    teachers = changes.pop("teachers", {})

    def one(name: str) -> None:
        try:
            found[name] = capture(store, teacher=teachers.get(name), group=Threads(name == "leader", line), **changes)
        except BaseException as error:
            found[name] = error

    threads = [threading.Thread(target=one, args=(name,)) for name in ("leader", "follower")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert line.empty(), "each was told what the other said"
    return found


def test_a_group_is_one_worker(whole: dict[int, str]) -> None:
    store = MemoryStore()
    found = together(store)
    assert found["leader"].complete
    assert found["follower"].status == 0
    assert found["follower"].shards_written == 0
    assert contents(store) == whole


@pytest.mark.parametrize(
    "pattern", ["plan.json", "spec.json", "claims/[0-9]+/0.json", "claims/4/0.json", r"shards/[3-9]\.zarr\.zip"]
)
def test_a_leader_that_fails_leaves_nobody_behind(pattern: str, whole: dict[int, str]) -> None:
    store = Without(pattern)
    found = together(store)
    assert isinstance(found["leader"], StoreError)
    assert isinstance(found["follower"], CaptureReport)
    assert found["follower"].status == 75
    store.full = False
    completes(store, whole)


def test_a_teacher_that_fails_fails_in_the_whole_group(whole: dict[int, str]) -> None:
    store = MemoryStore()

    def fail() -> None:
        raise TeacherError("it says NaN")

    found = together(store, teachers={name: Then(9, fail) for name in ("leader", "follower")})
    assert [str(found[name]) for name in ("leader", "follower")] == ["it says NaN"] * 2
    completes(store, whole)


def test_a_group_is_stopped_by_its_leader(whole: dict[int, str]) -> None:
    store, stop = MemoryStore(), Stop()
    found = together(store, teachers={"leader": Then(9, stop), "follower": Then(9, lambda: None)}, stop=stop)
    assert [found[name].status for name in ("leader", "follower")] == [75, 75]
    completes(store, whole)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_a_job_holds_few_shards_at_a_time(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the writer is: one that is run, those that are encoded, and one that waits."""
    alive: set[int] = set()
    most, made, encode, room = 0, 0, writer_module.encode_targets, Runner._room

    def counted(runner: Runner, n: int) -> Any:
        nonlocal most, made
        arrays, made = room(runner, n), made + 1
        alive.add(made)
        weakref.finalize(arrays["ids"], alive.discard, made)
        most = max(most, len(alive))
        return arrays

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return encode(*args)

    monkeypatch.setattr(Runner, "_room", counted)
    monkeypatch.setattr(writer_module, "encode_targets", slow)
    assert capture(MemoryStore(), documents(90), threads=threads).complete
    assert made > 25
    assert 2 <= most <= threads + 2
    assert not alive
