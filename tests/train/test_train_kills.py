"""A run that was killed, at whatever moment, and gone on with comes to the bytes of one that was not."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import train_jobs
from train_cases import SMALL, bits, make_cache

from fastkd.train.metrics import read_metrics

STUDENT = "train_cases:dropping"
CHANGES: dict[str, Any] = SMALL | {"steps": 6, "checkpoint_every": 2, "micro_tokens": 24}
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and the runs that nobody killed."""
    folder = tmp_path_factory.mktemp("kills")
    make_cache(folder / "cache")
    train_jobs.run(train_jobs.train, STUDENT, folder / "cache", folder / "one", CHANGES)
    return folder


def result(run: Path) -> dict[str, Any]:
    """The outcome of a run: weights, optimizer state, the exported student, and the logged figures except times."""
    found: dict[str, Any] = bits(run, CHANGES["steps"])
    found["student"] = (run / "student" / "model.safetensors").read_bytes()
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, CHANGES["steps"] + 1))
    for name in ("loss", "hard", "soft", "grad_norm", "rate", "positions"):
        found[name] = repr([line[name] for line in lines]).encode()
    assert not [path for path in run.rglob(".*") if path.name != ".metadata"]
    return found


def die_at(place: Path, out: Path, moment: int, *, ranks: int = 1, of: int = 0) -> bool:
    """A run killed at a moment and gone on with; whether it lived to see the moment."""
    arguments = (STUDENT, place / "cache", out, CHANGES)
    statuses = train_jobs.finish(train_jobs.start(train_jobs.train_and_die, *arguments, moment, of, ranks=ranks))
    if statuses == [0] * ranks:
        return False
    assert statuses[of] == KILLED
    train_jobs.run(train_jobs.train, *arguments, ranks=ranks)
    return True


def test_killed_once(place: Path, tmp_path: Path) -> None:
    wanted = result(place / "one")
    for moment in (9, 23, 37, 55):
        out = tmp_path / str(moment)
        assert die_at(place, out, moment)
        assert result(out) == wanted, f"killed at moment {moment}"


def test_killed_again_and_again(place: Path, tmp_path: Path) -> None:
    """With fewer moments between two kills than a run has, and more than a checkpoint needs."""
    arguments = (STUDENT, place / "cache", tmp_path / "run", CHANGES)
    kills = 0
    while train_jobs.finish(train_jobs.start(train_jobs.train_and_die, *arguments, 31)) != [0]:
        kills += 1
        assert kills < 20
    assert kills
    assert result(tmp_path / "run") == result(place / "one")


@pytest.mark.parametrize(
    ("parallel", "kills"),
    [
        ("ddp", [(0, 27)]),
        ("fsdp", [(1, 4)]),
        pytest.param("ddp", [(1, 4)], marks=pytest.mark.soak),
        pytest.param("fsdp", [(0, 27)], marks=pytest.mark.soak),
    ],
)
def test_two_processes_of_which_one_is_killed(
    place: Path, tmp_path: Path, parallel: str, kills: list[tuple[int, int]]
) -> None:
    changes = CHANGES | {"parallel": parallel}
    arguments = (STUDENT, place / "cache", tmp_path / "whole", changes)
    train_jobs.run(train_jobs.train, *arguments, ranks=2)
    for of, moment in kills:
        out = tmp_path / f"{of}"
        dying = train_jobs.start(train_jobs.train_and_die, STUDENT, place / "cache", out, changes, moment, of, ranks=2)
        assert train_jobs.finish(dying)[of] == KILLED
        train_jobs.run(train_jobs.train, STUDENT, place / "cache", out, changes, ranks=2)
        assert result(out) == result(tmp_path / "whole")


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_sigterm_writes_a_checkpoint_and_work_remains(place: Path, tmp_path: Path, ranks: int) -> None:
    changes = CHANGES | {"steps": 40, "checkpoint_every": None}
    out = tmp_path / "run"
    arguments = (STUDENT, place / "cache", out, changes)
    running = train_jobs.start(train_jobs.train_slowly, *arguments, ranks=ranks)
    waited = time.monotonic()
    while not read_metrics(out) and time.monotonic() - waited < 120:
        time.sleep(0.02)
    pid = running[-1].pid  # of two, the one that does not write; the other has to be told
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    assert train_jobs.finish(running) == [75] * ranks
    steps = [line["step"] for line in read_metrics(out)]
    assert steps == list(range(1, len(steps) + 1))
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{len(steps):08d}"]
    train_jobs.run(train_jobs.train, *arguments, ranks=ranks)
    assert [line["step"] for line in read_metrics(out)] == list(range(1, 41))


@pytest.mark.soak
def test_killed_at_every_moment(place: Path, tmp_path: Path) -> None:
    wanted, moment = result(place / "one"), 1
    while die_at(place, out := tmp_path / str(moment), moment):
        assert result(out) == wanted, f"killed at moment {moment}"
        shutil.rmtree(out)
        moment += 1
    assert moment > 50  # that many there are, at the least


@pytest.mark.soak
@pytest.mark.parametrize(("of", "every", "least"), [(0, 5, 50), (1, 1, 5)])
def test_one_of_two_processes_killed_at_many_moments(
    place: Path, tmp_path: Path, of: int, every: int, least: int
) -> None:
    train_jobs.run(train_jobs.train, STUDENT, place / "cache", tmp_path / "whole", CHANGES, ranks=2)
    wanted, moment = result(tmp_path / "whole"), 1
    while die_at(place, out := tmp_path / str(moment), moment, ranks=2, of=of):
        assert result(out) == wanted, f"killed at moment {moment}"
        shutil.rmtree(out)
        moment += every
    assert moment > least
