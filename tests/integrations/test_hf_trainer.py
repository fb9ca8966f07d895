"""DistillTrainer: the losses and weights of a loop of one's own, and a resume that changes nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_jobs
from hf_trainer_cases import FSDP, arguments, by_hand, losses, student, train, trainer, weights
from train_cases import make_cache

from fastkd.cache import Cache
from fastkd.integrations.hf import DistillTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("trainer") / "cache")


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def hand(cache: Cache) -> Any:
    return by_hand(cache, student())


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_losses_and_weights_are_those_of_a_loop(cache: Cache, hand: Any, tmp_path: Path, accumulation: int) -> None:
    made = trainer(cache, tmp_path, accumulation=accumulation)
    made.train()
    assert losses(made) == pytest.approx(hand[0], abs=1e-6)  # in float32
    assert_same(weights(made.model), hand[1], 1e-9)
    for line in made.state.log_history[: len(hand[0])]:
        assert line["loss"] == pytest.approx(0.3 * line["hard"] + 0.7 * line["soft"], rel=1e-5)


def test_float32_and_gradient_checkpointing(cache: Cache, tmp_path: Path) -> None:
    theirs, state = by_hand(cache, student(torch.float32))
    made = trainer(cache, tmp_path, student(torch.float32), gradient_checkpointing=True)
    made.train()
    assert losses(made) == pytest.approx(theirs, abs=1e-6)
    assert_same(weights(made.model), state, 1e-6)


def test_bfloat16(cache: Cache, tmp_path: Path) -> None:
    theirs, state = by_hand(cache, student(torch.float32), autocast=True)
    made = trainer(cache, tmp_path, student(torch.float32), bf16=True)
    made.train()
    assert losses(made) == pytest.approx(theirs, abs=1e-6)
    assert_same(weights(made.model), state, 1e-6)


def test_a_schedule_of_alpha(cache: Cache, tmp_path: Path) -> None:
    made = trainer(cache, tmp_path, loss={"alpha": 1.0, "alpha_end": 0.0}, num_train_epochs=1)
    made.train()
    lines = [line for line in made.state.log_history if "loss" in line]
    assert [line["alpha"] for line in lines] == pytest.approx([1 - i / (len(lines) - 1) for i in range(len(lines))])
    for line in lines:
        assert line["loss"] == pytest.approx(
            line["alpha"] * line["hard"] + (1 - line["alpha"]) * line["soft"], rel=1e-5
        )


def check_two(cache: Cache, hand: Any, out: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Weights, logged losses and measures of two processes are those of the loop."""
    train_jobs.run(train, cache.store.describe(), out, runs, ranks=2)
    one = trainer(cache, out)
    one.model.load_state_dict(hand[1])
    other = ("runtime", "per_second", "epoch")
    expected = {name: value for name, value in one.evaluate().items() if not name.endswith(other)}
    for name in runs:
        found, measures, state = torch.load(out / f"{name}.pt")
        assert found == pytest.approx(hand[0], abs=1e-6), name
        assert_same({n: t.to(hand[1][n].dtype) for n, t in state.items()}, hand[1], 2e-6)
        assert {n: measures[n] for n in expected} == pytest.approx(expected, abs=1e-6), name


def test_two_processes(cache: Cache, hand: Any, tmp_path: Path) -> None:
    """DDP and FSDP2, by accelerate."""
    check_two(cache, hand, tmp_path, {"ddp": {"accumulation": 2}, "fsdp": {**FSDP, "accumulation": 2}})


@pytest.mark.soak
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_processes_however_steps_are_divided(cache: Cache, hand: Any, tmp_path: Path, accumulation: int) -> None:
    check_two(cache, hand, tmp_path, {k: {**c, "accumulation": accumulation} for k, c in (("ddp", {}), ("fsdp", FSDP))})


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("step", [8, 11])
def test_two_processes_resume(cache: Cache, tmp_path: Path, kind: str, step: int) -> None:
    """With dropout, in the second epoch."""
    given = {**(FSDP if kind == "fsdp" else {}), "dropout": 0.2, "save_strategy": "steps", "save_steps": 1}
    place = cache.store.describe()
    train_jobs.run(train, place, tmp_path, {"whole": given}, ranks=2)
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    train_jobs.run(train, place, tmp_path, {"again": {**given, "resume": True}}, ranks=2)
    (_, _, whole), (_, _, again) = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "again"))
    assert_same(again, whole, 1e-6)


@pytest.fixture(scope="module")
def saved(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with a checkpoint after every step, with dropout."""
    out = tmp_path_factory.mktemp("saved")
    made = trainer(cache, out, student(attention_dropout=0.2), save_strategy="steps", save_steps=1, accumulation=2)
    made.train()
    return out, weights(made.model)


@pytest.mark.parametrize(
    "step", [pytest.param(n, marks=[] if n in (7, 10) else pytest.mark.soak) for n in range(7, 14)]
)
def test_a_resume_at_any_step_of_the_second_epoch(
    cache: Cache, saved: tuple[Path, dict[str, Any]], tmp_path: Path, step: int
) -> None:
    out, state = saved
    shutil.copytree(out / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    made = trainer(cache, tmp_path, student(attention_dropout=0.2), accumulation=2)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 14
    assert len(losses(made)) == 14
    for name, tensor in weights(made.model).items():
        assert torch.equal(tensor, state[name]), name


def test_a_name_is_a_model(cache: Cache, tmp_path: Path) -> None:
    """A folder with weights, whose run has no checkpoint to resume from yet."""
    student(torch.float32).save_pretrained(tmp_path / "s")
    made = DistillTrainer(tmp_path / "s", arguments(tmp_path / "run", max_steps=1), cache=cache.store.describe())
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 1


def test_model_init(cache: Cache, tmp_path: Path) -> None:
    made = DistillTrainer(None, arguments(tmp_path / "run", max_steps=2), cache=cache, model_init=lambda: student())
    made.train()
    first = weights(made.model)
    made.train()
    assert_same(weights(made.model), first, 0)
