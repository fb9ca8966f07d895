"""Born-again generations: what separate captures and trainings give, resumed anywhere; and modules as teachers."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import train_cases
import train_jobs
import vision_cases
from capture_cases import contents
from train_cases import CAPTURE, SMALL, Tiny, bits, documents, seeded
from vision_cases import Net

import fastkd
from fastkd.cache import CacheError, open_cache
from fastkd.capture.mix_caches import mix_targets
from fastkd.cli.main import main
from fastkd.errors import TeacherError, TrainError
from fastkd.evaluate.api import Evaluation, evaluate
from fastkd.generations.result import GENERATIONS, GenerationsReport, generations_text
from fastkd.models.trained import load_trained
from fastkd.report.make import make_report
from fastkd.settings import LiveSettings
from fastkd.teachers.load import load_teacher
from fastkd.train.student import make_student
from fastkd.train.trainer import Trainer
from fastkd.utils.signals import Stop

STEPS = 2
CHANGES: dict[str, Any] = SMALL | {"steps": STEPS, "evaluate_every": STEPS, "checkpoint_every": 1, "threads": 1}
LIVE = LiveSettings(**{**CAPTURE, "shard_positions": 256})
CAPTURED = LIVE.capture_settings()
STUDENT, TEACHER = "train_cases:seeded", "train_cases:dropping"
DATA = documents(24, 20)


pytestmark = pytest.mark.usefixtures("one_thread")


def run(out: Path, count: int = 2, student: Any = STUDENT, teacher: Any = TEACHER, data: Any = None,
        **changes: Any) -> GenerationsReport:  # fmt: skip
    given = {"live": LIVE, **CHANGES, **changes}
    return fastkd.generations(count, student, teacher, DATA if data is None else data, out, **given)


def left(out: Path) -> dict[str, Any]:
    """What was made, to the bit; but for times."""
    found: dict[str, Any] = {str(p.relative_to(out)): contents(p) for p in sorted(out.glob("*/cache"))}
    for folder in [*sorted(out.glob("*/run")), *out.glob("control")]:
        name = str(folder.relative_to(out))
        found[name] = bits(folder, STEPS), (folder / "student" / "model.safetensors").read_bytes()
    document = json.loads((out / GENERATIONS).read_text())
    found["values"] = [(m["name"], m["seed"], m["values"], m["against"]) for m in document["members"]]
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GenerationsReport]:
    """Two generations, the control and the ensemble, at once."""
    out = tmp_path_factory.mktemp("generations") / "out"
    return out, run(out, control=True)


def test_they_are_what_separate_captures_and_trainings_make(done: Any, tmp_path: Path) -> None:
    out, report = done
    assert report.complete
    assert [m.name for m in report.members] == ["generation 1", "control", "generation 2", "ensemble"]
    assert [m.seed for m in report.members] == [0, 0, 1, 2]
    fastkd.capture(load_teacher(TEACHER), DATA, tmp_path / "1", CAPTURED)
    fastkd.train(STUDENT, tmp_path / "1", tmp_path / "run-1", **CHANGES)
    student = make_student(STUDENT, None).student.model
    trained = load_trained(student, tmp_path / "run-1" / "student", TeacherError)
    fastkd.capture(trained, DATA, tmp_path / "2", CAPTURED)
    fastkd.train(STUDENT, tmp_path / "2", tmp_path / "run-2", **CHANGES | {"seed": 1})
    mix_targets([tmp_path / "1", tmp_path / "2"], tmp_path / "mean")
    fastkd.train(STUDENT, tmp_path / "mean", tmp_path / "run-3", **CHANGES | {"seed": 2})
    fastkd.train(STUDENT, tmp_path / "1", tmp_path / "control", **CHANGES | {"alpha": 1.0})
    for ours, theirs in (("generation-1", "1"), ("generation-2", "2"), ("ensemble", "mean")):
        assert contents(out / ours / "cache") == contents(tmp_path / theirs)
    for ours, theirs in (
        ("generation-1/run", "run-1"), ("generation-2/run", "run-2"), ("ensemble/run", "run-3"), ("control", "control"),
    ):  # fmt: skip
        assert bits(out / ours, STEPS) == bits(tmp_path / theirs, STEPS)
    # all are measured on the first cache
    model = make_student(trained_by(out / "generation-2"), open_cache(tmp_path / "1").spec).student
    measured = evaluate(model, tmp_path / "1").intervals()["cross_entropy"]
    assert report.members[2].values["cross_entropy"] == measured
    assert report.members[2].against["before"]["cross_entropy"].mean == pytest.approx(
        measured.mean - report.members[0].values["cross_entropy"].mean
    )


def trained_by(folder: Path) -> Any:
    return load_trained(seeded(), folder / "run" / "student", TrainError)


def test_one_generation_is_a_capture_and_a_training(tmp_path: Path) -> None:
    report = run(tmp_path / "out", 1)
    assert report.complete
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")) == [
        "generation-1", "generations.json", "generations.png",
    ]  # fmt: skip
    fastkd.capture(load_teacher(TEACHER), DATA, tmp_path / "cache", CAPTURED)
    fastkd.train(STUDENT, tmp_path / "cache", tmp_path / "run", **CHANGES)
    assert contents(tmp_path / "out" / "generation-1" / "cache") == contents(tmp_path / "cache")
    assert bits(tmp_path / "out" / "generation-1" / "run", STEPS) == bits(tmp_path / "run", STEPS)


def test_the_report_and_its_text(done: Any, tmp_path: Path) -> None:
    out, report = done
    text = generations_text(report)
    assert "against the control" in text
    assert "against the generation before" in text
    assert Path(report.plot).read_bytes().startswith(b"\x89PNG")
    document = json.loads((out / GENERATIONS).read_text())
    assert document["format"] == "fastkd-generations"
    assert set(document["members"][2]["against"]) == {"control", "before"}
    assert document["members"][2]["against"]["control"]["cross_entropy"]["verdict"] in (
        "helped",
        "hurt",
        "no difference",
    )
    page = tmp_path / "report.html"
    made = make_report([*sorted(out.glob("generation-*/run")), out / "ensemble" / "run"], page)
    assert made["runs"] == ["generation-1/run", "generation-2/run", "ensemble/run"]


def test_stopped_at_every_step_and_resumed(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, make, stops = Stop(), Trainer._make, 0

    def stopping(self: Any, *arguments: Any) -> Any:
        stop()
        return make(self, *arguments)

    monkeypatch.setattr(Trainer, "_make", stopping)
    for _ in range(100):
        stop.asked = False
        if (report := run(tmp_path / "out", control=True, stop=stop)).complete:
            break
        assert report.status == 75
        assert "Run the same command again" in generations_text(report)
        stops += 1
    assert stops >= 4 * (STEPS - 1)
    assert left(tmp_path / "out") == left(done[0])


def test_finished_generations_are_kept_and_more_can_follow(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    monkeypatch.setattr(Trainer, "_make", lambda *arguments: pytest.fail("it trains again"))
    card = out / "generation-2" / "run" / "student" / "README.md"
    text = card.read_text()
    card.unlink()
    assert left_of(run(out, control=True)) == left_of(done[1])
    assert card.read_text() == text
    monkeypatch.undo()
    with pytest.raises(TrainError, match=r"generations: got 3; expected 2, of which .*ensemble is the mean. Delete"):
        run(out, 3)
    shutil.rmtree(out / "ensemble")
    report = run(out, 3, control=True)
    assert [m.seed for m in report.members] == [0, 0, 1, 2, 3]
    assert left_of(report)[:3] == left_of(done[1])[:3]
    assert len(open_cache(out / "ensemble" / "cache").spec.teacher.split("spec ")) == 4


def left_of(report: GenerationsReport) -> list[Any]:
    return [(m.name, m.seed, dict(m.values)) for m in report.members]


def killed(out: Path, moment: int) -> bool:
    """Whether generations were killed at a moment; 0: none."""
    settings = {"live": LIVE, "control": True, **CHANGES}
    arguments = ((2, STUDENT, TEACHER, DATA, out), settings, moment)
    status = train_jobs.finish(train_jobs.start(train_jobs.generations_and_die, *arguments))
    assert status in ([0], [-signal.SIGKILL])
    return status != [0]


@pytest.mark.parametrize("moments", [(130,), pytest.param((130, 75), marks=pytest.mark.soak)])
def test_killed(done: Any, tmp_path: Path, moments: tuple[int, ...]) -> None:
    for moment in moments:
        assert killed(tmp_path / "out", moment)
    assert not killed(tmp_path / "out", 0)
    assert left(tmp_path / "out") == left(done[0])


@pytest.mark.soak
def test_killed_at_every_moment(done: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted, moment = left(done[0]), 1
    while killed(out := tmp_path / str(moment), moment):
        assert not killed(out, 0)
        assert left(out) == wanted, f"killed at moment {moment}"
        with capfd.disabled():
            print(f"killed at moment {moment}: resumed to the same bytes", flush=True)
        shutil.rmtree(out)
        moment += 1
    assert moment > 200


def test_examples(tmp_path: Path) -> None:
    """A classifier whose student is the next teacher."""
    live = LiveSettings(k=4, draws=2, shard_positions=16, held_out=0.2)
    changes = {**vision_cases.SMALL, "steps": STEPS, "evaluate_every": STEPS}
    data = vision_cases.examples()
    report = fastkd.generations(2, "vision_cases:dropping", Net(seed=7), data, tmp_path, live=live, **changes)
    assert [m.name for m in report.members] == ["generation 1", "generation 2", "ensemble"]
    first, second = (open_cache(tmp_path / f"generation-{g}" / "cache") for g in (1, 2))
    assert first.spec.dataset == second.spec.dataset
    assert first.spec.teacher != second.spec.teacher
    assert "accuracy" in report.members[2].values


def test_a_model_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = train_cases.llama()
    changes = {"ensemble": False, "steps": 1, "evaluate_every": 0}
    report = run(tmp_path, 2, config, Tiny(seed=3, vocab=config.vocab_size), **changes)
    assert report.complete
    assert "llama" in open_cache(tmp_path / "generation-2" / "cache").spec.teacher.lower()


def test_a_trained_module_is_a_teacher_by_name(done: Any, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    fastkd.train("train_cases:tiny", done[0] / "generation-1" / "cache", tmp_path, **CHANGES)
    teacher = load_teacher(f"trained:train_cases:tiny@{folder}")
    model = load_trained(train_cases.tiny(), folder, TeacherError)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert torch.equal(teacher(tokens).states, model.eval()(tokens).states)
        assert not torch.equal(teacher(tokens).states, train_cases.tiny().eval()(tokens).states)
    assert teacher.fingerprint == fastkd_fingerprint(model)
    for name, message in (
        ("trained:train_cases:tiny", "expected trained:module:factory@FOLDER"),
        (f"trained:train_cases:tiny@{tmp_path / 'none'}", "expected the weights of a trained module"),
        (f"trained:vision_cases:double@{folder}", r"expected .* as in Net .* Name the module that was trained"),
    ):
        with pytest.raises(TeacherError, match=message):
            load_teacher(name)


def fastkd_fingerprint(model: Any) -> str:
    from fastkd.teachers.module import ModuleTeacher

    return ModuleTeacher(model, vocab_size=1).fingerprint


def short(*arguments: Any) -> Any:
    made = make_student(*arguments)
    made.student.max_positions = 8
    return made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "generations: got 0; expected an integer from 1 on"),
        ({"student": lambda: Tiny(vocab=20)}, "got a vocabulary of 20; expected at least"),
        ({"student": lambda: Tiny(vocab=200)}, r"got a vocabulary of 200; expected \d+, that of the teacher, as the"),
        ({"temperature": 0.5}, "temperature: got 0.5, below the lowest stored one"),
        (
            {"live": LiveSettings(**CAPTURE, temperatures=(1.0, 2.0)), "temperature": 3.0},
            "got 3.0, which is not",
        ),
        ({"live": LiveSettings(k=0, draws=0)}, "k: got 0 with draws=0"),
        ({"match": ("1:1:mse:1",)}, "match: got features; expected none"),
        ({"alpha": 2.0}, "alpha: got 2.0; expected a number from 0 to 1"),
        ({"export_teacher": True}, "export_teacher: got it, and no teacher that is made of the student"),
        ({"exits": (9,)}, "exits: got 9; expected numbers from 1 to"),
        ({"student": 5}, "student: got int; expected a folder"),
    ],
)
def test_what_is_not_possible_is_said_before_the_first_capture(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((TrainError, CacheError), match=message) as caught:
        run(tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_student_of_shorter_contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.generations.api.make_student", short)
    with pytest.raises(TrainError, match="student: it takes 8 tokens; expected 16, the context of the capture"):
        run(tmp_path / "out")


def test_other_settings_on_resume(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    for changes, message in (
        ({"rate": 0.5}, "it was begun with other settings"),
        ({"live": LiveSettings(**CAPTURE, codec="fast")}, "was written with other settings"),
        ({"teacher": Tiny(seed=9)}, "was written with other settings .*teacher"),
        ({"data": documents(25, 20)}, "was written with other settings .*data"),
    ):
        with pytest.raises((TrainError, CacheError), match=message):
            run(out, **changes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match="generations: got 2 processes; expected one"):
        run(out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(TrainError, match="expected an empty folder, a new one, or that of a generations"):
        run(tmp_path / "other")


def test_a_damaged_evaluation_is_said(done: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    path = out / "generation-2" / "evaluation.json"
    assert Evaluation.from_json(json.loads(path.read_text())).windows
    path.write_text(path.read_text().replace("1", "2"))
    with pytest.raises(TrainError, match=r"generation-2/evaluation\.json: cannot be read"):
        run(out, control=True)


def test_the_command(done: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"input_ids": DATA}), tmp_path / "ids.parquet")
    flags = {**CAPTURE, "shard_positions": 256, **CHANGES, "student": STUDENT, "teacher": TEACHER}
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    arguments += ["--data", str(tmp_path / "ids.parquet"), "--out", str(tmp_path / "out")]
    assert main(["generations", "1", "--control", "--json", *arguments]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [m["name"] for m in report["members"]] == ["generation 1", "control"]
    for folder in ("generation-1/run", "control"):
        assert bits(tmp_path / "out" / folder, STEPS) == bits(done[0] / folder, STEPS)
    assert main(["generations", "2", *arguments, "--alpha", "2"]) == 1
    assert "fastkd: --alpha 2.0: expected a number" in capsys.readouterr().err
