"""`stop_if_worse`: when a student is ended, and that a kill changes nothing; evaluations by window on disk."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train_jobs
from moments import Killed, Moments
from report_cases import CONTROL, STUDENT, evaluation
from train_cases import SMALL, Tiny, bits, documents, make_cache

import fastkd
from fastkd.cli.main import main
from fastkd.errors import TrainError
from fastkd.evaluate.api import Evaluation, compare
from fastkd.sweep.result import sweep_text
from fastkd.train import evaluations as kept
from fastkd.train.evaluations import MOST, kept_steps, read
from fastkd.train.metrics import read_metrics
from fastkd.train.result import report_of
from fastkd.train.trainer import Trainer
from fastkd.train.verdict import EVEN, HURT
from fastkd.train.watch import FIRST, Watch
from fastkd.utils.intervals import TAIL
from fastkd.utils.signals import Stop

# the labels are random, and this teacher does not know that: on it alone, a student becomes worse than on the labels
STEPS = 8
CHANGES: dict[str, Any] = SMALL | {
    "steps": STEPS, "alpha": 0.0, "evaluate_every": 1, "checkpoint_every": 2, "threads": 1, "keep": 1, "rate": 0.3,
}  # fmt: skip
WATCHED = CHANGES | {"control": True, "stop_if_worse": True}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a run that was stopped, and one that nobody watched."""
    folder = tmp_path_factory.mktemp("worse")
    make_cache(folder / "cache", documents(120), held_out=0.3)
    fastkd.train("train_cases:tiny", folder / "cache", folder / "stopped", **WATCHED)
    fastkd.train("train_cases:tiny", folder / "cache", folder / "whole", **CHANGES | {"control": True})
    return folder


