"""Histories: processes capture into one S3 bucket over a network that fails, some are killed; each key is created once.

S3 is moto's, in a process of its own, behind the proxy of faulty_s3.py, whose log says what was committed.
"""

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from capture_cases import contents
from faulty_s3 import BUCKET, FaultyS3
from test_capture_kills import Server

from fastkd.cache import StoreError, verify_cache
from fastkd.cache.stores import open_store

RANKS, KILLS, ENOUGH = 3, 2, 60  # of a history; starts of a worker, after which something else is wrong
SPAN = 0.6  # seconds: of some two that a worker takes
RATE = 0.25  # of requests that meet a fault


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    with pytest.MonkeyPatch.context() as patch:
        s3 = FaultyS3()
        patch.setenv("AWS_ENDPOINT_URL", s3.url)
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        yield s3
        s3.close()


@pytest.fixture(scope="module")
def server(s3: FaultyS3) -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def state(place: Any) -> dict[str, Any]:
    """A finished cache: its shards by the hash of their contents (a shard also says who wrote it), and the bytes of all
    other objects but claims and the manifest, which names the shards' bytes."""
    store = open_store(place)
    apart = ("claims/", "shards/", "manifest.parquet")
    names = sorted(entry.key for entry in store.list("") if not entry.key.startswith(apart))
    return {"contents": contents(store)} | {key: store.get(key) for key in names}


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted worker makes, in a folder."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    assert server.wait(server.start(folder)) == 0
    return state(folder)


def history(s3: FaultyS3, server: Server, name: str, seed: int, faults: int) -> Counter[str]:
    """Capture by several processes through `faults` faults and some kills, and read through those that are left over.

    Counts of ends by "killed" and "store".
    """
    url, generator, ends = f"s3://{BUCKET}/{name}", random.Random(seed), Counter[str]()
    s3.random.seed(seed)
    s3.rate, s3.left = RATE, faults

    def start(rank: int) -> int:
        return server.start(url, rank=rank, world_size=RANKS, pause=0.01)

    running = {rank: start(rank) for rank in range(RANKS)}
    while running:
        time.sleep(generator.uniform(0, SPAN))
        rank = generator.choice(sorted(running))
        process = running.pop(rank)
        status = server.kill(process) if ends["killed"] < KILLS else server.wait(process)
        assert status in (0, 75, -signal.SIGKILL)
        if status:
            ends["store" if status == 75 else "killed"] += 1
            running[rank] = start(rank)
        assert ends.total() < ENOUGH
    while s3.left:
        try:
            report = verify_cache(url, deep=True)
        except StoreError:
            continue
        assert report.problems == []
    return ends


def check(s3: FaultyS3, name: str, whole: dict[str, Any]) -> None:
    """The cache is the uninterrupted one, and S3 created each of its objects once."""
    url = f"s3://{BUCKET}/{name}"
    assert state(url) == whole
    assert verify_cache(url, deep=True).ok
    created = s3.created(f"{name}/")
    assert set(created.values()) == {1}
    there = {f"{name}/{entry.key}" for entry in open_store(url).list("")}
    assert there == {key for key in created if "/attempts/" not in key}
    assert not [request for request in s3.log if request.method == "DELETE"]


def histories(s3: FaultyS3, server: Server, whole: dict[str, Any], seed: int, count: int, faults: int) -> None:
    ends: Counter[str] = Counter()
    for number in range(count):
        name = f"{seed}-{number}"
        ends += history(s3, server, name, seed + number, faults)
        check(s3, name, whole)
    print(f"{count} histories: {dict(s3.faults())}, {dict(ends)}, {len(s3.log)} requests")
    assert s3.faults().total() >= count * faults
    assert ends["killed"] >= count


def test_a_creation_that_failed_once_ends_no_capture(s3: FaultyS3, server: Server, whole: dict[str, Any]) -> None:
    """Of every object, claims included: reset or 5xx, before the commit or after it. A worker knows its own claims."""
    s3.first_puts = True
    workers = [server.start(f"s3://{BUCKET}/first", rank=rank, world_size=2) for rank in range(2)]
    assert [server.wait(worker) for worker in workers] == [0, 0]
    s3.first_puts = False
    assert len(s3.seen) > 2 * len(whole["contents"])
    check(s3, "first", whole)
    claims = [key for key in s3.created("first/") if "/claims/" in key]
    assert [key for key in claims if not key.endswith("/0.json")] == []  # none was claimed twice


def test_a_hundred_faults(s3: FaultyS3, server: Server, whole: dict[str, Any]) -> None:
    histories(s3, server, whole, seed=0, count=2, faults=50)


@pytest.mark.soak
def test_a_thousand_faults(s3: FaultyS3, server: Server, whole: dict[str, Any]) -> None:
    histories(s3, server, whole, seed=100, count=20, faults=50)
