"""What remains of a run: once it is finished, the weights of its last and best checkpoint; of a stop during an
evaluation, a checkpoint that knows of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from train_cases import SMALL, Tiny, make_cache

import fastkd
from fastkd.cache import Cache
from fastkd.errors import TrainError
from fastkd.train import api
from fastkd.train.checkpoint import Checkpoint, read, steps_of
from fastkd.train.metrics import read_metrics
from fastkd.train.student import Student
from fastkd.utils.atomic import read_sealed, write_json
from fastkd.utils.signals import Stop

# hard labels alone do harm: the best step is not the last
CHANGES: dict[str, Any] = SMALL | {
    "keep": None, "steps": 6, "alpha": 1.0, "evaluate_every": 2, "best": "kl_bucket", "rate": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("once") / "cache")


def checkpoints(run: Path) -> dict[int, Checkpoint]:
    found = {step: read(run, step) for step in steps_of(run)}
    assert all(isinstance(one, Checkpoint) for one in found.values())
    return found  # type: ignore[return-value]  # checked above


def test_weights_of_the_last_and_the_best_remain(cache: Cache, tmp_path: Path) -> None:
    kept = fastkd.train(Tiny(seed=7), cache, tmp_path / "kept", **CHANGES | {"keep": 9, "checkpoint_every": 1})
    report = fastkd.train(Tiny(seed=7), cache, tmp_path / "run", **CHANGES | {"checkpoint_every": 1})
    assert report.best == kept.best
    assert report.best["step"] < 6
    found, whole = checkpoints(tmp_path / "run"), checkpoints(tmp_path / "kept")
    assert list(found) == [report.best["step"], 6]
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    for step, one in found.items():
        assert one.shapes("optimizer") == {}
        assert whole[step].shapes("optimizer")
        assert_close(one.tensors("model"), whole[step].tensors("model"), rtol=0, atol=0)
    # what it is for: the other result, and the same call again
    again = fastkd.train(Tiny(seed=7), cache, tmp_path / "run", **CHANGES | {"export": "best"})
    assert (again.resumed, again.positions) == (6, 0)
    exported = load_file(tmp_path / "run" / "student" / "model.safetensors")
    best = whole[report.best["step"]].tensors("model")
    assert_close({f"model.{name}": tensor for name, tensor in exported.items()}, best, rtol=0, atol=0)


def test_from_weights_alone_no_step_is_made(cache: Cache, tmp_path: Path) -> None:
    """The last checkpoint is damaged, and the best one has no optimizer's state any more."""
    report = fastkd.train(Tiny(seed=7), cache, tmp_path, **CHANGES)
    state = tmp_path / "checkpoints" / "step-00000006" / "state.json"
    state.write_text(state.read_text().replace("6", "7"))
    with pytest.raises(TrainError, match=f"step-0000000{report.best['step']}: got the weights alone; expected"):
        fastkd.train(Tiny(seed=7), cache, tmp_path, **CHANGES)


def test_more_steps_are_refused_with_the_way(cache: Cache, tmp_path: Path) -> None:
    fastkd.train(Tiny(seed=7), cache, tmp_path, **CHANGES)
    for longer in ({"steps": 12}, {"steps": None, "epochs": 3.0}):
        with pytest.raises(TrainError, match=r"steps: 6 there, .* A run cannot be made longer"):
            fastkd.train(Tiny(seed=7), cache, tmp_path, **CHANGES | longer)


def test_a_run_of_an_older_version_answers_at_once(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept two whole checkpoints, and its run.json has not all settings of today."""
    changes = CHANGES | {"evaluate_every": 6}
    before = fastkd.train("train_cases:tiny", cache, tmp_path, **changes | {"keep": 2})
    document = read_sealed(tmp_path / "run.json")
    del document["settings"]["lora_merge"]
    write_json(tmp_path / "run.json", document)
    monkeypatch.setattr(api, "make_student", None)
    answered = fastkd.train("train_cases:tiny", cache, tmp_path, **changes)
    assert answered.evaluation == before.evaluation
    assert checkpoints(tmp_path)[6].shapes("optimizer")


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_stop_during_an_evaluation_is_not_waited_for(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The evaluation, also the last one, and after it that of the best student, which is exported, is made when the
    training resumes, which comes to the same."""
    changes = CHANGES | ({"export": "best"} if at == 4 else {})
    whole = fastkd.train(Tiny(seed=7), cache, tmp_path / "whole", **changes)
    stop, calls, logits = Stop(), [0, 0], Student.logits

    def stopping(self: Student, *given: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == calls[1]:
            stop()
        return logits(self, *given, **more)

    monkeypatch.setattr(Student, "logits", stopping)
    fastkd.train(Tiny(seed=7), cache, tmp_path / "counted", **changes)
    each = calls[0] // (4 if at == 4 else 3)
    assert each > 1
    calls[:] = [0, each * (at - 1) + 2]
    first = fastkd.train(Tiny(seed=7), cache, tmp_path / "run", stop=stop, **changes)
    assert (first.status, first.step, first.student) == (75, min(2 * at, 6), None)
    assert calls[0] == calls[1]  # no other micro-batch was evaluated
    assert ("The evaluation after the last one was stopped" in api_text(first)) == (at > 2)
    second = fastkd.train(Tiny(seed=7), cache, tmp_path / "run", **changes)
    assert second.resumed == min(2 * at, 6)
    assert (second.status, second.best, second.evaluation) == (0, whole.best, whole.evaluation)
    times = ("seconds", "positions_per_second", "waiting")
    lines = [
        [{n: v for n, v in entry.items() if n not in times} for entry in read_metrics(tmp_path / name)]
        for name in ("whole", "run")
    ]
    assert lines[0] == lines[1]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())


def api_text(report: fastkd.TrainReport) -> str:
    from fastkd.train.result import report_of

    return report_of(report)
