"""Trainings whose teacher is the student's own average: `teacher="ema:0.9"`."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import train_jobs
from train_cases import SMALL, Tiny, bits, documents, dropping, llama, make_cache, stopped, tied_llama

import fastkd
from fastkd.cli.main import main
from fastkd.errors import TrainError
from fastkd.models.hub import load_transformers
from fastkd.settings import LiveSettings
from fastkd.train.checkpoint import newest
from fastkd.train.metrics import read_metrics

DATA = documents()
LIVE = LiveSettings(k=6, draws=3, context=16, shard_positions=48, held_out=0.2)
EMA: dict[str, Any] = SMALL | {"teacher": "ema:0.9", "data": DATA, "live": LIVE, "alpha": 0.3}
DYING: dict[str, Any] = EMA | {"steps": 6, "checkpoint_every": 2, "micro_tokens": 24}
KILLED = -signal.SIGKILL


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = newest(run)
    assert found is not None
    return found.tensors("model")


def test_decay_1_is_the_training_with_a_frozen_copy(tmp_path: Path) -> None:
    """Bit by bit: as a training beside a teacher that is the student as it was."""
    same = EMA | {"evaluate_every": 5}
    fastkd.train(Tiny(seed=1), out=tmp_path / "ema", **same | {"teacher": "ema:1"})
    fastkd.train(Tiny(seed=1), out=tmp_path / "copy", **same | {"teacher": Tiny(seed=1)})
    ours, theirs = (bits(tmp_path / run, SMALL["steps"]) for run in ("ema", "copy"))
    average = {name: ours.pop(name) for name in list(ours) if name.startswith("model.live.")}
    assert ours == theirs
    assert average["model.live.model.head"][2] == Tiny(seed=1).head.detach().numpy().tobytes()
    for line, other in zip(read_metrics(tmp_path / "ema"), read_metrics(tmp_path / "copy"), strict=True):
        for name in ("loss", "hard", "soft", "grad_norm"):
            assert line.get(name) == other.get(name)
        for name, value in other.get("evaluation", {}).items():
            assert line["evaluation"][name] == value


def test_log_and_evaluation(tmp_path: Path) -> None:
    """Measured against the average, on labels, and the average on labels."""
    changes = EMA | {"evaluate_every": 5, "steps": 20}
    report = fastkd.train(Tiny(seed=1), out=tmp_path / "run", control=True, **changes)
    names = {"cross_entropy", "accuracy", "ece", "perplexity"}
    assert names | {"kl_bucket", "kl_sampled", "agreement"} <= report.evaluation.keys()
    assert {name.removeprefix("ema/") for name in report.evaluation if name.startswith("ema/")} == names
    assert report.evaluation["ema/cross_entropy"] != report.evaluation["cross_entropy"]
    assert 0 < report.evaluation["kl_bucket"] < 0.5
    first = read_metrics(tmp_path / "run")[0]
    # nothing to learn from an average that is the student, as there is no dropout
    assert first["soft"] == pytest.approx(0, abs=0.05)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["live"]["teacher"] == "ema:0.9"
    control = weights(tmp_path / "run" / "control")
    assert not any(name.startswith("live.") for name in control)


def test_it_resumes_at_every_step_to_the_same_bytes(tmp_path: Path) -> None:
    changes: dict[str, Any] = EMA | {"steps": 4, "checkpoint_every": 1, "keep": 9}
    fastkd.train(dropping, out=tmp_path / "whole", **changes)
    while fastkd.train(dropping, out=tmp_path / "parts", stop=stopped(), **changes).status == 75:
        pass
    for step in range(1, 5):
        assert bits(tmp_path / "parts", step) == bits(tmp_path / "whole", step)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in DATA))
    tied_llama().save_pretrained(tmp_path / "student")
    args = ["train", "--student", str(tmp_path / "student"), "--teacher", "ema:0.999", "--exits", "1"]
    args += ["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run"), "--steps", "3", "--k", "6"]
    args += ["--batch-tokens", "60", "--context", "16", "--held-out", "0.2", "--export-teacher", "--export-exit", "1"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^held out +student +ema +exit1$", printed, re.MULTILINE)
    assert re.search(r"^kl_bucket +\d\.\d{4} +\d\.\d{4}$", printed, re.MULTILINE)
    for name in ("student", "student-ema", "student-exit1"):
        assert (tmp_path / "run" / name / "model.safetensors").exists()
        assert f"{name.removeprefix('student-')}: {tmp_path / 'run' / name}\n" in printed
    assert main([*args[:4], "ema:2", *args[5:]]) == 1
    assert "--teacher ema:2: expected ema:DECAY with a decay from 0 to 1" in capsys.readouterr().err
    assert main([*args, "--exits", "7"]) == 1  # in addition, to a run that was begun without
    assert "begun with other settings (--exits: [1] there, [1, 7] here)" in capsys.readouterr().err
    assert main([*args, "--exits", "7", "--out", str(tmp_path / "other")]) == 1
    assert "--exits 7: expected numbers from 1 to 1, as" in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of a run that nobody killed."""
    out = tmp_path_factory.mktemp("ema") / "whole"
    train_jobs.run(train_jobs.train, "train_cases:dropping", None, out, DYING)
    found = bits(out, DYING["steps"])
    assert any(name.startswith("model.live.") for name in found)
    return found


