"""AveragedTeacher: the average that it keeps, its laws, and what it leaves alone."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_cases import VOCAB
from torch import nn
from train_cases import Tiny, dropping, make_cache, tied_llama

from fastkd.cache import Cache
from fastkd.errors import TrainError
from fastkd.live.answer import answer
from fastkd.settings import CaptureSettings
from fastkd.stream.batch import MicroBatch
from fastkd.stream.rows import NUMBERS, RowNumbers
from fastkd.train.api import DEFAULTS, make_source
from fastkd.train.ema import AveragedTeacher
from fastkd.train.student import Student, make_student

TARGETS = CaptureSettings(k=6, draws=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("ema") / "cache")


@pytest.fixture(scope="module")
def batch(cache: Cache) -> MicroBatch:
    source = make_source(cache, DEFAULTS)
    found: MicroBatch = next(iter(source)).micro_batches[0]
    source.close()
    return replace(found, signals={NUMBERS: RowNumbers(torch.arange(found.count))})


def student_of(model: Any = None) -> Student:
    return make_student(Tiny(seed=1) if model is None else model, None, DEFAULTS).student


def moved(student: Student, seed: int) -> dict[str, torch.Tensor]:
    """Change a student's parameters as a step would. Returns them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in student.model.parameters():
            p += torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return {name: p.detach().clone() for name, p in student.model.named_parameters()}


@pytest.mark.parametrize(("warmup", "every"), [(False, 1), (True, 1), (False, 3)])
def test_it_is_the_average_of_the_formula(warmup: bool, every: int) -> None:
    student = student_of(Tiny(seed=1, dtype=torch.float64))
    teacher = AveragedTeacher(student, TARGETS, decay=0.7, every=every, warmup=warmup)
    wanted, updates = {name: p.detach().clone() for name, p in student.model.named_parameters()}, 0
    for step in range(1, 8):
        now = moved(student, step)
        teacher.after_step(student, step)
        if step % every == 0:
            decay = min(0.7, (1 + updates) / (10 + updates)) if warmup else 0.7
            wanted = {name: decay * old + (1 - decay) * now[name] for name, old in wanted.items()}
            updates += 1
    for name, p in teacher.model.named_parameters():
        torch.testing.assert_close(p, wanted[name], rtol=1e-12, atol=1e-12)


def test_decay_1_is_a_frozen_copy_and_decay_0_the_student(batch: MicroBatch) -> None:
    student = student_of(dropping())
    frozen, current = (AveragedTeacher(student, TARGETS, decay=decay) for decay in (1.0, 0.0))
    first = answer(batch, student.run(batch, frozen.model), TARGETS)
    for step in range(1, 4):
        moved(student, step)
        for teacher in (frozen, current):
            teacher.after_step(student, step)
    for p, q in zip(current.parameters(), student.model.parameters(), strict=True):
        assert torch.equal(p, q)
    again = frozen.answer(batch, None, student)
    for a, b in zip(first.targets.tensors(), again.targets.tensors(), strict=True):
        assert torch.equal(a, b)
    # the answers of the student itself, without dropout
    student.eval()
    own = answer(batch, student.run(batch), TARGETS)
    student.live = current
    student.train()
    assert not current.model.dropout.training
    assert torch.equal(own.targets.logprobs, student.answered(batch).targets.logprobs)
    assert not torch.equal(own.targets.logprobs, again.targets.logprobs)
    # so there is nothing to learn from it
    student.eval()
    losses = student(batch, num_items=batch.count)
    assert float(losses["soft"].detach()) == pytest.approx(0.0, abs=1e-5)
    assert float(current.decay_at(0)) == 0.0
    assert float(frozen.decay_at(0)) == 1.0


def test_nothing_of_it_is_trained(batch: MicroBatch) -> None:
    student = student_of()
    student.live = teacher = AveragedTeacher(student, TARGETS)
    student(batch, num_items=batch.count)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.model.parameters())
    assert len(list(teacher.parameters())) == len(list(student.model.parameters()))


def test_shared_weights_stay_shared() -> None:
    student = student_of(tied_llama())
    teacher: Any = AveragedTeacher(student, TARGETS, decay=0.5)
    moved(student, 1)
    teacher.after_step(student, 1)
    assert teacher.model.lm_head.weight is teacher.model.model.embed_tokens.weight
    assert teacher.model.lm_head.weight is not student.model.lm_head.weight


def test_averages_of_half_precision_weights_are_in_float32() -> None:
    """Steps of 2^-14 of a weight of 1 are below bfloat16's rounding, and their average is not."""
    student = student_of(Tiny(seed=1, dtype=torch.bfloat16))
    teacher = AveragedTeacher(student, TARGETS, decay=0.999, warmup=False)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    with torch.no_grad():
        for p in teacher.parameters():
            p.fill_(1.0)
        for p in student.model.parameters():
            p.fill_(1.0625)
    teacher.after_step(student, 1)
    for p in teacher.parameters():
        torch.testing.assert_close(p, torch.full_like(p, 1 + 0.0625 * 0.001), rtol=1e-6, atol=0)


class Counted(Tiny):
    """With a buffer that training changes, a counter, and one with an infinity."""

    def __init__(self) -> None:
        super().__init__(seed=1)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


def test_buffers() -> None:
    student = student_of(Counted())
    teacher: Any = AveragedTeacher(student, TARGETS, decay=0.25, warmup=False)
    model: Any = student.model
    model.mean += 4.0
    model.count += 3
    model.scratch += 1
    teacher.after_step(student, 1)
    assert teacher.model.mean.tolist() == [3.0, 3.0]
    assert teacher.model.count == 3
    assert teacher.model.mask.tolist() == [0.0, -math.inf]
    assert teacher.model.scratch == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": 1.5}, "decay: got 1.5; expected a number from 0 to 1"),
        ({"decay": -0.1}, "decay: got -0.1"),
        ({"decay": math.nan}, "decay: got nan"),
        ({"decay": True}, "decay: got True"),
        ({"every": 0}, "every: got 0; expected an integer from 1 on"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        AveragedTeacher(student_of(), TARGETS, **changes)


def test_a_copy_records_no_inner_states(batch: MicroBatch) -> None:
    """Those that an objective reads are the student's."""

    class Reads:
        signals, outputs = (), ("state:1",)

        def schedule(self, step: int, steps: int) -> dict[str, float]:
            return {}

        def losses(self, batch: Any, outputs: Any, **more: Any) -> dict[str, torch.Tensor]:
            assert outputs["state:1"].requires_grad
            return {"loss": outputs["state:1"].square().mean()}

        def describe(self) -> dict[str, Any]:
            return {}

    student = student_of()
    student.read(Reads())
    student.live = AveragedTeacher(student, TARGETS)
    assert not any(len(m._forward_pre_hooks) for m in student.live.modules())
    student(batch)["loss"].backward()
    assert student.model.layers[0].weight.grad is not None  # type: ignore[union-attr, index]
    assert student.live.logits(batch).shape == (batch.count, VOCAB)
    assert isinstance(student.live, nn.Module)
