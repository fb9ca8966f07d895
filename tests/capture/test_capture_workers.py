"""Several workers, and several processes that are one: who does what, who is refused, what is held at a time."""

import queue
import re
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from capture_cases import (
    SMALL,
    VOCAB,
    Causal,
    Then,
    Without,
    capture,
    completes,
    consistent,
    contents,
    documents,
    uninterrupted,
)

import fastkd
from fastkd.cache import CacheError, StoreError, create_cache
from fastkd.cache import writer as writer_module
from fastkd.cache.stores import MemoryStore
from fastkd.capture import claims as claims_module
from fastkd.capture import runner as job_module
from fastkd.capture import teacher_pass as teacher_pass_module
from fastkd.capture.claims import Claims
from fastkd.capture.prepare import prepare, write_window_plan
from fastkd.capture.runner import CaptureReport, CaptureRunner
from fastkd.capture.teacher_pass import TeacherPass
from fastkd.data.documents import open_documents
from fastkd.errors import DataError, TeacherError, WorkRemains
from fastkd.kernels import SparseTargets
from fastkd.settings import CaptureSettings
from fastkd.teachers.module import ModuleTeacher
from fastkd.utils.signals import Stop


@pytest.fixture(scope="module")
def whole() -> dict[int, str]:
    """What an uninterrupted capture holds."""
    return uninterrupted()


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
        ({"data": documents(seed=1)}, "data: sha256 "),
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


def prepared(store: Any, claims: Claims, **options: Any) -> CaptureRunner:
    """A job whose spec and plan are in the store."""
    data, settings = open_documents(documents(), vocab_size=VOCAB), CaptureSettings(**without(SMALL))
    teacher = ModuleTeacher(Causal(), vocab_size=VOCAB, fingerprint="the same")
    plan, spec = prepare(teacher, data, settings, store, claims)
    write_window_plan(store, plan)
    job = CaptureRunner(TeacherPass(teacher, settings), data, plan, store, claims, **options)
    job.spec = spec  # type: ignore[attr-defined]
    return job


def without(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "fingerprint"}


def run(job: CaptureRunner) -> CaptureReport:
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
    store, clock, read, read_rows = MemoryStore(), Clock(), [], job_module.read_shard_rows
    other = Claims(store, 1, 2, clock)
    other._me["host"] = "elsewhere"
    held = ["4", "7"]
    for name in held:
        assert other.take(name) == 0.0

    def counted(plan: Any, data: Any, index: int) -> Any:
        read.append(index)
        return read_rows(plan, data, index)

    monkeypatch.setattr(job_module, "read_shard_rows", counted)
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
    assert found["follower"] == found["leader"]
    assert contents(store) == whole


@pytest.mark.parametrize(
    "pattern", ["plan.json", "spec.json", "claims/[0-9]+/0.json", "claims/4/0.json", r"shards/[3-9]\.zarr\.zip"]
)
def test_a_leader_that_fails_leaves_nobody_behind(pattern: str, whole: dict[int, str]) -> None:
    store = Without(pattern)
    found = together(store)
    assert isinstance(found["leader"], StoreError)
    assert isinstance(found["follower"], WorkRemains)  # as the leader's, which a later call may not meet
    assert "the leading process of this worker stopped" in str(found["follower"])
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
    most, made, encode = 0, 0, writer_module.encode_targets

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal most, made
        arrays, made = SparseTargets.empty(*args, **options).arrays(), made + 1
        alive.add(made)
        weakref.finalize(arrays["ids"], alive.discard, made)
        most = max(most, len(alive))
        return SimpleNamespace(arrays=lambda: arrays)

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return encode(*args)

    monkeypatch.setattr(teacher_pass_module, "SparseTargets", SimpleNamespace(empty=counted))
    monkeypatch.setattr(writer_module, "encode_targets", slow)
    assert capture(MemoryStore(), documents(90), threads=threads).complete
    assert made > 25
    assert 2 <= most <= threads + 2
    assert not alive
