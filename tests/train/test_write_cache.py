"""`--write-cache`: bit for bit a capture and then a training, by several processes too, and after every kill."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import train_jobs
from train_cases import CAPTURE, SMALL, Tiny, bits, documents

import fastkd
from fastkd.cache import open_cache
from fastkd.cache.errors import CacheError, StoreError
from fastkd.cache.stores.local import LocalStore
from fastkd.errors import WorkRemains
from fastkd.settings import LiveSettings
from fastkd.train.checkpoint import newest

LIVE = LiveSettings(**CAPTURE)
CHANGES: dict[str, Any] = SMALL | {
    "epochs": 1.5, "steps": None, "alpha": 0.3, "evaluate_every": 5, "batch_tokens": 120, "micro_tokens": 64,
}  # fmt: skip


class Counted(Tiny):
    """A teacher that counts its forwards, and does something before one of them."""

    def __init__(self, moment: int | None = None, act: Any = None) -> None:
        super().__init__(seed=7)
        self.calls, self._moment, self._act = 0, moment, act

    def forward(self, tokens: Any) -> Any:
        self.calls += 1
        if self.calls == self._moment:
            self._act()
        return super().forward(tokens)


def fail() -> None:
    raise KeyboardInterrupt


def teacher(moment: int | None = None, act: Any = fail) -> Any:
    from fastkd.teachers.module import ModuleTeacher

    return ModuleTeacher(Counted(moment, act), vocab_size=Tiny().head.shape[0], fingerprint="the same")


def train(out: Path, cache: Path, by: Any = None, live: LiveSettings = LIVE, **changes: Any) -> Any:
    return fastkd.train(
        Tiny(seed=1), None, out, teacher=by or teacher(), data=documents(), live=live, write_cache=cache,
        **CHANGES | changes,
    )  # fmt: skip


OWN = ("attempt", "written", "bytes")  # the last is the size with these


def objects(folder: Path) -> dict[str, Any]:
    """All that is in a cache: of its shards, contents and attributes but the attempt's random number and time."""
    cache = open_cache(folder)
    found: dict[str, Any] = {name: (folder / name).read_bytes() for name in ("spec.json", "plan.json", "lengths.npz")}
    for index in cache.shards:
        about = cache.attributes(index)
        found[f"shard {index}"] = {name: value for name, value in about.items() if name not in OWN}
    return found | {"sealed": cache.sealed}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture, and a training from it."""
    folder = tmp_path_factory.mktemp("write")
    fastkd.capture(teacher(), documents(), folder / "cache", **CAPTURE)
    fastkd.train(Tiny(seed=1), folder / "cache", folder / "run", **CHANGES)
    return folder


def result(run: Path) -> Any:
    found = newest(run)
    assert found is not None
    return bits(run, found.step)


def test_it_is_capture_and_then_train(place: Path, tmp_path: Path) -> None:
    by = teacher()
    before = by.model.calls
    report = train(tmp_path / "run", tmp_path / "cache", by)
    assert report.complete
    assert objects(tmp_path / "cache") == objects(place / "cache")
    assert open_cache(tmp_path / "cache").sealed
    assert result(tmp_path / "run") == result(place / "run")
    ours, theirs = (json.loads((folder / "run" / "evaluation.json").read_text()) for folder in (tmp_path, place))
    assert ours["student"] == theirs["student"]
    calls = by.model.calls - before
    assert calls == sum(len(open_plan(place).batches(i)) for i in range(open_plan(place).shards)), "each batch once"


def open_plan(place: Path) -> Any:
    from fastkd.capture.prepare import read_window_plan

    cache = open_cache(place / "cache")
    return read_window_plan(cache.store, cache.spec)[0]


def test_what_is_there_is_read(place: Path, tmp_path: Path) -> None:
    by = teacher()
    train(tmp_path / "one", place / "cache", by)
    assert by.model.calls == 0
    assert result(tmp_path / "one") == result(place / "run")


def test_killed_at_forwards_of_the_teacher(place: Path, tmp_path: Path) -> None:
    for fail_at in (2, 9):
        out, cache = tmp_path / f"run-{fail_at}", tmp_path / f"cache-{fail_at}"
        with pytest.raises(KeyboardInterrupt):
            train(out, cache, teacher(fail_at), checkpoint_every=2)
        train(out, cache, checkpoint_every=2)
        assert objects(cache) == objects(place / "cache")
        assert result(out) == result(place / "run")


def test_stopped_at_every_step(place: Path, tmp_path: Path) -> None:
    for _ in range(100):
        stop = fastkd.utils.signals.Stop()
        stop()
        if train(tmp_path / "run", tmp_path / "cache", stop=stop).complete:
            break
    train(tmp_path / "run", tmp_path / "cache")
    assert objects(tmp_path / "cache") == objects(place / "cache")
    assert result(tmp_path / "run") == result(place / "run")


def test_a_stop_ends_the_capture_of_a_shard(tmp_path: Path) -> None:
    """Of several batches: no further one is run. The steps that were made are kept, and all goes on."""
    small = {"batch_tokens": 16}
    live = LiveSettings(**CAPTURE, teacher_batch_tokens=16)
    changes = {"evaluate_every": 0, "shards_open": 1}
    fastkd.capture(teacher(), documents(), tmp_path / "captured", **CAPTURE | small)
    fastkd.train(Tiny(seed=1), tmp_path / "captured", tmp_path / "trained", **CHANGES | changes)
    made = []
    for moment in (2, 20, 20, 1000):
        stop = fastkd.utils.signals.Stop()
        by = teacher(moment, stop)
        report = train(tmp_path / "run", tmp_path / "cache", by, live, stop=stop, **changes)
        assert by.model.calls <= moment
        assert report.status == (75 if moment < 1000 else 0)
        made.append(report.step)
    assert made[0] == 0 < made[1] < made[2] < made[3]
    assert objects(tmp_path / "cache") == objects(tmp_path / "captured")
    assert result(tmp_path / "run") == result(tmp_path / "trained")


def test_a_stop_after_the_last_step_leaves_the_rest_to_the_same_command(place: Path, tmp_path: Path) -> None:
    calls = teacher()
    train(tmp_path / "whole", tmp_path / "all", calls, evaluate_every=0)
    stop = fastkd.utils.signals.Stop()
    by = teacher(calls.model.calls - 1, stop)  # the held-out shards are captured last
    report = train(tmp_path / "run", tmp_path / "cache", by, stop=stop, evaluate_every=0)
    assert (report.step, report.status) == (report.steps, 75)
    assert "shards are not written" in report.unfinished
    assert train(tmp_path / "run", tmp_path / "cache", evaluate_every=0).status == 0
    assert objects(tmp_path / "cache") == objects(place / "cache")


def test_a_short_training_leaves_shards_to_a_later_one(place: Path, tmp_path: Path, capsys: Any) -> None:
    train(tmp_path / "short", tmp_path / "cache", steps=2, evaluate_every=0, shards_open=2, progress="lines")
    assert "shards are not written, as this training did not read them" in capsys.readouterr().err
    assert 0 < len(open_cache(tmp_path / "cache").shards) < 8
    train(tmp_path / "whole", tmp_path / "cache")
    assert objects(tmp_path / "cache") == objects(place / "cache")


@pytest.mark.soak
def test_the_control_reads_the_cache(place: Path, tmp_path: Path) -> None:
    fastkd.train(Tiny(seed=1), place / "cache", tmp_path / "cached", **CHANGES, control=True)
    train(tmp_path / "live", tmp_path / "cache", control=True)
    assert result(tmp_path / "live" / "control") == result(tmp_path / "cached" / "control")


def test_another_captures_cache_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"the existing cache was written with other settings .*k: 6 and 5"):
        fastkd.train(
            Tiny(seed=1), None, tmp_path / "run", teacher=teacher(), data=documents(),
            live=LiveSettings(**CAPTURE | {"k": 5}), write_cache=place / "cache", **CHANGES,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_two_trainings_at_once(place: Path, tmp_path: Path) -> None:
    """Each captures what the other has not claimed, and reads the rest; both are as if alone."""
    runs = [tmp_path / "one", tmp_path / "two"]
    given = CHANGES | {"write_cache": tmp_path / "cache"}
    jobs = [train_jobs.start(train_jobs.train_live, None, None, run, given) for run in runs]
    assert [train_jobs.finish(job) for job in jobs] == [[0], [0]]
    assert objects(tmp_path / "cache") == objects(place / "cache")
    assert open_cache(tmp_path / "cache").verify().ok
    for run in runs:
        assert result(run) == result(place / "run")


def full_disk(cache: Path, moment: int, patch: pytest.MonkeyPatch) -> None:
    """From the n-th object on, nothing can be written to a cache."""
    put, left = LocalStore._put, [moment]

    def putting(self: Any, key: str, data: Any) -> bool:
        if self.describe() == str(cache):
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return put(self, key, data)

    patch.setattr(LocalStore, "_put", putting)


@pytest.mark.parametrize("moment", [1, 9, pytest.param(16, marks=pytest.mark.soak)])
def test_a_full_disk(place: Path, tmp_path: Path, moment: int) -> None:
    """Before the first object, and at shards: one sentence, and the same call goes on."""
    with pytest.MonkeyPatch.context() as patch:
        full_disk(tmp_path / "cache", moment, patch)
        with pytest.raises((StoreError, WorkRemains), match="No space left") as caught:
            train(tmp_path / "run", tmp_path / "cache", checkpoint_every=2)
    assert "\n" not in str(caught.value)
    train(tmp_path / "run", tmp_path / "cache", checkpoint_every=2)
    assert objects(tmp_path / "cache") == objects(place / "cache")
    assert result(tmp_path / "run") == result(place / "run")


def test_two_processes(place: Path, tmp_path: Path) -> None:
    """A student in float64: in float32 the sums over two processes are rounded in another order, of which Adam makes
    differences of 1e-4. First, one process is asked to stop while it captures: all stop before the same step."""
    given = ("train_cases:double", None, tmp_path / "run", CHANGES | {"write_cache": tmp_path / "cache"})
    stopped = train_jobs.start(train_jobs.train_live, *given, 5, ranks=2)
    assert train_jobs.finish(stopped) == [75, 75]
    assert len(open_cache(tmp_path / "cache").shards) < len(open_cache(place / "cache").shards)
    train_jobs.run(train_jobs.train_live, *given, ranks=2)
    assert objects(tmp_path / "cache") == objects(place / "cache")
    fastkd.train("train_cases:double", place / "cache", tmp_path / "one", **CHANGES)
    ours, theirs = (newest(tmp_path / run) for run in ("run", "one"))
    assert ours is not None
    assert theirs is not None
    for name, tensor in ours.tensors("model").items():
        assert (tensor - theirs.tensors("model")[name]).abs().max() < 1e-12, name
