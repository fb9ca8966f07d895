"""Claims: who may work on what, by a clock of the test's own."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore.store
import pytest

from fastkd.cache import StoreError, open_store
from fastkd.cache.errors import Refused
from fastkd.cache.stores import MemoryStore
from fastkd.capture import claims as claims_module
from fastkd.capture.claims import FIRST_SECONDS, LONGEST_SECONDS, Claims


class Clock:
    def __init__(self, now: float = 1e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def elsewhere(claims: Claims) -> Claims:
    """The same worker on another machine: whether it lives cannot be known here."""
    claims._me["host"] = "elsewhere"
    return claims


def pair(clock: Clock, store: Any = None) -> tuple[Claims, Claims]:
    """Two workers of two, the first of them on another machine."""
    store = store if store is not None else MemoryStore()
    return elsewhere(Claims(store, 0, 2, clock)), Claims(store, 1, 2, clock)


def newest(store: Any, name: str) -> dict[str, Any]:
    keys = [entry.key for entry in store.list(f"claims/{name}/")]
    claim: dict[str, Any] = json.loads(store.get(max(keys, key=lambda key: int(key.split("/")[2][:-5]))))
    return claim


def put(store: Any, name: str, number: int, claim: Any) -> None:
    data = claim if isinstance(claim, bytes) else json.dumps(claim).encode()
    assert store.create(f"claims/{name}/{number}.json", data)


# --- one and another -------------------------------------------------------------------------------------------------


def test_what_one_holds_another_waits_for() -> None:
    clock = Clock()
    one, other = pair(clock)
    assert one.take("7") == 0.0
    assert one.held == ["7"]
    assert other.take("7") == FIRST_SECONDS
    assert other.held == []
    assert other.take("8") == 0.0
    clock.now += 20
    assert other.take("7") == FIRST_SECONDS - 20
    clock.now += 40
    assert other.take("7") == 0.0


@pytest.mark.parametrize("folder", [True, False])
def test_of_many_at_one_instant_one_gets_it(folder: bool, tmp_path: Path) -> None:
    store: Any = open_store(tmp_path, create=True) if folder else MemoryStore()
    clock = Clock()
    workers = [Claims(store, rank, 8, clock) for rank in range(8)]
    for worker in workers:
        worker._me["process"] = [1, None]  # they are threads here, and stand for machines
    won: dict[str, list[int]] = {}
    ready = threading.Barrier(len(workers))

    def race(rank: int) -> None:
        for name in map(str, range(20)):
            ready.wait()
            if workers[rank].take(name) == 0.0:
                won.setdefault(name, []).append(rank)

    threads = [threading.Thread(target=race, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 20
    assert all(len(ranks) == 1 for ranks in won.values())


def test_a_renewal_lasts_as_long_as_all_before_it_and_is_rare() -> None:
    clock, store = Clock(), MemoryStore()
    one, other = pair(clock, store)
    assert one.take("7") == 0.0
    begun, kept = clock.now, 0
    for _ in range(1200):
        clock.now += 1
        before = len(list(store.list("claims/7/")))
        one.keep()
        kept += len(list(store.list("claims/7/"))) - before
        left = other.take("7")
        # it never comes near its end, and does not outlast the work by more than its length and the first minute
        assert FIRST_SECONDS / 2 - 1 <= left <= (clock.now - begun) + FIRST_SECONDS
    assert 4 <= kept <= 9
    clock.now += left
    assert other.take("7") == 0.0


def test_a_claim_lasts_an_hour_at_most() -> None:
    clock = Clock()
    one, other = pair(clock)
    assert one.take("7") == 0.0
    for _ in range(500):
        clock.now += 60
        one.keep()
    assert other.take("7") <= LONGEST_SECONDS
    clock.now += LONGEST_SECONDS
    assert other.take("7") == 0.0


def test_a_dropped_claim_is_free_at_once_and_one_that_is_done_is_forgotten() -> None:
    clock = Clock()
    one, other = pair(clock)
    for name in ("7", "8"):
        assert one.take(name) == 0.0
    one.drop("7")
    one.drop("7")
    one.drop("unknown")
    one.done("8")
    one.done("8")
    assert one.held == []
    assert other.take("7") == 0.0
    assert other.take("8") > 0
    assert one.take("7") > 0


def test_a_worker_that_was_too_late_gives_up_its_claim_and_leaves_the_others_alone() -> None:
    clock, store = Clock(), MemoryStore()
    one, other = pair(clock, store)
    assert one.take("7") == 0.0
    clock.now += FIRST_SECONDS + 1
    assert other.take("7") == 0.0
    one.keep()
    assert one.held == []
    clock.now += 1
    one.keep()
    one.drop("7")
    assert newest(store, "7")["rank"] == 1
    assert elsewhere(Claims(store, 0, 3, clock)).take("7") > 0


def test_of_its_own_newest_claim_a_worker_need_not_wait() -> None:
    """An answer was lost: the store says that somebody was faster, and it was this one."""
    clock, store = Clock(), MemoryStore()
    one = Claims(store, 0, 2, clock)
    create = store.create

    def lost(key: str, data: Any) -> bool:
        create(key, data)
        return False

    store.create = lost  # type: ignore[method-assign]
    assert one.take("7") == 0.0
    assert one.held == ["7"]
    store.create = create  # type: ignore[method-assign]
    assert one.take("7") == 0.0


# --- who is gone -----------------------------------------------------------------------------------------------------


def test_a_predecessor_of_the_same_rank_is_not_waited_for() -> None:
    clock, store = Clock(), MemoryStore()
    assert elsewhere(Claims(store, 1, 2, clock)).take("7") == 0.0
    assert Claims(store, 1, 3, clock).take("7") > 0, "of another world_size this rank is somebody else"
    assert Claims(store, 0, 2, clock).take("7") > 0
    assert Claims(store, 1, 2, clock).take("7") == 0.0


def test_a_job_that_failed_in_this_process_is_a_predecessor() -> None:
    clock, store = Clock(), MemoryStore()
    assert Claims(store, 0, 1, clock).take("7") == 0.0
    assert Claims(store, 0, 1, clock).take("7") == 0.0


def child(store: Any, clock: Clock, rank: int, world_size: int, program: str) -> "subprocess.Popen[bytes]":
    """A process of this machine that holds the claim "7"."""
    process = subprocess.Popen([sys.executable, "-c", program])
    worker = Claims(store, rank, world_size, clock)
    worker._me["process"] = claims_module._process(process.pid)
    assert worker._me["process"][1] is not None
    assert worker.take("7") == 0.0
    return process


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="whether a process lives cannot be known here")
@pytest.mark.parametrize(("rank", "world_size"), [(1, 2), (0, 1)])
def test_a_living_process_of_this_machine_is_respected_and_a_dead_one_is_not(rank: int, world_size: int) -> None:
    """Of the same rank, too: the command was started twice."""
    clock, store = Clock(), MemoryStore()
    process = child(store, clock, rank, world_size, "input()")
    me = Claims(store, 0, world_size, clock)
    try:
        assert me.take("7") == FIRST_SECONDS
    finally:
        process.kill()
    # killed, and its parent has not asked how it ended: what is left of it does no work
    state = Path(f"/proc/{process.pid}/stat")
    while state.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)
    assert me.take("7") == 0.0
    process.wait()
    assert Claims(store, 1, 3, clock).take("7") > 0, "now it is mine, and I live"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="whether a process lives cannot be known here")
def test_a_later_process_of_the_same_number_is_another() -> None:
    clock, store = Clock(), MemoryStore()
    one = Claims(store, 0, 2, clock)
    one._me["process"] = [os.getpid(), one._me["process"][1] - 1]
    assert one.take("7") == 0.0
    assert Claims(store, 1, 2, clock).take("7") == 0.0


def test_the_same_process_number_in_another_place_says_nothing() -> None:
    clock, store = Clock(), MemoryStore()
    one = elsewhere(Claims(store, 0, 2, clock))
    one._me["process"] = [2**22 + 1, 5]
    assert one.take("7") == 0.0
    assert Claims(store, 1, 2, clock).take("7") > 0


# --- what is no claim ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "claim",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b"\xff\xfe",
        b"[" * 100_000,
        {},
        {"expires": "never", "seconds": 60},
        {"expires": None, "seconds": 60},
        {"expires": [], "seconds": {}},
        {"expires": 1e9 + 50},
        {"expires": float("nan"), "seconds": 60},
        {"expires": float("inf"), "seconds": 60},
        {"expires": 1e9 + 50, "seconds": float("inf")},
        {"expires": 1e9 + 50, "seconds": float("nan")},
        {"expires": 10**400, "seconds": 60},
        {"expires": 1e9 + 50, "seconds": -(10**400)},
        {"expires": 1e9 + 50, "seconds": -1},
    ],
)
def test_what_is_no_claim_holds_nobody_up(claim: Any) -> None:
    store = MemoryStore()
    put(store, "7", 3, claim)
    worker = Claims(store, 0, 2, Clock())
    assert worker.take("7") == 0.0
    assert newest(store, "7")["worker"] == worker._me["worker"]


@pytest.mark.parametrize(
    "process", [None, [], [1], ["1", 2, 3], "self", [{}, 1], [None, 1], [-1, 1], [2**80, 1], ["../1", 1], [1.5, 1]]
)
def test_processes_that_are_none(process: Any) -> None:
    """Where what it says of its process makes no sense, the claim counts until it expires, or as a dead one's."""
    store, clock = MemoryStore(), Clock()
    worker = Claims(store, 0, 2, clock)
    put(store, "7", 0, {"host": worker._me["host"], "process": process, "expires": clock.now + 50, "seconds": 60})
    assert worker.take("7") in (0.0, 50.0)
    clock.now += 50
    assert worker.take("7") == 0.0


