"""Workers that are killed wherever they are: the cache they leave in the end is the one that nobody interrupts."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from capture_cases import contents
from capture_worker import run

from fastkd.cache import verify_cache

SPAN = 0.5  # seconds: about half of what a worker takes that is let alone
ENOUGH = 12  # kills, after which a worker is let alone


class Server:
    """The process that workers are forked from: see capture_worker.py."""

    def __init__(self) -> None:
        script = Path(__file__).parents[1].joinpath("capture_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

        self.said: list[Any] = []  # by workers

    def ask(self, **command: Any) -> int:
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        while not isinstance(answer := self.line(), int):
            self.said.append(answer)
        return answer

    def hear(self) -> Any:
        """What a worker says next."""
        return self.said.pop(0) if self.said else self.line()

    def line(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server of workers is gone"
        return json.loads(line)

    def start(self, folder: Path | str, **options: Any) -> int:
        """A worker's process number."""
        self.said.clear()
        return self.ask(run={"folder": str(folder), **options})

    def wait(self, process: int) -> int:
        """The exit status of a worker; minus the signal that ended it."""
        return self.ask(wait=process)

    def kill(self, process: int) -> int:
        """Kill a worker, if it is still there; its exit status."""
        os.kill(process, signal.SIGKILL)
        return self.wait(process)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=120)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


Whole = dict[str, Any]


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What an uninterrupted worker makes."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    assert server.wait(server.start(folder)) == 0
    found = state(folder)
    assert len(found["contents"]) > 8
    return found


def state(folder: Path) -> Whole:
    """A finished cache, checked; and that a later worker finds nothing to do and nothing left over."""
    assert (folder / "manifest.parquet").exists(), "it is sealed"
    report = verify_cache(folder, deep=True)
    assert report.problems == []
    assert report.ok
    again = run(folder)
    assert again.complete
    assert again.shards_written == again.positions_captured == 0
    assert not list((folder / "attempts").glob("*.part"))
    files = {name: (folder / name).read_bytes() for name in ("plan.json", "spec.json", "lengths.npz")}
    return {"contents": contents(folder), **files}


def whole_again(server: Server, folder: Path, whole: Whole) -> None:
    """Let a worker finish."""
    assert server.wait(server.start(folder)) == 0
    assert state(folder) == whole


def interrupted(
    server: Server,
    folder: Path,
    seed: int,
    *,
    workers: int = 1,
    restarted: int | None = None,
    pause: float = 0.02,
    check: Callable[[], None] = lambda: None,
    **options: Any,
) -> int:
    """Kill workers at random instants, starting those of ranks below `restarted` again, until all end by themselves.

    How many were killed. check: called after each that ended. options: of the workers.
    """
    generator, kills = random.Random(seed), 0

    def start(rank: int) -> int:
        return server.start(folder, rank=rank, world_size=workers, pause=pause, **options)

    running = {rank: start(rank) for rank in range(workers)}
    while running:
        time.sleep(generator.uniform(0, SPAN))
        rank = generator.choice(sorted(running))
        status = server.kill(running[rank]) if kills < ENOUGH else server.wait(running[rank])
        del running[rank]
        assert status in (0, -signal.SIGKILL)
        if status:
            kills += 1
            if rank < (workers if restarted is None else restarted):
                running[rank] = start(rank)
        check()
    return kills


def runs(server: Server, tmp_path: Path, whole: Whole, count: int, seed: int) -> int:
    """So many caches made by one worker, by two, and by two of which only the first is started again."""
    kills = 0
    for number in range(count):
        folder = tmp_path / str(number)
        workers, restarted = [(1, None), (2, None), (2, 1)][number % 3]
        kills += interrupted(server, folder, seed + number, workers=workers, restarted=restarted)
        assert state(folder) == whole
    return kills


def test_killed_at_random_instants(server: Server, tmp_path: Path, whole: Whole) -> None:
    assert runs(server, tmp_path, whole, count=3, seed=0) > 3


