"""What a training shows a person while it runs: whose it is, micro-batches, evaluations; events stay as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
from train_cases import SMALL, Tiny, make_cache

import fastkd
from fastkd.cache import Cache

CHANGES: dict[str, Any] = SMALL | {"steps": 2, "evaluate_every": 2, "threads": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("progress") / "cache")


def test_each_line_says_whose_it_is(
    cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkd.utils.progress.LINE_SECONDS", 0.0)
    fastkd.train(Tiny(seed=3), cache, tmp_path / "run", control=True, progress="lines", **CHANGES)
    lines = capsys.readouterr().err.splitlines()
    (now,) = [number for number, line in enumerate(lines) if line.startswith("now the same student on hard labels")]
    for name, some in (("student", lines[:now]), ("control", lines[now + 1 :])):
        assert some
        assert all(line.startswith(f"{name}: ") for line in some)
        assert any(line.startswith(f"{name}: 0 of 2 steps (0.0%), micro-batch 1/") for line in some)
        assert any("evaluate held_out" in line and "windows" in line for line in some)
        assert any(line.startswith(f"{name}: step 2 of 2: cross_entropy") for line in some)
    fastkd.train(Tiny(seed=3), cache, tmp_path / "alone", progress="lines", **CHANGES)
    assert not any(line.startswith(("student: ", "control: ")) for line in capsys.readouterr().err.splitlines())


def test_arms_of_a_sweep_are_named_and_events_are_not(
    cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = CHANGES | {"seeds": 1}
    fastkd.sweep("train_cases:dropping", cache, tmp_path / "a", {"alpha": [0.5]}, progress="lines", **more)
    assert "alpha=0.5, seed 0: step 2 of 2: cross_entropy" in capsys.readouterr().err
    fastkd.sweep("train_cases:dropping", cache, tmp_path / "b", {"alpha": [0.5]}, progress="events", **more)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {event["event"] for event in events} <= {"note", "training", "evaluation", "progress"}
    assert any(event.get("text", "").startswith("step 2 of 2: ") for event in events)
