"""What answers inside a student's forward: when it is called, and where its tensors go."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from train_cases import SMALL, Tiny, make_cache

import fastkd
from fastkd.cache import Cache
from fastkd.errors import TrainError
from fastkd.evaluate import evaluate
from fastkd.train import api
from fastkd.train.checkpoint import newest
from fastkd.train.student import make_student


class Flat(nn.Module):
    """A teacher that gives every entry of a target the same probability, and keeps what it is asked."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.factor = factor
        self.asked: list[Any] = []
        self.steps: list[int] = []

    def answer(self, batch: Any, output: Any, student: Any) -> Any:
        self.asked.append(None if output is None else tuple(output.states.shape[:2]) == tuple(batch.input_ids.shape))
        used = batch.targets.logprobs > -torch.inf
        flat = torch.where(used, -4.0 * self.factor, -torch.inf)
        return replace(batch, targets=replace(batch.targets, logprobs=flat))

    def after_step(self, student: Any, step: int) -> None:
        self.steps.append(step)
        self.kept += 1

    def describe(self) -> dict[str, Any]:
        return {"factor": self.factor}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("in_forward") / "cache")


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> list[Flat]:
    """Trainings have one from now on; those that were made."""
    made: list[Flat] = []

    def with_live(*arguments: Any) -> Any:
        found = make_student(*arguments)
        found.student.live = Flat(2.0 if len(made) == 2 else 1.0)
        made.append(found.student.live)
        return found

    monkeypatch.setattr(api, "make_student", with_live)
    return made


def test_it_answers_before_the_objective_and_hears_of_steps(cache: Cache, live: list[Flat], tmp_path: Path) -> None:
    changes = SMALL | {"steps": 4, "evaluate_every": 4, "alpha": 0.0}
    fastkd.train(Tiny(seed=1), cache, tmp_path / "run", **changes)
    (flat,) = live
    assert flat.steps == [1, 2, 3, 4]
    evaluated = flat.asked.index(None)
    assert all(flat.asked[:evaluated])
    assert evaluated >= 4
    assert set(flat.asked[evaluated:]) == {None}
    found = newest(tmp_path / "run")
    assert found is not None
    assert found.tensors("model")["live.kept"].tolist() == [4.0] * 3
    assert not any("kept" in name for name in load_file(tmp_path / "run" / "student" / "model.safetensors"))

    batch = next(iter(api.make_source(cache, api.DEFAULTS))).micro_batches[0]
    student = make_student(Tiny(seed=1), cache.spec, api.DEFAULTS).student
    plain = student(batch, num_items=batch.count)
    wanted = student(Flat().answer(batch, None, student), num_items=batch.count)
    student.live = Flat()
    found_loss = student(batch, num_items=batch.count)
    assert torch.equal(found_loss["loss"], wanted["loss"])
    assert not torch.equal(found_loss["loss"], plain["loss"])


def test_it_is_of_the_run(cache: Cache, live: list[Flat], tmp_path: Path) -> None:
    """A run is resumed with the same one, its tensors included."""
    changes = SMALL | {"checkpoint_every": 2, "evaluate_every": 0}
    stop = fastkd.train(Tiny(seed=1), cache, tmp_path / "run", **changes | {"steps": 4})
    assert stop.complete
    fastkd.train(Tiny(seed=1), cache, tmp_path / "run", **changes | {"steps": 4})
    assert live[1].kept.tolist() == [4.0] * 3
    with pytest.raises(TrainError, match=r"live: .*'factor': 1.0.* there.*'factor': 2.0"):
        fastkd.train(Tiny(seed=1), cache, tmp_path / "run", **changes | {"steps": 4})


def test_an_evaluation_measures_against_its_answers(cache: Cache) -> None:
    student = make_student(Tiny(seed=1), cache.spec, api.DEFAULTS).student
    plain = evaluate(student, cache).summary()
    student.live = Flat()
    live = evaluate(student, cache).summary()
    assert live["cross_entropy"] == plain["cross_entropy"]
    assert live["kl_bucket"] != plain["kl_bucket"]