@pytest.mark.parametrize("moment", [19, pytest.param(37, marks=pytest.mark.soak)])
def test_killed_and_resumed(tmp_path: Path, whole: dict[str, Any], moment: int) -> None:
    assert die_at(tmp_path / "run", moment)
    assert bits(tmp_path / "run", DYING["steps"]) == whole


def die_at(out: Path, moment: int) -> bool:
    """A run killed at a moment and gone on with; whether it lived to see the moment."""
    arguments = ("train_cases:dropping", None, out, DYING)
    (status,) = train_jobs.finish(train_jobs.start(train_jobs.train_and_die, *arguments, moment))
    if status == 0:
        return False
    assert status == KILLED
    train_jobs.run(train_jobs.train, *arguments)
    return True


@pytest.mark.soak
def test_killed_at_every_moment(tmp_path: Path, whole: dict[str, Any]) -> None:
    moment = 1
    while die_at(out := tmp_path / str(moment), moment):
        assert bits(out, DYING["steps"]) == whole, f"killed at moment {moment}"
        shutil.rmtree(out)
        moment += 1
    assert moment > 30


@pytest.mark.parametrize(
    ("student", "tolerance"),
    [("train_cases:double", 1e-9), pytest.param("train_cases:tied_llama", 2e-5, marks=pytest.mark.soak)],
)
def test_two_processes(tmp_path: Path, student: str, tolerance: float) -> None:
    """The average is sharded with the student, comes out as that of one process, and is evaluated by both."""
    changes = EMA | {"evaluate_every": 5, "rate": 1e-3}
    train_jobs.train(student, None, tmp_path / "one", changes | {"micro_tokens": 1000})
    runs: Any = [(student, None, tmp_path / kind, changes | {"parallel": kind}) for kind in ("ddp", "fsdp")]
    train_jobs.run(train_jobs.train_all, runs, ranks=2)
    wanted = weights(tmp_path / "one")
    assert any(name.startswith("live.model.") for name in wanted)
    for kind in ("ddp", "fsdp"):
        found = weights(tmp_path / kind)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
        ours, theirs = (read_metrics(tmp_path / run)[-1]["evaluation"] for run in (kind, "one"))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-8)  # sums in another order
        assert "ema/cross_entropy" in ours
    # each process has written its own half of both
    checkpoint = newest(tmp_path / "fsdp")
    assert checkpoint is not None
    sizes = [size for path in checkpoint.folder.glob("*.distcp") if (size := path.stat().st_size)]
    assert len(sizes) == 2
    assert max(sizes) < 0.7 * sum(sizes)


def test_the_average_is_exported_on_request(tmp_path: Path) -> None:
    """With config, as a model of transformers; and later, by the same command with the flag."""
    student = load_transformers().AutoModelForCausalLM.from_config(tied_llama())
    changes = EMA | {"steps": 3}
    fastkd.train(student, out=tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "student-ema").exists()
    fastkd.train(student, out=tmp_path / "run", export_teacher=True, **changes)
    loaded = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student-ema")
    found = weights(tmp_path / "run")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, found[f"live.model.{name}"]), name
        if parameter.ndim > 1:
            assert not torch.equal(parameter, found[f"model.{name}"]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "ema"}, r"teacher: got 'ema:'; expected ema:DECAY with a decay from 0 to 1"),
        ({"teacher": "ema:1.5"}, r"teacher: got 'ema:1.5'; expected ema:DECAY with a decay from 0 to 1"),
        ({"teacher": "ema:-1"}, r"teacher: got 'ema:-1'"),
        ({"teacher": "ema:nan"}, r"teacher: got 'ema:nan'"),
        ({"teacher": "ema:"}, r"teacher: got 'ema:'"),
        ({"teacher": "ema:often"}, r"teacher: got 'ema:often'"),
        ({"match": ("9:1:mse:1",)}, r"match: got 9:1:mse:1, and the teacher ema:0.9"),
        ({"alpha": 1.0, "export_teacher": True}, r"teacher: got 'ema:0.9', and alpha=1; expected none"),
        ({"alpha": 1.0, "teacher": None, "export_teacher": True}, r"export_teacher: got it, and no teacher that is"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        fastkd.train(Tiny(seed=1), out=tmp_path / "run", **EMA | changes)
    assert not list(tmp_path.rglob("*.distcp"))


def test_a_cache_is_refused_beside_it(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    with pytest.raises(TrainError, match="cache, teacher: got both"):
        fastkd.train(Tiny(seed=1), cache, tmp_path / "run", teacher="ema:0.9", **SMALL)


def test_another_decay_is_refused_on_resuming(tmp_path: Path) -> None:
    fastkd.train(Tiny(seed=1), out=tmp_path / "run", **EMA | {"steps": 2})
    with pytest.raises(TrainError, match=r"live: .*0.9.*there.*0.99.* here"):
        fastkd.train(Tiny(seed=1), out=tmp_path / "run", **EMA | {"steps": 2, "teacher": "ema:0.99"})


def test_with_exits(tmp_path: Path) -> None:
    """Both learn in one training: the last layer from the average, the exits from the last layer."""
    report = fastkd.train(
        load_transformers().AutoModelForCausalLM.from_config(llama()), out=tmp_path / "run",
        **EMA | {"exits": (1,), "evaluate_every": 5},
    )  # fmt: skip
    assert {"cross_entropy", "ema/cross_entropy", "exit1/cross_entropy", "exit1/kl_bucket"} <= report.evaluation.keys()
