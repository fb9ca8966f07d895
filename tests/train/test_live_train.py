"""Training beside a live teacher, and on labels alone: as from a cache, resumed exactly, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_jobs
from hf_cases import VOCAB, saved, tokenizer_of
from train_cases import CAPTURE, SMALL, Tiny, bits, documents, make_cache

import fastkd
from fastkd.cli.main import main
from fastkd.errors import StreamError, TeacherError, TrainError
from fastkd.settings import LiveSettings
from fastkd.teachers.module import ModuleTeacher
from fastkd.train.checkpoint import newest
from fastkd.train.metrics import read_metrics
from fastkd.utils.signals import Stop

LIVE = LiveSettings(**CAPTURE)


class Counted(Tiny):
    """A teacher that counts its forwards."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**{"seed": 7, **changes})
        self.calls = 0

    def forward(self, tokens: torch.Tensor) -> Any:
        self.calls += 1
        return super().forward(tokens)


def train(out: Path, teacher: Any = None, student: Any = None, live: LiveSettings = LIVE, **changes: Any) -> Any:
    given: dict[str, Any] = {"data": documents(), **SMALL, **changes}
    return fastkd.train(
        Tiny(seed=1) if student is None else student, None, out, live=live,
        teacher=Tiny(seed=7) if teacher is None else teacher, **given,
    )  # fmt: skip