@pytest.mark.parametrize(
    "name",
    ["9", "9.json.part", "09.json", "-1.json", "x.json", "1e9.json", "٣.json", "inner/99.json", "9" * 5000 + ".json"],
)
def test_other_objects_among_claims_hide_none(name: str) -> None:
    store, clock = MemoryStore(), Clock()
    one, other = pair(clock, store)
    store.create(f"claims/7/{name}", b"{}")
    assert one.take("7") == 0.0
    assert other.take("7") == FIRST_SECONDS


def test_a_claim_that_is_tidied_up_between_listing_and_reading() -> None:
    clock, store = Clock(), MemoryStore()
    one, other = pair(clock, store)
    assert one.take("7") == 0.0
    entries = list(store.list("claims/7/"))
    store._objects.clear()
    store.list = lambda prefix: iter(entries)  # type: ignore[method-assign]
    assert other.take("7") == 0.0


# --- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [600.0, 86400.0, 1e9])
def test_a_clock_far_ahead_holds_nobody_up_for_ever(ahead: float) -> None:
    store, clock = MemoryStore(), Clock()
    assert elsewhere(Claims(store, 0, 2, Clock(clock.now + ahead))).take("7") == 0.0
    other = Claims(store, 1, 2, clock)
    assert other.take("7") == FIRST_SECONDS
    clock.now += FIRST_SECONDS - 1
    assert other.take("7") == 1.0
    clock.now += 1
    assert other.take("7") == 0.0