def document(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["report"]
    return found


def result(run: Path) -> dict[str, Any]:
    """What a run came to, to the bit, but for times; of the student and of its control."""
    found: dict[str, Any] = {}
    for name in (".", "control"):
        step = document(run / name)["step"]
        found |= {f"{name}/{key}": value for key, value in bits(run / name, step).items()}
        found[f"{name}/student"] = (run / name / "student" / "model.safetensors").read_bytes()
        times = ("seconds", "waiting", "positions_per_second")
        found[f"{name}/log"] = [{k: v for k, v in e.items() if k not in times} for e in read_metrics(run / name)]
        found |= {f"{name}/{p.name}": p.read_bytes() for p in sorted((run / name / "evaluations").iterdir())}
    report = document(run)
    for name in ("stopped_worse", "verdicts", "evaluation", "best", "step", "complete"):
        found[name] = report.get(name)
    return found


def test_a_worse_student_is_ended(place: Path) -> None:
    run = place / "stopped"
    found = document(run)
    worse = found["stopped_worse"]
    assert found["complete"]
    assert FIRST <= worse["step"] == found["step"] < STEPS
    assert (worse["against"], worse["verdict"], worse["measure"]) == ("control", HURT, "cross_entropy")
    assert worse["looks"] == STEPS - FIRST
    assert found["control"]["step"] == STEPS
    # by the interval for all looks, of the difference after this step
    at = worse["step"]
    ours, theirs = read(run, at)[0], read(run / "control", at)[0]
    difference = compare(ours, theirs, tail=TAIL / worse["looks"])["cross_entropy"]
    assert worse["difference"]["cross_entropy"]["mean"] == difference.mean > difference.half
    before = [compare(*(read(folder, step)[0] for folder in (run, run / "control")), tail=TAIL / worse["looks"])
              for step in range(FIRST, at)]  # fmt: skip
    assert all(one["cross_entropy"].mean <= one["cross_entropy"].half for one in before)
    # the result is what the training had come to, and its evaluation
    assert (run / "student" / "model.safetensors").exists()
    last = Evaluation.from_json(json.loads((run / "evaluation.json").read_text()))
    np.testing.assert_array_equal(last.student.sums["kl_bucket"], ours.student.sums["kl_bucket"])
    assert kept.steps_of(run) == list(range(1, at + 1))


def test_again_it_stays_ended_and_without_the_option_it_goes_on(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "stopped", run)
    before = result(run)
    report = fastkd.train("train_cases:tiny", place / "cache", run, **WATCHED)
    assert report.status == 0
    assert report.stopped_worse is not None
    assert result(run) == before
    text = report_of(report)
    assert f"stopped after step {report.step} of {STEPS}: against control: hurt (cross_entropy +" in text
    assert f"95% for all {STEPS - FIRST} comparisons together" in text
    assert f"student, step {report.step}  control, step {STEPS}  difference\n" in text
    report = fastkd.train("train_cases:tiny", place / "cache", run, **CHANGES | {"control": True})
    assert (report.step, report.stopped_worse) == (STEPS, None)
    assert list(report.verdicts) == ["control"]
    assert result(run) == result(place / "whole")
    # what is complete stays so
    assert fastkd.train("train_cases:tiny", place / "cache", run, **WATCHED).step == STEPS


def die_at(place: Path, out: Path, moment: int) -> bool:
    """Die before a step, or a file of a trainer, counted over all arms, and resume; whether it came to that."""
    moments = Moments(moment)
    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        moments.watch([(Trainer, name) for name in ("_make", "_save", "_look", "write_run")], patch)
        fastkd.train("train_cases:tiny", place / "cache", out, **WATCHED)
    if not moments.reached:
        return False
    fastkd.train("train_cases:tiny", place / "cache", out, **WATCHED)
    return True


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_at_every_step(place: Path, tmp_path: Path, every: int) -> None:
    """Of the student; its control is trained already."""
    wanted, moment, lived = result(place / "stopped"), 6 - every, True
    while lived:
        moment += every
        out = tmp_path / str(moment)
        shutil.copytree(place / "stopped" / "control", out / "control")
        lived = die_at(place, out, moment)
        assert result(out) == wanted, f"killed at moment {moment}"
        shutil.rmtree(out)
    assert moment > 2 * document(place / "stopped")["step"]


def mutual(place: Path, out: Path, **changes: Any) -> Any:
    students = {"a": "train_cases:tiny", "b": "train_cases:seeded"}
    learns = dict.fromkeys(students, ("teacher",))  # each other they would help
    return fastkd.mutual(students, place / "cache", out, **WATCHED | {"learns": learns} | changes)


def test_students_that_learn_from_each_other(place: Path, tmp_path: Path) -> None:
    """Ended when both are worse."""
    report = mutual(place, tmp_path / "run")
    worse = report.run.stopped_worse
    assert report.complete
    assert worse is not None
    assert FIRST <= worse.step == report.run.step < STEPS
    assert worse.against in ("control/a", "control/b")
    assert f"stopped after step {worse.step} of {STEPS}, as no student is served: against control/" in report.text
    assert {one.control.step for one in report.students.values()} == {STEPS}
    assert sorted(path.name for path in (tmp_path / "run" / "students").iterdir()) == ["a", "b"]
    with pytest.raises(TrainError, match="stop_if_worse: got no student that learns from another"):
        mutual(place, tmp_path / "other", learns={"a": (), "b": ()})


@pytest.mark.soak
def test_students_that_learn_from_each_other_are_stopped_and_go_on(place: Path, tmp_path: Path) -> None:
    stop = Stop()
    stop()
    assert mutual(place, tmp_path / "run", stop=stop).run.step == 0  # first the controls
    step = mutual(place, tmp_path / "run").run.step
    shutil.copytree(tmp_path / "run" / "control", tmp_path / "parts" / "control")
    assert mutual(place, tmp_path / "parts", stop=stop).run.step == 1
    assert mutual(place, tmp_path / "parts").complete
    assert bits(tmp_path / "parts", step) == bits(tmp_path / "run", step)
    went_on = mutual(place, tmp_path / "run", stop_if_worse=False)
    assert (went_on.run.step, went_on.run.stopped_worse) == (STEPS, None)
    assert went_on.students["a"].verdict.overall == HURT


def test_the_arms_of_a_sweep(place: Path, tmp_path: Path) -> None:
    given = ("train_cases:tiny", place / "cache", tmp_path / "sweep", {"alpha": [0.0, 1.0]})
    changes = {name: value for name, value in CHANGES.items() if name != "alpha"} | {"seeds": 1}
    report = fastkd.sweep(*given, **changes, stop_if_worse=True)
    assert report.complete
    assert report.best == "alpha=1"
    one = report.arms[1]
    step = document(place / "stopped")["step"]
    assert (one.name, one.stopped, one.values) == ("alpha=0", {"0": step}, {})
    assert bits(tmp_path / "sweep" / "alpha=0" / "seed=0", step) == bits(place / "stopped", step)
    assert f"worse than hard labels, stopped after step {step} (seed 0)" in sweep_text(report)
    assert fastkd.sweep(*given, **changes, stop_if_worse=True).trainings == 0
    again = fastkd.sweep(*given, **changes)
    assert (again.trainings, again.arms[1].stopped) == (1, {})
    assert bits(tmp_path / "sweep" / "alpha=0" / "seed=0", STEPS) == bits(place / "whole", STEPS)
    for arms, message in (
        ({"alpha": [0.0, 0.5]}, "stop_if_worse: got no arm of hard labels alone with rate 0.3; expected one, which"),
        ([{"rate": 0.1}, {"alpha": 1.0}], "got no arm of hard labels alone with rate 0.1"),
    ):
        with pytest.raises(TrainError, match=message):
            fastkd.sweep(*given[:2], tmp_path / "other", arms, **changes, stop_if_worse=True)


@pytest.mark.soak
def test_killed_in_the_control(place: Path, tmp_path: Path) -> None:
    wanted = result(place / "stopped")
    for moment in range(1, 40):
        assert die_at(place, tmp_path / str(moment), moment)
        assert result(tmp_path / str(moment)) == wanted, f"killed at moment {moment}"


@pytest.mark.soak
def test_two_processes_decide_alike(place: Path, tmp_path: Path) -> None:
    arguments = ("train_cases:tiny", place / "cache", tmp_path / "run", WATCHED)
    train_jobs.run(train_jobs.train, *arguments, ranks=2)
    ours, theirs = document(tmp_path / "run"), document(place / "stopped")
    assert ours["step"] == theirs["step"]
    one, other = (d["stopped_worse"]["difference"]["cross_entropy"]["mean"] for d in (ours, theirs))
    assert one == pytest.approx(other, abs=1e-5)


def test_a_student_that_is_no_worse_is_not_ended(place: Path, tmp_path: Path) -> None:
    report = fastkd.train(Tiny(seed=1), place / "cache", tmp_path / "run", **WATCHED | {"alpha": 1.0, "steps": 4})
    assert (report.step, report.stopped_worse) == (4, None)
    assert report.verdicts["control"].overall == EVEN
    assert report.verdicts["control"].difference["cross_entropy"] == (0.0, 0.0)


def test_the_control_comes_first(place: Path, tmp_path: Path) -> None:
    stop = Stop()
    stop()
    report = fastkd.train(Tiny(seed=1), place / "cache", tmp_path / "run", **WATCHED, stop=stop)
    assert (report.status, report.step, list(report.arms)) == (75, 0, ["control"])
    assert f"{tmp_path / 'run' / 'control'}: stopped after step 1 of {STEPS}" in report_of(report)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": False}, "stop_if_worse: got no control; expected --control, which the student is compared with"),
        (
            {"evaluate_every": 0},
            "stop_if_worse: got no evaluations of the held-out split; expected some",
        ),
        ({"evaluate": lambda student: {"cross_entropy": 1.0}}, "got no evaluations of the held-out split"),
        ({"evaluate_every": 4}, "stop_if_worse: got 2 evaluations in 8 steps; expected at least 4"),
        ({"best": "ece"}, "best: got 'ece'; with stop_if_worse expected a measure that is a mean over positions"),
        ({"best": "mine"}, "best: got 'mine'; expected one of cross_entropy"),
    ],
)
def test_what_cannot_be(place: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        fastkd.train(Tiny(seed=1), place / "cache", tmp_path / "run", **WATCHED | changes)
    assert not list(tmp_path.glob("run/**/checkpoints/*"))


def test_the_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["train", "--student", "train_cases:tiny", "--cache", str(place / "cache"), "--out", str(tmp_path / "run")]
    assert main([*given, "--steps", "2", "--device", "cpu", "--stop-if-worse"]) == 1
    assert "fastkd: --stop-if-worse: got no control; expected --control" in capsys.readouterr().err


# Looks


def test_a_look_takes_the_interval_of_all_looks(tmp_path: Path) -> None:
    ours, theirs = evaluation(STUDENT), evaluation(STUDENT, seed=1)
    difference = compare(ours, theirs)["cross_entropy"]
    # worse by somewhat more than the interval of a single look
    shift = 1.25 * difference.half - difference.mean
    sums = ours.student.sums | {"cross_entropy": ours.student.sums["cross_entropy"] + shift * ours.student.counts}
    ours = replace(ours, student=replace(ours.student, sums=sums))
    (tmp_path / "control").mkdir()
    for step in (10, 30):
        kept.write(tmp_path / "control", step, [theirs])
    watch = Watch({"control": tmp_path / "control"}, [1.0], "cross_entropy")
    assert watch.look(30, [ours], [30]) is not None
    assert watch.look(30, [ours], [30, 40, 50, 60, 70, 80, 90]) is None
    assert watch.look(10, [ours], [30]) is None  # too early
    assert watch.look(20, [ours], [20]) is None  # the control was not evaluated then
    assert watch.look(30, [theirs], [30]) is None


def test_students_that_are_no_worse_are_rarely_ended(tmp_path: Path) -> None:
    """Ten looks at a difference that wanders around zero."""
    random, times, ended = np.random.default_rng(0), 300, 0
    (tmp_path / "control").mkdir()
    zero = evaluation(STUDENT, windows=30)
    zero = replace(zero, student=replace(zero.student, sums={"cross_entropy": 0.0 * zero.student.counts}, bins=None))
    looks = list(range(3, 13))
    for step in looks:
        kept.write(tmp_path / "control", step, [zero])
    watch = Watch({"control": tmp_path / "control"}, [1.0], "cross_entropy")
    for _ in range(times):
        walk = np.cumsum(random.normal(0, 1, (len(looks), 30)), 0)
        for step, row in zip(looks, walk, strict=True):
            found = replace(zero, student=replace(zero.student, sums={"cross_entropy": row * zero.student.counts}))
            if watch.look(step, [found], looks) is not None:
                ended += 1
                break
    assert ended / times < 0.05


def test_which_evaluations_are_kept() -> None:
    assert kept_steps(10, 0) == []
    assert kept_steps(10, 3) == [3, 6, 9, 10]
    assert kept_steps(9, 3) == [3, 6, 9]
    many = kept_steps(10_000, 7)
    assert MOST / 2 < len(many) <= MOST + 1
    assert many[-1] == 10_000
    assert all(step % 7 == 0 for step in many[:-1])


def test_evaluations_on_disk(tmp_path: Path) -> None:
    mixture = [evaluation(STUDENT), evaluation(CONTROL, content="other")]
    kept.write(tmp_path, 5, mixture)
    kept.write(tmp_path, 7, mixture[:1])
    again = read(tmp_path, 5)
    for one, other in zip(mixture, again, strict=True):
        assert (one.spec, one.content, one.split) == (other.spec, other.content, other.split)
        assert {n: v.tolist() for n, v in one.student.sums.items()} == {
            n: v.tolist() for n, v in other.student.sums.items()
        }
    assert read(tmp_path, 6) == []
    path = tmp_path / "evaluations" / "step-00000005.npz"
    data = path.read_bytes()
    kept.write(tmp_path, 5, again)
    assert path.read_bytes() == data
    kept.drop_after(tmp_path, 5)
    assert kept.steps_of(tmp_path) == [5]
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(TrainError, match=r"step-00000005.npz: cannot be read .* Delete it"):
        read(tmp_path, 5)
