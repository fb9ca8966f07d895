"""A Ray cluster of two CPUs on this machine: workers that are killed, stops, trainings, and what is refused."""

import functools
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray_cases
import torch
from capture_cases import SMALL, contents, documents, uninterrupted
from ray_cases import Away, Slow
from safetensors.torch import load_file
from train_cases import SMALL as TRAIN
from train_cases import make_cache

import fastkd
import fastkd.integrations.ray as on_ray
from fastkd.cache import verify_cache
from fastkd.capture.runner import capture_text
from fastkd.cli.main import main
from fastkd.errors import ClusterError, TeacherUnavailable, TrainError
from fastkd.integrations.ray.capture_driver import ENDS
from fastkd.integrations.ray.capture_report import RayCaptureReport, WorkerReport, ray_capture_text
from fastkd.integrations.ray.cluster import connected
from fastkd.sweep.arms import FIELDS
from fastkd.sweep.result import sweep_text

# Ray Train copies Ray Data's settings, with all that are deprecated
pytestmark = pytest.mark.filterwarnings(r"ignore:.use_\w+. is deprecated:DeprecationWarning")

TESTS = Path(__file__).parents[1]
SHARD, BATCH = SMALL["shard_positions"], SMALL["batch_tokens"]


def children() -> set[int]:
    """Processes whose parent, or whose parent's parent and so on, is this one."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, more = set[int](), {os.getpid()}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more}
        found |= more
    return found


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    before = children()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token in the home folder
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # 15 by default: beside other tests, workers would hardly run
        folder = tmp_path_factory.mktemp("workers")
        patch.setenv("FASTKD_TEST_FOLDER", str(folder))
        import ray

        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        short = Path(f"/tmp/fastkd-ray-{os.getpid()}")  # Ray's sockets have names of a hundred characters
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _temp_dir=str(short),
            log_to_driver=False, logging_level="error",
        )  # fmt: skip
        ray.folder = folder
        yield ray
        ray.shutdown()
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
        shutil.rmtree(short, ignore_errors=True)
    deadline = time.monotonic() + 30
    while left := children() - before:
        assert time.monotonic() < deadline, f"processes are left over: {left}"
        time.sleep(0.2)


class Killer:
    """Kills a worker's process at random, a number of times, while it listens to a capture."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.kills, self.random = folder, kills, random.Random(seed)
        self.events: list[dict[str, Any]] = []
        self.killed = 0

    def __call__(self, event: Any) -> None:
        self.events.append(dict(event))
        ran = sum(event["event"] == "progress" for event in self.events)
        if event["event"] != "progress" or self.killed == self.kills or ran < 3 or self.random.random() < 0.7:
            return
        alive = [int(path.name) for path in self.folder.iterdir() if Path("/proc", path.name).exists()]
        if alive:
            os.kill(pid := self.random.choice(sorted(alive)), signal.SIGKILL)
            (self.folder / str(pid)).unlink()
            self.killed += 1


def killed_capture(folder: Path, out: Path, kills: int, seed: int) -> None:
    killer = Killer(folder, kills, seed)
    report = on_ray.capture(
        Slow(folder, 0.25), documents(), out, workers=2, cpus_per_worker=1, progress=killer, **SMALL
    )
    assert killer.killed == kills
    assert report.complete
    assert contents(out) == uninterrupted()
    assert verify_cache(out, deep=True).ok
    assert not [path for path in (out / "claims").glob("*") if path.name != "lengths"]
    # of each kill at most the shard that the worker was at, and what its teacher ran while the last one was committed
    assert report.positions_lost <= kills * (SHARD + BATCH)
    assert sum(worker.positions_written for worker in report.workers) == report.plan["positions"]
    assert sum(worker.shards_written for worker in report.workers) == report.shards_written == len(uninterrupted())
    assert sum("died" in str(event.get("text")) for event in killer.events) == kills
    done = [event["positions"] for event in killer.events if event["event"] == "progress"]
    assert done[-1] == report.plan["positions"]  # what was lost is taken back


