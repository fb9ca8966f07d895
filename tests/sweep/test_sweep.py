"""A sweep: each arm is a training, their ranking, and how a sweep resumes."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_cases
from train_cases import SMALL, Tiny, bits, documents, make_cache

import fastkd
from fastkd.cache import Cache, open_cache
from fastkd.cli.main import main
from fastkd.errors import TrainError
from fastkd.evaluate.api import Evaluation, compare
from fastkd.evaluate.result import Windows
from fastkd.settings import TrainSettings
from fastkd.sweep.arms import make_arms
from fastkd.sweep.plot import plotted
from fastkd.sweep.result import (
    ArmResult,
    Behind,
    SweepReport,
    ranked,
    read_result,
    seed_noise,
    sweep_text,
    window_noise,
)
from fastkd.train.checkpoint import steps_of
from fastkd.train.metrics import read_metrics
from fastkd.train.trainer import Trainer
from fastkd.utils.signals import Stop

STEPS = 4
CHANGES: dict[str, Any] = SMALL | {"steps": STEPS, "evaluate_every": STEPS, "checkpoint_every": 2, "threads": 1}
STUDENT = "train_cases:dropping"
ARMS: dict[str, Any] = {"alpha": [0, 0.5], "rate": [0.01, 0.003]}
NAMES = [f"alpha={alpha},rate={rate}" for alpha in ("0", "0.5") for rate in ("0.01", "0.003")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("sweep") / "cache")


@pytest.fixture(scope="module")
def done(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepReport]:
    """A sweep that ran to its end at once."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, sweep(cache, out)


def sweep(cache: Any, out: Path, arms: Any = ARMS, student: Any = STUDENT, **changes: Any) -> SweepReport:
    return fastkd.sweep(student, cache, out, arms, **{**CHANGES, **changes})


def left(run: Path) -> dict[str, Any]:
    """What a run came to, to the bit; but for times, and steps before a resumption that pruned others."""
    found: dict[str, Any] = bits(run, STEPS)
    found["student"] = (run / "student" / "model.safetensors").read_bytes()
    times = ("seconds", "waiting", "positions_per_second")
    found["metrics"] = [{k: v for k, v in line.items() if k not in times} for line in read_metrics(run)]
    return found


def all_left(out: Path) -> dict[str, Any]:
    return {str(run.relative_to(out)): left(run) for run in sorted(out.glob("*/seed=*"))}


def test_each_arm_is_what_training_it_alone_makes(cache: Cache, done: tuple[Path, Any], tmp_path: Path) -> None:
    out, report = done
    assert report.complete
    assert report.trainings == 8
    runs = sorted(str(run.relative_to(out)) for run in out.glob("*/seed=*"))
    assert runs == sorted(f"{name}/seed={seed}" for name in NAMES for seed in (0, 1))
    for name, seed, changes in (
        ("alpha=0,rate=0.01", 0, {"alpha": 0.0, "rate": 0.01}),
        ("alpha=0.5,rate=0.003", 1, {"alpha": 0.5, "rate": 0.003, "seed": 1}),
    ):
        fastkd.train(STUDENT, cache, tmp_path / name, **CHANGES | changes)
        ours, theirs = out / name / f"seed={seed}", tmp_path / name
        assert left(ours) == left(theirs)
        documents = [json.loads((run / "run.json").read_text()) for run in (ours, theirs)]
        assert documents[0].keys() == documents[1].keys()
        assert documents[0]["settings"] == documents[1]["settings"]
        assert documents[0]["report"].keys() == documents[1]["report"].keys()
        assert documents[0]["report"]["evaluation"] == documents[1]["report"]["evaluation"]