def test_losses_are_those_from_a_cache(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    changes: dict[str, Any] = SMALL | {"alpha": 0.3, "temperature": 2.0, "evaluate_every": 5}
    cached = fastkd.train(Tiny(seed=1), cache, tmp_path / "cached", **changes)
    live = train(tmp_path / "live", **changes)
    steps = {place: read_metrics(tmp_path / place) for place in ("cached", "live")}
    for ours, theirs in zip(steps["live"], steps["cached"], strict=True):
        if "hard" in ours:
            assert ours["hard"] == pytest.approx(theirs["hard"], rel=1e-3)
            assert ours["soft"] == pytest.approx(theirs["soft"], rel=1e-2)
    assert steps["live"][0]["hard"] == steps["cached"][0]["hard"], "the first batch is the same"
    assert live.evaluation == pytest.approx(cached.evaluation, rel=1e-2)
    about = json.loads((tmp_path / "live" / "run.json").read_text())
    assert about["caches"] == []
    assert about["live"]["identity"]["k"] == 6
    assert about["live"]["plan"]["documents"] == 60


def test_it_resumes_at_every_step_to_the_same_bytes(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 5, "alpha": 0.3, "checkpoint_every": 1, "keep": 9}
    train(tmp_path / "whole", **changes)
    whole = {step: bits(tmp_path / "whole", step) for step in range(1, 6)}
    for _ in range(5):
        report = train(tmp_path / "parts", stop=stopped(), **changes)
    assert report.complete
    assert {step: bits(tmp_path / "parts", step) for step in range(1, 6)} == whole


def stopped() -> Stop:
    """Stops after one step."""
    stop = Stop()
    stop()
    return stop


def test_labels_alone_are_the_control_of_a_cached_run(tmp_path: Path) -> None:
    cache, teacher = make_cache(tmp_path / "cache"), Counted()
    fastkd.train(Tiny(seed=1), cache, tmp_path / "cached", **SMALL, control=True)
    train(tmp_path / "live", teacher, control=True)
    calls = teacher.calls
    fastkd.train(Tiny(seed=1), None, tmp_path / "alone", data=documents(), live=LIVE, **SMALL, alpha=1.0)
    assert bits(tmp_path / "live" / "control", 10) == bits(tmp_path / "alone", 10)
    # with targets, the gradient at their entries is rounded in another way
    ours, theirs = (newest(tmp_path / run) for run in ("alone", "cached/control"))
    assert ours is not None
    assert theirs is not None
    for name, tensor in ours.tensors("model").items():
        torch.testing.assert_close(tensor, theirs.tensors("model")[name], rtol=1e-4, atol=1e-5)
    train(tmp_path / "other", teacher)
    assert teacher.calls - calls == calls, "the control did not run the teacher"


def test_labels_alone_are_evaluated_without_a_teacher(tmp_path: Path) -> None:
    report = fastkd.train(
        Tiny(seed=1), None, tmp_path / "run", data=documents(), live=LIVE, **(SMALL | {"evaluate_every": 5}), alpha=1.0
    )
    assert set(report.evaluation) == {"cross_entropy", "accuracy", "ece", "perplexity"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "teacher: got none, and alpha=0.5; expected a teacher or a cache, or alpha=1"),
        ({"data": None}, "cache, data: got a teacher without data; expected"),
        ({"cache": "somewhere"}, "cache, teacher: got both; expected one of them"),
        ({"cache": "somewhere", "teacher": None, "write_cache": "there"}, "cache, write_cache: got both"),
        ({"teacher": None, "alpha": 1.0, "write_cache": "there"}, "write_cache: got the teacher none; expected one"),
        ({"temperature": 0.5}, "temperature"),
        ({"evaluate_every": 5, "live": replace(LIVE, held_out=0.0)}, "evaluate_every: got 5, and no documents are"),
        (
            {"student": Tiny(vocab=VOCAB + 1)},
            f"teacher: got a vocabulary of {VOCAB}; expected that of Tiny, {VOCAB + 1}",
        ),
        ({"student": Tiny(vocab=VOCAB - 1)}, f"got a vocabulary of {VOCAB - 1}; expected at least {VOCAB}"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "student": Tiny(seed=1), "cache": None, "teacher": Tiny(seed=7), "data": documents(), "live": LIVE, **SMALL,
        **changes,
    }  # fmt: skip
    with pytest.raises(TrainError, match=message):
        fastkd.train(given.pop("student"), given.pop("cache"), tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"live": replace(LIVE, k=5)}, "k: 6 there, 5 here"),
        ({"live": replace(LIVE, data_seed=1)}, "data_seed: 0 there, 1 here"),
        ({"teacher": Tiny(seed=8)}, "teacher: 'Tiny, state sha256"),
        ({"data": documents(seed=1)}, "data: '"),
        # those of settings and of data at once
        ({"steps": 12, "live": replace(LIVE, k=5)}, r"\(steps: 10 there, 12 here; k: 6 there, 5 here\)"),
    ],
)
def test_a_changed_setting_is_refused_on_resuming(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    train(tmp_path / "run", stop=stopped())
    with pytest.raises((StreamError, TrainError), match=named):
        train(tmp_path / "run", **changes)


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    one, other = (saved(tmp_path / name, "llama") for name in ("one", "other"))
    tokenizer_of().save_pretrained(one)
    tokenizer_of(words="others, of which it learns other pairs").save_pretrained(other)
    with pytest.raises(TrainError, match=r"tokenizer .* is not the teacher's, .* --allow-other-tokenizer"):
        train(tmp_path / "run", str(one), str(other))
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", str(one), str(other), allow_other_tokenizer=True, steps=1).complete


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_two_processes(tmp_path: Path, parallel: str) -> None:
    changes = SMALL | {"alpha": 0.3, "steps": 4, "parallel": parallel, "evaluate_every": 4}
    train_jobs.run(train_jobs.train_live, "train_cases:double", None, tmp_path / "two", changes, ranks=2)
    by = ModuleTeacher(Tiny(seed=7), vocab_size=VOCAB, fingerprint="the same")
    train(tmp_path / "one", by, "train_cases:double", **changes)
    ours, theirs = (newest(tmp_path / name) for name in ("two", "one"))
    assert ours is not None
    assert theirs is not None
    for name, tensor in ours.tensors("model").items():
        assert (tensor - theirs.tensors("model")[name]).abs().max() < 1e-6, name


def test_a_teacher_that_does_not_fit_says_what_to_do(tmp_path: Path) -> None:
    class Large(Tiny):
        def forward(self, tokens: torch.Tensor) -> Any:
            if len(tokens) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(tokens)

    with pytest.raises(TeacherError, match=r"does not fit into the device's memory beside the student\. Capture a"):
        train(tmp_path / "run", Large(seed=7))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in documents()))
    args = ["train", "--student", "train_cases:tiny", "--teacher", "train_cases:tiny"]
    args += ["--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run"), "--steps", "4"]
    args += ["--batch-tokens", "60", "--micro-tokens", "32", "--context", "16", "--held-out", "0.2", "--k", "6"]
    assert main(args) == 0
    assert "held out" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["live"]["teacher"] == "train_cases:tiny"
    assert main([*args, "--draws", "3"]) == 1
    assert "draws: 16 there, 3 here" in capsys.readouterr().err
    assert main([*args[:5], "--cache", str(tmp_path), "--out", str(tmp_path / "other")]) != 0
    assert "--cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        (["--teacher", "train_cases:tiny", "--write-cache", "CACHE"], "the cache is complete and sealed"),
        (["--teacher", "ema:0.9"], ""),
        (["--teacher", "train_cases:tiny", "--rollouts", "0.5", "--rollout-tokens", "3", "--rollout-eos", "5"], ""),
        (["--teacher", "train_cases:double", "--train-teacher", "--control"], "now tiny on hard labels alone"),
    ],
    ids=["write-cache", "ema", "rollouts", "train-teacher"],
)
def test_the_commands_events(mode: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json every line is an event, and the last one is the report, of which a program reads the status."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"tokens": ids}) + "\n" for ids in documents()))
    args = ["train", "--student", "train_cases:tiny", "--data", str(tmp_path / "data.jsonl"), "--json"]
    args += ["--out", str(tmp_path / "run"), "--steps", "2", "--batch-tokens", "60", "--context", "16", "--k", "6"]
    assert main([*args, *(str(tmp_path / "cache") if word == "CACHE" else word for word in mode)]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(isinstance(event["event"], str) for event in events)
    assert [event["event"] for event in events].count("done") == 1
    last = events[-1]
    assert (last["event"], last["complete"], last["step"]) == ("done", True, 2)
    assert any(says in event.get("text", "") for event in events)