def test_a_living_worker_whose_clock_is_ahead_is_respected() -> None:
    store, fast, clock = MemoryStore(), Clock(1e9 + 900), Clock(1e9)
    one, other = elsewhere(Claims(store, 0, 2, fast)), Claims(store, 1, 2, clock)
    assert one.take("7") == 0.0
    for _ in range(300):
        fast.now += 5
        clock.now += 5
        one.keep()
        assert other.take("7") > 0


def test_clocks_that_are_seconds_apart_do_no_harm() -> None:
    store, slow, clock = MemoryStore(), Clock(1e9 - 10), Clock(1e9)
    one, other = elsewhere(Claims(store, 0, 2, slow)), Claims(store, 1, 2, clock)
    assert one.take("7") == 0.0
    for _ in range(300):
        slow.now += 5
        clock.now += 5
        one.keep()
        assert other.take("7") > 0


@pytest.mark.parametrize("jump", [-1e8, -3600.0, 3600.0, 1e8])
def test_a_clock_that_is_set_while_a_claim_is_held(jump: float) -> None:
    store, clock = MemoryStore(), Clock()
    one, other = pair(clock, store)
    assert one.take("7") == 0.0
    clock.now += jump
    one.keep()
    assert one.held == ["7"]
    assert 0 < other.take("7") <= LONGEST_SECONDS
    for _ in range(20):
        clock.now += 30
        one.keep()
        assert 0 < other.take("7") <= LONGEST_SECONDS
    clock.now += LONGEST_SECONDS
    assert other.take("7") == 0.0