def stopping_at(step: int, monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Do something in the middle of a step, counted over all arms, once."""
    make, left = Trainer._make, [step]

    def counting(self: Any, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            do()
        return make(self, *arguments)

    monkeypatch.setattr(Trainer, "_make", counting)


def test_a_stopped_sweep_resumes(cache: Cache, done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop()
    stopping_at(2 * STEPS + 3, monkeypatch, stop)
    report = sweep(cache, tmp_path, stop=stop)
    assert (report.status, report.complete, report.best, report.plot) == (75, False, None, None)
    assert "Run the same command again to resume" in sweep_text(report)
    assert [steps_of(tmp_path / name / "seed=0") for name in NAMES] == [[2, 4], [2, 4], [2, 3], []]
    # as after a kill between two checkpoints; and one arm as if it had never begun
    shutil.rmtree(tmp_path / NAMES[2] / "seed=0" / "checkpoints" / "step-00000003")
    shutil.rmtree(tmp_path / NAMES[1])
    report = sweep(cache, tmp_path)
    assert report.status == 0
    assert report.trainings == 7
    assert all_left(tmp_path) == all_left(done[0])
    assert report.best == done[1].best
    assert report.margin == done[1].margin


def test_what_is_finished_stays(cache: Cache, done: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    (out / NAMES[0] / "seed=1" / "run.json").unlink()  # killed just before its last file
    (out / NAMES[0] / "seed=1" / "evaluation.json").unlink()
    card = out / NAMES[1] / "seed=1" / "student" / "README.md"
    text = card.read_text()
    card.unlink()  # killed just before it
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/seed=0/**/*")}
    report = sweep(cache, out)
    assert card.read_text() == text
    assert report.trainings == 1  # which had no step left to make
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/seed=0/**/*")} == before
    assert [a.to_json() for a in report.arms] == [
        a.to_json() | {"folders": [f.replace(str(done[0]), str(out)) for f in a.folders]} for a in done[1].arms
    ]
    more = sweep(cache, out, {"alpha": [0, 0.5, 1], "rate": [0.01, 0.003]}, seeds=1)
    assert more.trainings == 2
    assert len(more.arms) == 6
    with pytest.raises(TrainError, match=r"begun with other settings \(weight_decay: 0.1 there, 0.2 here\)"):
        sweep(cache, out, weight_decay=0.2)
    with pytest.raises(TrainError, match="trained with another student"):
        sweep(cache, out, student=train_cases.llama())


def test_an_arm_that_diverges_leaves_the_others_alone(cache: Cache, done: Any, tmp_path: Path) -> None:
    arms = {"alpha": [0.5], "rate": [0.01, 1e30, 0.003]}
    report = sweep(cache, tmp_path, arms)
    assert report.status == 0
    assert report.arms[-1].name == "alpha=0.5,rate=1e+30"
    assert set(report.arms[-1].diverged) == {"0", "1"}
    assert report.best == "alpha=0.5,rate=0.01"
    assert left(tmp_path / NAMES[2] / "seed=0") == left(done[0] / NAMES[2] / "seed=0")
    text = sweep_text(report)
    assert "diverged with seed 0, 1" in text
    assert sweep(cache, tmp_path, arms).trainings == 0
    with pytest.raises(TrainError, match=r"all 2 arms diverged. The first: step \d"):
        sweep(cache, tmp_path, {"alpha": [0.5], "rate": [1e30, 2e30]}, seeds=1)


def test_what_a_sweep_leaves(done: tuple[Path, SweepReport]) -> None:
    out, report = done
    document = json.loads((out / "sweep.json").read_text())
    assert document["best"] == report.best
    assert document["settings"]["steps"] == STEPS
    assert document["verdict"] in sweep_text(report)
    assert [arm["name"] for arm in document["arms"]] == [arm.name for arm in report.arms]
    values = [arm["measures"]["cross_entropy"]["mean"] for arm in document["arms"]]
    assert values == sorted(values)
    for arm in report.arms:
        found = [
            Evaluation.from_json(json.loads((Path(f) / "evaluation.json").read_text()))
            .intervals()["cross_entropy"]
            .mean
            for f in arm.folders
        ]
        assert arm.values["cross_entropy"] == pytest.approx(found)
        assert arm.spread("cross_entropy") == pytest.approx(np.std(found, ddof=1))
    assert report.plot is not None
    assert Path(report.plot).read_bytes().startswith(b"\x89PNG")
    assert report.seconds > 0


def test_without_matplotlib_there_is_a_note(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    report = plotted(done[1])
    assert report.notes[-1].startswith("no plot: matplotlib is not installed. pip install 'fastkd[report]'")


@pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", ["run.json", "evaluation.json"])
def test_any_bit_of_a_finished_training(name: str, every: int, done: Any, tmp_path: Path) -> None:
    """It is noticed, or changes nothing that is read, as in a space."""
    run = next(done[0].glob("*/seed=0"))
    for file in ("run.json", "evaluation.json"):
        shutil.copy(run / file, tmp_path / file)
    before = read_result(tmp_path)
    assert before is not None
    path, noticed = tmp_path / name, 0
    data = path.read_bytes()
    bits = range(0, 8 * len(data), every)
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = read_result(tmp_path)
        except TrainError:
            noticed += 1
        else:
            assert found is not None
            assert found.run == before.run or "sha256" not in json.loads(flipped)
            assert found.evaluations[0].to_json() == before.evaluations[0].to_json()
    assert noticed > 0.6 * len(bits)  # many bytes are spaces


def test_the_best_checkpoint_is_what_is_measured(cache: Cache, tmp_path: Path) -> None:
    """Of the teacher itself, which on hard labels leaves what it was."""
    changes = {"evaluate_every": 1, "export": "best", "best": "kl_bucket", "seeds": 1}
    report = sweep(cache, tmp_path, {"alpha": [1]}, student=Tiny(seed=7), **changes)
    run = json.loads((tmp_path / "alpha=1" / "seed=0" / "run.json").read_text())["report"]
    assert run["best"]["step"] < STEPS
    assert run["best"]["value"] == run["evaluation"]["kl_bucket"]
    last = [line for line in read_metrics(tmp_path / "alpha=1" / "seed=0") if "evaluation" in line][-1]
    assert run["best"]["value"] < last["evaluation"]["kl_bucket"]
    assert report.arms[0].mean("kl_bucket") == pytest.approx(run["best"]["value"])


def test_a_mixture_and_no_held_out_split(cache: Cache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", documents(seed=1))
    report = sweep([(cache, 3), (other, 1)], tmp_path / "mixed", {"alpha": [0, 1]})
    assert report.margin is not None
    assert report.margin.by_windows
    assert len(json.loads((tmp_path / "mixed" / "alpha=0" / "seed=0" / "evaluations.json").read_text())) == 2
    assert sweep([(cache, 3), (other, 1)], tmp_path / "mixed", {"alpha": [0, 1]}).trainings == 0
    plain = sweep(cache, tmp_path / "plain", {"alpha": [0, 1]}, seeds=1, evaluate_every=0)
    assert plain.complete
    assert plain.best is None
    assert "there was no evaluation" in sweep_text(plain)


def test_under_torchrun_it_is_refused(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Before the processes look for each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    given = ["--student", "train_cases:tiny", "--cache", cache.store.describe(), "--out", str(tmp_path / "out")]
    assert main(["sweep", *given, "--alpha", "0", "1"]) == 1
    told = capfd.readouterr().err
    assert told.startswith(
        "fastkd: sweep: got 2 processes; expected one. Give each process its own arms and its own folder"
    )
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_callable_that_returns_the_same_module_again(cache: Cache, tmp_path: Path) -> None:
    """Arms do not share weights: each begins with those of the module."""
    one = Tiny(seed=1)
    before = one.head.detach().clone()
    for name, student in (("callable", lambda: one), ("module", one)):
        assert sweep(
            cache, tmp_path / name, {"alpha": [0, 1]}, student, seeds=1, steps=STEPS, evaluate_every=0
        ).complete
    assert all_left(tmp_path / "callable") == all_left(tmp_path / "module")
    assert torch.equal(one.head, before)


def test_at_once_is_deprecated(cache: Cache, tmp_path: Path) -> None:
    with (
        pytest.warns(DeprecationWarning, match="at_once has no effect"),
        pytest.raises(TrainError, match="arms: got none"),
    ):
        sweep(cache, tmp_path, {}, at_once=2)
    with pytest.raises(TrainError, match="seeds: got 0; expected an integer from 1 on"):
        sweep(cache, tmp_path, seeds=0)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({}, "arms: got none"),
        ({"alpha": []}, "arms: got none"),
        ("alpha", "arms: got 'alpha'"),
        ({"beta": [0.1]}, "arms: got 'beta'; expected some of alpha, "),
        ({"alpha": ["x"]}, "arms: got alpha='x'; expected a number"),
        ({"treatment": ["buckets"]}, "arms: treatment: got 'buckets'; expected one of auto, bucket"),
        ({"alpha": [0.5, 0.5]}, "arms: got alpha=0.5 2 times"),
        ({"alpha": [0, 1.5]}, "arms: alpha: got 1.5"),
        ({"temperature": [1, 0.5]}, "arms: .*temperature"),
        ([{"divergence": "jsd", "treatment": "sampled"}], "arm divergence=jsd,treatment=sampled: treatment"),
    ],
)
def test_arms_that_cannot_be(arms: Any, message: str, cache: Cache) -> None:
    with pytest.raises(TrainError, match=message):
        make_arms(arms, TrainSettings(), cache.spec)


def test_a_grid_leaves_out_what_cannot_be_or_is_there_already(cache: Cache) -> None:
    arms, notes = make_arms(
        {"divergence": ["forward_kl", "jsd"], "treatment": ["bucket", "sampled"]}, TrainSettings(), cache.spec
    )
    assert [arm.name for arm in arms] == [
        "divergence=forward_kl,treatment=bucket", "divergence=forward_kl,treatment=sampled",
        "divergence=jsd,treatment=bucket",
    ]  # fmt: skip
    assert len(notes) == 1
    assert notes[0].startswith("arm divergence=jsd,treatment=sampled is not possible, and is left out: treatment: got")
    arms, notes = make_arms({"alpha": [0, 1], "temperature": [1, 2]}, TrainSettings(), cache.spec)
    assert [arm.name for arm in arms] == ["alpha=0,temperature=1", "alpha=0,temperature=2", "alpha=1,temperature=1"]
    assert "is the same as alpha=1,temperature=1" in notes[0]
    arms, _ = make_arms([{"rate": 1.23456789e-4}, {}], TrainSettings(), cache.spec)
    assert [arm.name for arm in arms] == ["rate=0.000123456789", "unchanged"]


def test_noise_between_seeds() -> None:
    # what an arm and what a seed does to all is no noise
    assert seed_noise([[1.0, 2.0, 4.0], [3.0, 4.0, 6.0]]) == pytest.approx(0.0, abs=1e-12)
    assert seed_noise([[1.0], [2.0]]) == math.inf
    # of two arms: Student's t, with one degree of freedom, of the paired differences 1 and 3
    assert seed_noise([[1.0, 2.0], [2.0, 5.0]]) == pytest.approx(math.tan(0.475 * math.pi))


def measured(values: list[float], scale: float = 0.0) -> Evaluation:
    """Windows of one position each."""
    sums = np.asarray(values, np.float64)
    student = Windows(np.ones(len(sums)), {"cross_entropy": sums, "accuracy": -sums * scale})
    teacher = Windows.empty(len(sums))
    return Evaluation("held_out", "spec", "content", len(sums), 1.0, 1, "cpu", student, teacher)


def test_the_best_is_named_with_what_it_cannot_be_told_from() -> None:
    random = np.random.default_rng(0)
    windows = random.normal(3.0, 1.0, 40)
    found, arms = {}, []
    for name, mean in (("far", 0.5), ("best", 0.0), ("near", 0.004)):
        found[name] = [[measured((windows + mean + random.normal(0, 0.02, 40)).tolist())] for _ in range(2)]
        values = [float(e[0].student.sums["cross_entropy"].mean()) for e in found[name]]
        arms.append(ArmResult(name, {}, [], {"cross_entropy": values}))
    arms.append(ArmResult("gone", {}, [], diverged={"0": "NaN"}))
    report = ranked(SweepReport("out", True, [0, 1], "cross_entropy", arms), found, [1.0])
    assert [arm.name for arm in report.arms] == ["best", "near", "far", "gone"]
    assert report.alike == ["near"]
    assert report.margin == report.arms[1].behind
    assert "Not distinguishable from it: near." in report.verdict
    behind = report.arms[2].behind
    assert behind is not None
    assert behind.told_apart
    assert behind.distance == pytest.approx(0.5, abs=0.02)
    half = window_noise(found["far"][:1], found["best"][:1], [1.0], "cross_entropy")
    assert half == compare(found["far"][0][0], found["best"][0][0])["cross_entropy"].half
    with pytest.raises(TrainError, match="best: got 'kl_bucket'; expected one of cross_entropy"):
        ranked(SweepReport("out", True, [0, 1], "kl_bucket", arms), found, [1.0])


def test_one_seed_tells_nothing_apart() -> None:
    assert not Behind(1.0, None, 0.1).told_apart
    assert not Behind(1.0, 2.0, 0.1).told_apart
    assert not Behind(1.0, 0.1, 2.0).told_apart
    report = SweepReport("out", True, [0], "cross_entropy", [], "a", Behind(1.0, None, 0.1), ["b"])
    assert report.verdict.endswith("Not distinguishable from it: b. More than one seed is needed to distinguish any.")


def test_the_command_and_its_signals(
    cache: Cache, done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = cache.store.describe()
    shared = {name: value for name, value in CHANGES.items() if name != "rate"}
    options = [x for name, value in shared.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    command = ["sweep", "--student", STUDENT, "--cache", place, "--out", str(tmp_path / "out"), *options, "--json"]
    command += ["--alpha", "0", "0.5", "--rate", "0.01", "0.003"]
    with monkeypatch.context() as patch:
        stopping_at(2, patch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(command) == 75
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["complete"] is False
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["event"] == "done"
    assert report["best"] == done[1].best
    found = all_left(tmp_path / "out")
    assert {name: {**run, "metrics": 0} for name, run in found.items()} == {
        name: {**run, "metrics": 0} for name, run in all_left(done[0]).items()
    }
    assert main([*command[:-5], "--alpha", "2"]) == 1
    assert "arms: alpha: got 2.0" in capsys.readouterr().err
    assert open_cache(place).spec.hash == cache.spec.hash
