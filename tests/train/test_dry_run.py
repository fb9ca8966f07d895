"""`train --dry-run` and `capture --dry-run`: what they say is what happens, and nothing is written."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_cases import CAPTURE, SMALL, documents, make_cache

import fastkd
from fastkd.cache import Cache
from fastkd.cli import main as cli
from fastkd.cli.commands import Train
from fastkd.cli.main import main
from fastkd.errors import TrainError
from fastkd.evaluate.result import Evaluation
from fastkd.settings import LiveSettings, RolloutSettings, TrainSettings
from fastkd.train.api import TrainCall
from fastkd.train.dry_run import dry_run, dry_run_text
from fastkd.train.metrics import read_metrics
from fastkd.train.rehearsal import kept_for_backward

STUDENT = "train_cases:tiny"
SETTINGS = TrainSettings(**SMALL | {"steps": None, "epochs": 2.0, "evaluate_every": None})


def data() -> list[list[int]]:
    """A factory for --data."""
    return documents(40)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("dry") / "cache")


def test_it_says_what_then_happens(cache: Cache, tmp_path: Path) -> None:
    found = dry_run(TrainCall(STUDENT, cache, tmp_path / "run", SETTINGS, control=True))
    assert list(tmp_path.iterdir()) == []
    report = fastkd.train(STUDENT, cache, tmp_path / "run", SETTINGS, control=True)
    evaluated = [entry for entry in read_metrics(tmp_path / "run") if "evaluation" in entry]
    assert (found.steps, found.evaluations) == (report.steps, len(evaluated))
    document = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found.held_out["sequences"] == Evaluation.from_json(document).windows
    assert sorted(found.arms) == ["", "control"]
    names = {name.partition("/")[0] for name in found.files}
    assert names | {"README.md"} >= {path.name for path in (tmp_path / "run").iterdir()}
    parameters = sum(p.numel() for p in fastkd_tiny().parameters())
    assert found.student["parameters"] == found.student["trained"] == parameters
    assert found.cost is not None
    memory = found.cost.memory
    assert memory["gradients"] == 4 * parameters <= memory["weights"]
    counters = 4 * len(list(fastkd_tiny().parameters()))  # AdamW's steps
    assert memory["optimizer"] == 8 * parameters + counters
    assert memory["activations"] > 0
    assert found.hours is not None
    assert found.evaluation_hours is not None
    assert 0 < found.evaluation_hours < found.hours
    small = dry_run_text(replace(found, steps=1, steps_per_epoch=1, positions=40, batch=40.0))
    assert "1 step of 40 positions; an epoch has 1 of them, 40 positions" in " ".join(small.split())
    again = dry_run(TrainCall(STUDENT, cache, tmp_path / "run", SETTINGS))
    assert again.resumed == report.steps
    assert "all steps are made" in dry_run_text(again)
    assert "warning: " in dry_run_text(again)
    assert "steps are few to learn from" in again.notes[-1]
    other, changed = make_cache(tmp_path / "other", documents(30)), replace(SETTINGS, alpha=0.3)
    with pytest.raises(TrainError, match=r"\(alpha: 0.5 there, 0.3 here; caches: \[.*…") as said:
        dry_run(TrainCall(STUDENT, other, tmp_path / "run", changed))
    assert len(str(said.value)) < 700


def fastkd_tiny() -> nn.Module:
    import train_cases

    return train_cases.tiny()


def test_bytes_that_a_backward_needs() -> None:
    layer, found = nn.Linear(8, 4), list[int]()
    x = torch.randn(5, 8)
    with kept_for_backward(layer, found):
        hidden = layer(x)
        (hidden * hidden).sum().backward()
    assert sorted(found) == [5 * 4 * 4, 5 * 8 * 4]  # of its output once, of its input, and not the weight


def test_beside_a_teacher_no_cache_is_written(tmp_path: Path) -> None:
    live = LiveSettings(**CAPTURE)
    call = TrainCall(STUDENT, None, tmp_path / "run", SETTINGS, "train_cases:tiny", documents(40), live)
    found = dry_run(replace(call, write_cache=tmp_path / "cache"))
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path / "cache") in found.files
    assert found.held_out["positions"] > 0
    rolled = dry_run(replace(call, rollouts=RolloutSettings(rollouts=0.5, rollout_tokens=4)))
    assert (rolled.cost, rolled.hours, rolled.steps) == (None, None, found.steps)
    assert "unknown: what the student continues itself" in dry_run_text(rolled)
    assert list(tmp_path.iterdir()) == []


def test_one_process(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match="dry_run: got 2 processes; expected one"):
        dry_run(TrainCall(STUDENT, cache, tmp_path / "run", SETTINGS))


def test_the_commands(cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = cache.store.describe()
    train = ["train", "--student", STUDENT, "--cache", place, "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*train, "--batch-tokens", "60"]) == 0
    text = capsys.readouterr().out
    assert "nothing is written" in text
    assert max(map(len, text.splitlines())) <= max(80, len(str(tmp_path)) + 24)
    assert main([*train, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["student"]["name"] == "Tiny"
    assert main([*train, "--teacher", STUDENT, "--train-teacher"]) == 1
    assert "--dry-run: got it with --train-teacher" in capsys.readouterr().err
    options = ["--teacher", STUDENT, "--data", "test_dry_run:data", "--context", "16", "--k", "6", "--json"]
    found: dict[str, Any] = {}
    for name, command in (("plan", ["plan"]), ("capture", ["capture", "--out", str(tmp_path / "new"), "--dry-run"])):
        assert main([*command, *options]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    assert found["plan"].keys() == found["capture"].keys()
    assert all(found["plan"][name] == found["capture"][name] for name in ("plan", "settings", "teacher", "data"))
    assert main(["capture", "--out", place, "--dry-run", *options]) == 1
    assert "existing cache was written with other settings" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_dry_run_that_is_stopped_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli._DRY_RUNS, Train, lambda command: signal.raise_signal(number))
    assert main(["train", "--student", STUDENT, "--cache", "c", "--out", str(tmp_path / "run"), "--dry-run"]) == 75
    said = capsys.readouterr()
    assert said.err == "fastkd: the dry run of train was stopped. Nothing was written: run it again.\n"
    assert said.out == ""


@pytest.mark.parametrize("command", [["plan"], ["capture", "--out", "c"], ["capture", "--out", "c", "--dry-run"]])
def test_what_is_missing_is_refused_before_anything_is_said_to_load(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--teacher", STUDENT, "--data", "none.jsonl"]) == 1
    assert "loading" not in (said := capsys.readouterr().err)
    assert "none.jsonl" in said


def test_a_dry_run_refuses_before_it_says_that_it_loads(
    cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--out", str(tmp_path / "run"), "--dry-run"]
    assert main(["train", "--student", "none", "--cache", cache.store.describe(), *run]) == 1
    assert main(["train", "--student", STUDENT, "--teacher", STUDENT, "--data", "none.jsonl", *run]) == 1
    assert "loading" not in capsys.readouterr().err
