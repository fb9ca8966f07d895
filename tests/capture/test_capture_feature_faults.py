"""Features of captures that are killed or whose store fails: in the end they are those of an uninterrupted capture."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from capture_cases import Layered, Without, capture, contents, feature_contents
from capture_worker import run
from test_capture_kills import Server, interrupted
from test_capture_workers import together

from fastkd.cache import StoreError, open_cache, verify_cache
from fastkd.cache.stores import MemoryStore
from fastkd.errors import WorkRemains

FEATURES = ["1", "-1"]
Whole = tuple[dict[int, str], dict[str, dict[int, str]]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole() -> Whole:
    """What an uninterrupted capture makes."""
    store = MemoryStore()
    assert capture(store, teacher=Layered(), features=tuple(FEATURES)).complete
    return contents(store), feature_contents(store)


def check(folder: Any, whole: Whole) -> None:
    """A finished cache; and a later worker finds nothing to do."""
    assert (contents(folder), feature_contents(folder)) == whole
    report = verify_cache(folder, deep=True)
    assert report.problems == []
    assert report.ok
    cache = open_cache(folder)
    assert cache.sealed
    assert all(cache.features[name].sealed for name in FEATURES)
    again = run(folder, features=FEATURES)
    assert again.complete
    assert again.positions_captured == 0


def sound(folder: Path) -> None:
    """A cache that may lack something, and has no other problem."""
    if (folder / "spec.json").exists():
        problems = verify_cache(folder, deep=True).problems
        assert [problem for problem in problems if "missing" not in problem.what] == []


def runs(server: Server, tmp_path: Path, whole: Whole, count: int, seed: int) -> int:
    """So many caches; every other one is finished before it gets features."""
    kills = 0
    for number in range(count):
        folder = tmp_path / str(number)
        if number % 2:
            assert server.wait(server.start(folder, features=[])) == 0
        kills += interrupted(
            server, folder, seed + number, workers=1 + number % 3 // 2, pause=0.01, check=partial(sound, folder),
            features=FEATURES,
        )  # fmt: skip
        check(folder, whole)
    return kills


def test_killed_at_random_instants(server: Server, tmp_path: Path, whole: Whole) -> None:
    assert runs(server, tmp_path, whole, count=2, seed=0) > 2


@pytest.mark.soak
def test_killed_at_random_instants_in_forty_runs(server: Server, tmp_path: Path, whole: Whole) -> None:
    kills = runs(server, tmp_path, whole, count=40, seed=100)
    print(f"{kills} kills in 40 runs; all equal")
    assert kills > 80


@pytest.fixture(scope="module")
def finished(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache without features."""
    folder = tmp_path_factory.mktemp("finished") / "cache"
    assert server.wait(server.start(folder, features=[])) == 0
    return folder


@pytest.fixture(scope="module")
def prepared(server: Server, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int]:
    """The numbers of the calls to the operating system between which features are prepared, in a finished cache."""
    folder = tmp_path_factory.mktemp("steps") / "cache"
    shutil.copytree(finished, folder)
    process = server.start(folder, step=0, features=FEATURES)
    made: list[Any] = []
    while not made or made[-1]["object"] != "0.zarr.zip":
        made.append(server.hear())
    server.kill(process)
    objects = [entry["object"] for entry in made]
    found = ["basis.zarr.zip"] * 2 + ["spec.json"] * 2
    assert [name for name in objects if not name[0].isdigit()] == found
    assert objects[1:5] == found, "after a claim, and before the claim of a shard"
    return int(made[0]["call"]) - 3, int(made[-1]["call"]) + 3


def killed_at_steps(server: Server, finished: Path, tmp_path: Path, whole: Whole, steps: range) -> None:
    for step in steps:
        folder = tmp_path / str(step)
        shutil.copytree(finished, folder)
        assert server.wait(server.start(folder, step=step, features=FEATURES)) == -signal.SIGKILL
        assert server.wait(server.start(folder, features=FEATURES)) == 0
        check(folder, whole)


def test_killed_while_features_are_prepared(
    server: Server, finished: Path, tmp_path: Path, whole: Whole, prepared: tuple[int, int]
) -> None:
    killed_at_steps(server, finished, tmp_path, whole, range(*prepared, 37))


@pytest.mark.soak
def test_killed_at_every_step_of_preparing(
    server: Server, finished: Path, tmp_path: Path, whole: Whole, prepared: tuple[int, int]
) -> None:
    killed_at_steps(server, finished, tmp_path, whole, range(*prepared))


def test_sigterm_ends_with_75_and_the_next_call_goes_on(server: Server, tmp_path: Path, whole: Whole) -> None:
    folder = tmp_path / "cache"
    worker = server.start(folder, pause=0.05, gently=True, features=FEATURES)
    assert server.hear() == "ready"
    while not list(folder.glob("features/1/shards/*")):
        time.sleep(0.01)
    os.kill(worker, signal.SIGTERM)
    assert server.wait(worker) == 75
    assert verify_cache(folder, deep=True).problems == []
    assert server.wait(server.start(folder, features=FEATURES)) == 0
    check(folder, whole)


@pytest.mark.parametrize(
    "pattern",
    [
        "features/-1/spec.json",
        r"shards/[2-9]\.zarr\.zip",
        r"features/-1/shards/[3-9]\.zarr\.zip",
        "features/1/manifest.parquet",
    ],
)
def test_a_store_that_is_full(pattern: str, whole: Whole) -> None:
    store: Any = Without(pattern)
    features = tuple(FEATURES)
    with pytest.raises(StoreError, match="No space left"):
        capture(store, teacher=Layered(), features=features)
    problems = verify_cache(store, deep=True).problems
    assert [problem for problem in problems if "missing" not in problem.what] == []
    store.full = False
    assert capture(store, teacher=Layered(), features=features).complete
    check(store, whole)


@pytest.mark.parametrize("pattern", [None, "features/1/basis.zarr.zip"])
def test_a_group_is_one_worker(pattern: str | None, whole: Whole) -> None:
    store: Any = MemoryStore() if pattern is None else Without(pattern)
    teachers = {"leader": Layered(), "follower": Layered()}
    found = together(store, teachers=teachers, features=tuple(FEATURES))
    if pattern is None:
        assert found["leader"].complete
        assert found["follower"] == found["leader"]
        assert teachers["leader"].calls == teachers["follower"].calls
    else:
        assert isinstance(found["leader"], StoreError)
        assert isinstance(found["follower"], WorkRemains)
        store.full = False
        assert capture(store, teacher=Layered(), features=tuple(FEATURES)).complete
    check(store, whole)
