"""Capture of given shards, by schedulers that keep account of them: no claims, and the commit decides."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from capture_cases import Causal, Layered, capture, contents, documents, uninterrupted

import fastkd
from fastkd.cache import CacheError, open_cache
from fastkd.cache.stores import MemoryStore
from fastkd.utils.signals import Stop


def there(store: Any) -> list[int]:
    return sorted(contents(store)) if any(store.list("shards/")) else []


def test_given_shards_are_captured_without_claims() -> None:
    store, whole = MemoryStore(), uninterrupted()
    report = capture(store, shards=[3, 1])
    assert there(store) == [1, 3]
    assert not report.complete
    assert report.status == 75
    assert report.missing == [[0, 0], [2, 2], [4, len(whole) - 1]]
    assert report.shards_written == 2
    again = capture(store, shards=[1, 0])
    assert (again.shards_written, there(store)) == (1, [0, 1, 3])
    last = capture(store, shards=range(len(whole)))
    assert last.complete
    assert contents(store) == whole
    assert open_cache(store).sealed
    claimed = {entry.key.split("/")[1] for entry in store.list("claims/")}
    assert claimed <= {"lengths"}


def test_shards_come_from_an_iterator_that_waits() -> None:
    """The next shard is asked for while the teacher runs; what is written is accounted for during the wait."""
    store, whole, events = MemoryStore(), uninterrupted(), []
    committed = threading.Event()

    def note(event: Any) -> None:
        events.append(dict(event))
        if event["event"] == "shard":
            committed.set()

    def shards() -> Iterator[int]:
        yield 2
        assert committed.wait(60)  # or the capture would wait for the next shard before it has accounted for this one
        yield 2
        yield from range(len(whole))

    assert capture(store, shards=shards(), progress=note).complete
    assert contents(store) == whole
    by_name = {name: [e["shard"] for e in events if e["event"] == name] for name in ("shard", "there")}
    assert sorted(by_name["shard"]) == list(range(len(whole)))
    assert by_name["there"] == [2, 2]


def test_a_stop_ends_the_wait_for_a_shard() -> None:
    store, stop, ended = MemoryStore(), Stop(), threading.Event()

    def shards() -> Iterator[int]:
        yield 0
        stop()
        ended.wait(0.5)

    report = capture(store, shards=shards(), stop=stop)
    assert report.status == 75
    assert report.missing


def test_features_of_given_shards_are_added() -> None:
    store, settings = MemoryStore(), {"features": ("1",)}
    assert capture(store, teacher=Layered()).complete
    report = capture(store, teacher=Layered(), shards=[0], **settings)
    assert report.features["1"].shards_written == 1
    assert not report.complete
    assert capture(store, teacher=Layered(), **settings).complete


@pytest.mark.parametrize("wrong", [99, -1, True, "1"])
def test_shards_that_the_plan_has_not_are_refused(wrong: Any) -> None:
    store = MemoryStore()
    with pytest.raises(CacheError, match=r"shards: got .*; expected numbers from 0 to \d"):
        capture(store, shards=[wrong])
    with pytest.raises(CacheError, match=r"shards: got .*; expected numbers from 0 to \d"):
        capture(store, shards=iter([wrong]))


def test_progress_of_given_shards_counts_only_them() -> None:
    events: list[dict[str, Any]] = []
    fastkd.capture(
        Causal(), documents(), MemoryStore(), k=5, draws=0, context=16, shard_positions=64, fingerprint="x",
        shards=[0], progress=lambda event: events.append(dict(event)),
    )  # fmt: skip
    assert [event["event"] for event in events if event["event"] in ("plan", "shard")] == ["plan", "shard"]