def test_a_killed_worker_loses_a_shard_at_most(ray: Any, tmp_path: Path) -> None:
    killed_capture(ray.folder, tmp_path / "cache", kills=1, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_three_kills_lose_three_shards_at_most(ray: Any, tmp_path: Path, seed: int) -> None:
    killed_capture(ray.folder, tmp_path / "cache", kills=3, seed=1 + seed)


def test_a_teacher_that_does_not_answer_for_a_while(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are left, and captured later; after three of them the worker begins again."""
    monkeypatch.setattr("fastkd.integrations.ray.capture_driver._AGAIN_SECONDS", 0.01)
    (folder := tmp_path / "away").mkdir()
    events: list[Any] = []
    report = on_ray.capture(
        Away(folder, 4), documents(), tmp_path / "cache", workers=1, progress=events.append, **SMALL
    )
    assert report.complete
    assert contents(tmp_path / "cache") == uninterrupted()
    left = [event for event in events if event["event"] == "failed"]
    assert "is left to a later run: a-server: nothing answers" in left[0]["text"]
    assert any("worker 0 begins again: a-server" in str(event.get("text")) for event in events)
    assert report.shards_written == len(uninterrupted())


@pytest.mark.soak
def test_a_teacher_that_does_not_answer_any_more(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.integrations.ray.capture_driver._AGAIN_SECONDS", 0.01)
    (folder := tmp_path / "away").mkdir()
    with pytest.raises(TeacherUnavailable, match="a-server: nothing answers"):
        on_ray.capture(Away(folder, 10_000), documents(), tmp_path / "cache", workers=1, **SMALL)
    assert len(list(folder.iterdir())) <= ENDS


@pytest.mark.soak
def test_two_drivers_on_one_cache(ray: Any, tmp_path: Path) -> None:
    """Every shard is written once; who lost work does not say that there was nothing to do."""

    def work(_: int) -> Any:
        teacher = Slow(ray.folder, 0.1)
        return on_ray.capture(teacher, documents(), tmp_path / "cache", workers=1, cpus_per_worker=1, **SMALL)

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(work, range(2)))
    assert all(report.complete for report in reports)
    assert sum(report.shards_written for report in reports) == len(uninterrupted())
    assert contents(tmp_path / "cache") == uninterrupted()
    for report in reports:
        assert ("nothing to do" in ray_capture_text(report)) == (report.positions_captured == 0)


def test_the_text_of_a_run_that_lost_its_work() -> None:
    """To another driver, or because the teacher did not answer."""
    mine = WorkerReport(0, starts=1, hosts=["here"], positions_lost=64)
    plan = {"positions": 640, "shards": 10}
    report = RayCaptureReport("a-cache", True, [], plan, positions_captured=64, seconds=1.0, workers=[mine])
    text = ray_capture_text(report)
    assert "nothing to do" not in text
    assert "this run: no shard; the teacher ran 64 positions of shards that others wrote first" in text
    assert "nothing to do" in ray_capture_text(replace(report, positions_captured=0))


COMMAND = ["capture", "--ray", "--workers", "1", "--teacher", "ray_cases:slow", "--data", "ray_cases:data"]
COMMAND += ["--k", "5", "--draws", "3", "--context", "16", "--shard-positions", "64", "--batch-tokens", "40"]
COMMAND += ["--held-out", "0.2", "--json", "--out"]


def test_the_command_stops_and_resumes(ray: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cache"

    def stop_after_a_shard() -> None:
        while not list(out.glob("shards/*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_after_a_shard)
    thread.start()
    assert main([*COMMAND, str(out)]) == 75
    thread.join()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["missing"]
    assert report["shards_written"] == len(list(out.glob("shards/*")))
    assert main([*COMMAND, str(out)]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["shards_written"] + again["shards_written"] == again["plan"]["shards"]
    assert [worker["worker"] for worker in again["workers"]] == [0]
    assert verify_cache(out, deep=True).ok


@pytest.mark.soak
def test_errors_of_a_worker_are_raised_here(ray: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [word.replace("ray_cases:data", str(tmp_path / "nothing.txt")) for word in COMMAND]
    assert main([*command, str(tmp_path / "cache")]) == 1
    assert "nothing.txt" in capsys.readouterr().err


def test_the_text_of_a_run_that_was_stopped_before_its_plan() -> None:
    report = Mock(cache="a-cache", complete=False, missing=[], plan={"positions": 0, "shards": 0})
    assert capture_text(report) == "a-cache: stopped before the first shard\nRun the same command again to continue."


def test_no_ray_and_no_cluster_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{free.getsockname()[1]}"
        for address, words in ((closed, "no cluster at.*ray start --head"), ("http://a:8265", "dashboard.*HOST:PORT")):
            monkeypatch.setenv("RAY_ADDRESS", address)
            with pytest.raises(ClusterError, match=words), connected():
                pass
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(ray, "init", Mock(side_effect=ConnectionError("Failed to connect to 10.0.0.1:1")))
    with socket.create_server(("127.0.0.1", 0)) as server:  # it wants a token, which Ray says in its log alone
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ClusterError, match=r"to 10\.0\.0\.1:1\. Start one.*set RAY_AUTH_MODE=token"), connected():
            pass
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"not installed.*pip install 'fastkd\[ray\]'"), connected():
        pass


@pytest.mark.parametrize("words", ["--rank 0 --world-size 2", "--teacher-parallel 2"])
def test_ray_places_the_workers(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, str(tmp_path / "cache"), *words.split()]) == 1
    assert "expected none of them, as Ray places the workers" in capsys.readouterr().err
    assert main([*[w for w in COMMAND if w != "--ray"], str(tmp_path / "cache")]) == 1
    assert "they need --ray" in capsys.readouterr().err


CHANGES: dict[str, Any] = TRAIN | {"steps": 8, "evaluate_every": 2, "checkpoint_every": 2, "threads": 1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(tmp_path_factory.mktemp("train") / "cache").store.describe()


@pytest.mark.soak
def test_a_training_whose_worker_is_killed_resumes(ray: Any, cache: str, tmp_path: Path) -> None:
    """Killed at its fourth step, once: the run that Ray begins again is the one that nobody interrupts, to the bit."""
    local = fastkd.train("train_cases:tiny", cache, tmp_path / "local", **CHANGES)
    student = functools.partial(ray_cases.killed_once, tmp_path / "killed", 6)
    report = on_ray.train(student, cache, tmp_path / "ray", workers=1, gpus_per_worker=0, **CHANGES)
    assert (tmp_path / "killed").exists()
    assert report.complete
    assert report.resumed > 0
    assert report.evaluation == local.evaluation
    weights = [(tmp_path / run / "student" / "model.safetensors").read_bytes() for run in ("local", "ray")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "ray" / ".ray").exists()


@pytest.mark.soak
@pytest.mark.parametrize("killed", [False, True])
def test_two_workers_of_a_training(ray: Any, cache: str, tmp_path: Path, killed: bool) -> None:
    """They train what one process trains: in float64, the same but for the order of sums. With one killed on the way,
    Ray begins both again, and they resume."""
    local = fastkd.train("train_cases:double", cache, tmp_path / "local", **CHANGES)
    student = functools.partial(ray_cases.killed_once, tmp_path / "killed", 6, torch.float64)
    given = student if killed else "train_cases:double"
    report = on_ray.train(given, cache, tmp_path / "ray", workers=2, gpus_per_worker=0, **CHANGES)
    assert report.complete
    assert (report.resumed > 0) == killed == (tmp_path / "killed").exists()
    states = [load_file(tmp_path / run / "student" / "model.safetensors") for run in ("local", "ray")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-9)
    assert local.evaluation is not None
    for name, value in local.evaluation.items():
        assert report.evaluation[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.soak
def test_errors_of_a_training_are_raised_here(ray: Any, cache: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="rate"):
        on_ray.train("train_cases:tiny", cache, tmp_path / "run", gpus_per_worker=0, **CHANGES | {"rate": -1.0})


@pytest.mark.soak
def test_a_sweep_on_tune_is_the_local_one(ray: Any, cache: str, tmp_path: Path) -> None:
    shared = {name: value for name, value in CHANGES.items() if name not in FIELDS}
    arms = {"alpha": [0.0, 0.5], "rate": [0.01]}
    local = fastkd.sweep("train_cases:tiny", cache, tmp_path / "local", arms, seeds=1, **shared)
    out = tmp_path / "ray"
    command = ["sweep", "--ray", "--student", "train_cases:tiny", "--cache", cache, "--out", str(out), "--json"]
    command += ["--alpha", "0", "0.5", "--rate", "0.01", "--seeds", "1"]
    command += [word for k, v in shared.items() for word in ("--" + k.replace("_", "-"), str(v))]
    assert main(command) == 0
    theirs, ours = (json.loads((folder / "sweep.json").read_text()) for folder in (tmp_path / "local", out))
    for document in (theirs, ours):
        for name in ("out", "seconds", "waiting", "plot", "sha256"):  # the last is of all others
            document.pop(name)
        for arm in document["arms"]:
            arm.pop("folders")
    assert ours == theirs
    assert (out / "sweep.png").exists()
    assert local.best == ours["best"]


@pytest.mark.soak
def test_asha_stops_who_is_behind(ray: Any, cache: str, tmp_path: Path) -> None:
    """One trial at a time, the best first: the others are behind it at their first rung."""
    arms = [{"rate": 0.01}, {"rate": 1e-9}]
    report = on_ray.sweep(
        "train_cases:tiny", cache, tmp_path / "out", arms, seeds=1, asha=True, cpus_per_worker=2, gpus_per_worker=0,
        **CHANGES | {"steps": 8, "evaluate_every": 1},
    )  # fmt: skip
    assert report.complete
    assert report.best == "rate=0.01"
    assert "stopped early, after step" in report.arms[-1].diverged["0"]
    assert "stopped early with seed 0" in sweep_text(report)


@pytest.mark.parametrize("words", ["--ray --auto", "--asha"])
def test_what_a_sweep_on_ray_refuses(
    words: str, cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", "--student", "train_cases:tiny", "--cache", cache, "--out", str(tmp_path / "out")]
    assert main([*command, *words.split()]) == 1
    assert "--ray" in capsys.readouterr().err