def test_a_clock_that_is_set_back_while_waiting() -> None:
    store, clock = MemoryStore(), Clock()
    one, other = pair(clock, store)
    assert one.take("7") == 0.0
    assert other.take("7") == FIRST_SECONDS
    clock.now -= 1e6
    waited = 0.0
    while (left := other.take("7")) and waited < 2 * LONGEST_SECONDS:
        step = min(left, 5.0)
        clock.now += step
        waited += step
    assert waited <= 2 * FIRST_SECONDS


# --- stores ----------------------------------------------------------------------------------------------------------


STORES: dict[str, Callable[[Path], Any]] = {
    "memory": lambda path: MemoryStore(),
    "folder": lambda path: open_store(path, create=True),
    "obstore memory": lambda path: open_store(obstore.store.MemoryStore()),
    "obstore folder": lambda path: open_store(obstore.store.LocalStore(path)),
}


@pytest.mark.parametrize("kind", STORES)
def test_one_name_begins_like_another(kind: str, tmp_path: Path) -> None:
    store, clock = STORES[kind](tmp_path), Clock()
    one, other = pair(clock, store)
    try:
        assert one.take("10") == 0.0
    except StoreError as error:
        pytest.skip(f"this store cannot be written to: {error}")
    assert one.take("1x") == 0.0
    assert list(store.list("claims/1/")) == []
    assert other.take("1") == 0.0
    assert other.take("10") == FIRST_SECONDS
    assert one.take("1") == FIRST_SECONDS
    for _ in range(12):  # more than nine: numbers are no texts
        other.drop("1")
        assert other.take("1") == 0.0
    assert one.take("1") == FIRST_SECONDS
    assert sorted({entry.key.split("/")[1] for entry in store.list("claims/")}) == ["1", "10", "1x"]


class Failing(MemoryStore):
    """Fails when told to."""

    broken = False

    def create(self, key: str, data: Any) -> bool:
        if self.broken:
            raise StoreError("the line is dead")
        return super().create(key, data)


def test_a_store_that_fails_loses_no_claim_and_stops_nobody() -> None:
    clock, store = Clock(), Failing()
    one, other = pair(clock, store)
    for name in ("7", "8"):
        assert one.take(name) == 0.0
    clock.now += FIRST_SECONDS / 2
    store.broken = True
    one.keep()
    assert one.held == ["7", "8"]
    assert other.take("7") == FIRST_SECONDS / 2
    with pytest.raises(StoreError, match="the line is dead"):
        other.take("9")
    assert other.held == []
    store.broken = False
    one.keep()
    assert other.take("7") > FIRST_SECONDS / 2
    store.broken = True
    one.drop("7")
    one.drop("8")
    assert one.held == []


class ResetOnce(MemoryStore):
    """Its n-th request for a claim fails once; of a PUT, before or after it took effect."""

    def __init__(self, at: int, after: bool = False, error: type[StoreError] = StoreError) -> None:
        super().__init__()
        self.at, self.after, self.error, self.requests = at, after, error, 0

    def _fail(self) -> bool:
        self.requests += 1
        return self.requests - 1 == self.at

    def create(self, key: str, data: Any) -> bool:
        failing = self._fail()
        if failing and not self.after:
            raise self.error("the connection was reset")
        done = super().create(key, data)
        if failing:
            raise self.error("the connection was reset")
        return done

    def list(self, prefix: str) -> Any:
        if self._fail():
            raise self.error("the connection was reset")
        return super().list(prefix)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_reset_of_a_claims_request_is_no_end(at: int, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "_PAUSE", 0.0)
    clock, store = Clock(), ResetOnce(at, after)
    one = Claims(store, 0, 2, clock)
    for name in ("4", "5"):
        assert one.take(name) == 0.0
    assert one.held == ["4", "5"]
    assert elsewhere(Claims(store, 1, 2, clock)).take("4") > 0


def test_a_request_that_is_refused_is_not_repeated() -> None:
    store = ResetOnce(1, error=Refused)
    with pytest.raises(Refused):
        Claims(store, 0, 1).take("4")
    assert store.requests == 2
