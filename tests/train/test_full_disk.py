"""Where nothing more can be written: one sentence that says what to do, and the same call finishes afterwards."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_jobs
from train_cases import SMALL, bits, make_cache

import fastkd
from fastkd.cache import CacheError
from fastkd.errors import TrainError, WorkRemains
from fastkd.train.metrics import read_metrics
from fastkd.utils import atomic

STUDENT = "train_cases:dropping"
CHANGES: dict[str, Any] = SMALL | {"steps": 6, "checkpoint_every": 2, "evaluate_every": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and a run that nothing hindered."""
    place = tmp_path_factory.mktemp("disk")
    make_cache(place / "cache")
    fastkd.train(STUDENT, place / "cache", place / "whole", **CHANGES)
    return place


def finishes(place: Path, out: Path) -> None:
    report = fastkd.train(STUDENT, place / "cache", out, **CHANGES)
    assert report.complete
    assert bits(out, 6) == bits(place / "whole", 6)
    name = "student/model.safetensors"
    assert (out / name).read_bytes() == (place / "whole" / name).read_bytes()
    losses = [[line.get("loss") for line in read_metrics(run)] for run in (out, place / "whole")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("resume", [0, 900, 7_000]),
        ("report", [0, 2_000]),
        ("write_run", [0]),
        pytest.param("resume", [n + 77 for n in range(0, 40_000, 400)], marks=pytest.mark.soak),
        pytest.param("report", [n + 77 for n in range(0, 16_000, 400)], marks=pytest.mark.soak),
    ],
)
def test_no_file_can_grow_beyond_a_size(method: str, sizes: list[int], place: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE: writes in C fail as well as those in Python, wherever a file gets longer."""
    failed = set()
    for size in sizes:
        out, said = tmp_path / str(size), tmp_path / "said"
        arguments = (STUDENT, place / "cache", out, CHANGES, size, said, method)
        status = train_jobs.finish(train_jobs.start(train_jobs.train_within, *arguments))[0]
        assert status in (0, 75), f"{size} bytes: exit status {status}"
        if status:
            failed.add(size)
            assert "run the same command again to resume" in said.read_text()
        finishes(place, out)
        shutil.rmtree(out)
    assert failed


CALLS = ("fsync", "replace", "rename", "mkdir", "open", "unlink", "rmdir")


@pytest.mark.parametrize(
    ("begin", "every"), [(1, 83), pytest.param(1, 1, marks=pytest.mark.soak)], ids=["few", "every one"]
)
@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.soak), errno.EACCES],
    ids=["ENOSPC", "EIO", "EACCES"],
)
def test_the_nth_call_fails(
    number: int, begin: int, every: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the calls that change files: WorkRemains or TrainError, and then the same call finishes."""
    torch.set_num_threads(1)
    tries, moment = 0, begin
    while True:
        out, left, hit = tmp_path / str(moment), moment, False

        def failing(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                nonlocal left, hit
                left -= 1
                if left == 0:
                    hit = True
                    raise OSError(number, os.strerror(number))
                return function(*arguments, **named)

            return run

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                fastkd.train(STUDENT, place / "cache", out, **CHANGES)
            except WorkRemains as error:
                assert number in (errno.ENOSPC, errno.EIO)
                assert "run the same command again to resume" in str(error)
            except TrainError as error:
                assert number == errno.EACCES, error
            except CacheError:
                pass  # reading the cache failed
        if not hit:
            break
        finishes(place, out)
        shutil.rmtree(out)
        tries, moment = tries + 1, moment + every
    assert tries > 2


@pytest.mark.parametrize("gone", ["run", "metrics.jsonl"])
def test_a_run_that_is_removed_meanwhile(gone: str, place: Path, tmp_path: Path) -> None:
    out, calls = tmp_path / "run", 0

    def evaluate(student: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 1:
            shutil.rmtree(out) if gone == "run" else (out / gone).unlink()
        return {"cross_entropy": 1.0}

    with pytest.raises(TrainError, match="was removed while it was written to") as caught:
        fastkd.train(STUDENT, place / "cache", out, evaluate=evaluate, **CHANGES)
    assert not isinstance(caught.value, WorkRemains)
    if gone == "run":
        assert not out.exists()


def test_another_folder_in_its_place(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def evaluate(student: Any) -> dict[str, float]:
        if not (tmp_path / "moved").exists():
            out.rename(tmp_path / "moved")
            out.mkdir()
        return {"cross_entropy": 1.0}

    with pytest.raises(TrainError, match=r"checkpoint of step . cannot be written .*the folder was replaced"):
        fastkd.train(STUDENT, place / "cache", out, evaluate=evaluate, **CHANGES)
    assert list(out.iterdir()) == []


def test_errors_by_kind(tmp_path: Path) -> None:
    for number, kind in ((errno.ENOSPC, WorkRemains), (errno.EROFS, TrainError), (errno.EACCES, TrainError)):
        with pytest.raises(kind, match="the page cannot be written") as caught, atomic.writing(tmp_path, "the page"):
            raise OSError(number, os.strerror(number))
        assert type(caught.value) is kind