@pytest.mark.soak
def test_killed_at_random_instants_in_fifty_runs(server: Server, tmp_path: Path, whole: Whole) -> None:
    kills = runs(server, tmp_path, whole, count=50, seed=100)
    print(f"{kills} kills in 50 runs; all equal")
    assert kills > 100


def killed_at_steps(server: Server, tmp_path: Path, whole: Whole, steps: range) -> None:
    for step in steps:
        folder = tmp_path / str(step)
        status = server.wait(server.start(folder, step=step))
        assert status == -signal.SIGKILL, f"step {step} was not reached"
        whole_again(server, folder, whole)


@pytest.fixture(scope="module")
def planned(server: Server, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many calls to the operating system there are until lengths, plan, spec and the first claim are written."""
    folder = tmp_path_factory.mktemp("steps") / "cache"
    process = server.start(folder, step=0)
    made = [server.hear() for _ in range(5)]
    assert [entry["object"] for entry in made] == ["0.json", "lengths.npz", "plan.json", "spec.json", "0.json"]
    server.kill(process)
    return int(made[-1]["call"])


def test_killed_while_planning(server: Server, tmp_path: Path, whole: Whole, planned: int) -> None:
    killed_at_steps(server, tmp_path, whole, range(1, planned + 1, 13))


@pytest.mark.soak
def test_killed_at_every_step_of_planning(server: Server, tmp_path: Path, whole: Whole, planned: int) -> None:
    killed_at_steps(server, tmp_path, whole, range(1, planned + 1))


def begun_at_once(server: Server, tmp_path: Path, whole: Whole, times: int) -> None:
    for number in range(times):
        folder = tmp_path / f"once{number}"
        at = time.monotonic() + 0.05
        # of two ranks; and the same command twice
        workers = [server.start(folder, rank=n % 2 * (number % 2), world_size=1 + number % 2, at=at) for n in range(2)]
        assert [server.wait(worker) for worker in workers] == [0, 0]
        assert state(folder) == whole


def test_two_workers_begin_at_the_same_instant(server: Server, tmp_path: Path, whole: Whole) -> None:
    begun_at_once(server, tmp_path, whole, times=2)


@pytest.mark.soak
def test_two_workers_begin_at_the_same_instant_thirty_times(server: Server, tmp_path: Path, whole: Whole) -> None:
    begun_at_once(server, tmp_path, whole, times=30)


def terminated(server: Server, folder: Path, whole: Whole, seed: int) -> int:
    """Stop a worker by SIGTERM at random instants until it is done; how often work remained."""
    generator, remained = random.Random(seed), 0
    while True:
        worker = server.start(folder, pause=0.01, gently=True)
        assert server.hear() == "ready"
        time.sleep(generator.uniform(0, SPAN))
        os.kill(worker, signal.SIGTERM)
        if (status := server.wait(worker)) == 0:
            assert state(folder) == whole
            return remained
        assert status == 75
        remained += 1
        if (folder / "spec.json").exists():
            assert verify_cache(folder, deep=True).problems == []
        # what was not written is free at once
        for claims in (folder / "claims").glob("[0-9]*"):
            newest = max(claims.iterdir(), key=lambda path: int(path.stem))
            there = (folder / "shards" / f"{claims.name}.zarr.zip").exists()
            assert there or json.loads(newest.read_text())["expires"] == 0


def test_sigterm_ends_with_75_and_the_next_call_goes_on(server: Server, tmp_path: Path, whole: Whole) -> None:
    assert terminated(server, tmp_path / "cache", whole, seed=1) > 0


@pytest.mark.soak
def test_sigterm_again_and_again(server: Server, tmp_path: Path, whole: Whole) -> None:
    assert sum(terminated(server, tmp_path / str(n), whole, seed=n) for n in range(10, 25)) > 15
