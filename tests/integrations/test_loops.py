"""Loops of one's own, accelerate and Lightning: one process, two, and resumed."""

import re
import runpy
from pathlib import Path
from typing import Any

import loop_cases
import pytest
import torch
import train_jobs
from live_cases import TEXT, text_data, text_teacher
from stream_cases import bits

from fastkd import DistillLoader, Step
from fastkd.live import LiveSource

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of lightning and torch about each other
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loops") / "cache"
    loop_cases.example("plain_loop_ddp").capture(folder)
    return folder


@pytest.fixture(scope="module")
def alone(cache: Path) -> dict[str, torch.Tensor]:
    """The weights of one process."""
    return loop_cases.plain(cache)


@pytest.fixture(scope="module")
def two(cache: Path) -> list[Any]:
    """What two processes found."""
    train_jobs.run(loop_cases.both_processes, cache, cache.parent, ranks=2)
    return [torch.load(cache.parent / f"{rank}.pt") for rank in range(2)]


def assert_same(ours: Any, theirs: Any, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_steps_are_of_several_micro_batches(cache: Path) -> None:
    numbers = [len(step.micro_batches) for step in DistillLoader(cache, batch_size=8, micro_tokens=64)]
    assert len(set(numbers)) > 1
    assert max(numbers) > 2


@pytest.mark.parametrize("loop", ["accelerate", "lightning"])
def test_one_process(cache: Path, alone: Any, loop: str) -> None:
    found = loop_cases.accelerated(cache) if loop == "accelerate" else loop_cases.lightning(cache)
    assert_same(found, alone, 1e-12)


@pytest.mark.parametrize("loop", ["plain", "accelerate", "lightning"])
def test_two_processes_are_as_one(alone: Any, two: list[Any], loop: str) -> None:
    for found in two:
        assert_same(found[loop], alone, 2e-6)
    assert_same(two[0][loop], two[1][loop], 0)


def test_a_loss_outside_of_the_wrapper_is_refused(two: list[Any]) -> None:
    for found in two:
        said = found["wrong"]
        for name in ("states", "a frozen head", "logits", "after it is wrapped"):
            what = "logits" if name == "logits" else "hidden"
            expected = f"{what}: got those of a module within DistributedDataParallel whose own forward has not run"
            assert said[name].startswith(expected), name
        for name in ("right, states", "not wrapped", "no exchange wanted", "before it is wrapped"):
            assert said[name] == "", name
        assert re.match(r"backward: got a Model in one of 2 processes; expected it in", said["not exchanged"])


@pytest.mark.parametrize("name", ["plain_loop_ddp", "accelerate_loop", "lightning_module"])
def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As a person runs them; that of Lightning again, when there is nothing left to do."""
    loop_cases.example(name)
    monkeypatch.setattr("sys.argv", [name, str(tmp_path)])
    for _ in range(2 if name == "lightning_module" else 1):
        runpy.run_path(str(loop_cases.EXAMPLES / f"{name}.py"), run_name="__main__")
    written = torch.load(tmp_path / ("last.ckpt" if name == "lightning_module" else "student.pt"), weights_only=False)
    state = written.get("state_dict", written)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert written.get("global_step", 18) == 18


def test_lightning_resumes_at_every_step_of_the_second_epoch(cache: Path, alone: Any, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    steps = len(DistillLoader(cache, batch_size=8))
    limits = [({"max_epochs": 3}, (0, 1, 3, steps - 1, steps)), ({"max_epochs": -1, "max_steps": 3 * steps}, (2,))]
    for number, (limit, steps_of_second) in enumerate(limits):
        out = tmp_path / str(number)
        every = ModelCheckpoint(out, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
        whole = loop_cases.lightning(cache, **limit, enable_checkpointing=True, callbacks=[every])
        for step in (steps + i for i in steps_of_second):
            resumed = loop_cases.lightning(cache, **limit, resume=out / f"step={step}.ckpt")
            assert_same(resumed, whole, 0)


def test_steps_pass_through_lightning_and_accelerate(cache: Path) -> None:
    from accelerate.utils import send_to_device
    from lightning.fabric.plugins.precision.half import HalfPrecision
    from lightning.fabric.utilities import move_data_to_device

    step = next(iter(DistillLoader(cache, batch_size=8, micro_tokens=64)))
    for found in (
        move_data_to_device(step, torch.device("cpu")), send_to_device(step, "cpu", non_blocking=True),
        HalfPrecision("bf16-true").convert_input(step), step.replace(),
    ):  # fmt: skip
        assert isinstance(found, Step)
        assert bits(found) == bits(step)
        assert {batch.targets.logprobs.dtype for batch in found.micro_batches} == {torch.float32}
    for batch in step.micro_batches:
        for moved in (move_data_to_device(batch, torch.device("cpu")), send_to_device(batch, "cpu")):
            assert all(map(torch.equal, moved.tensors(), batch.tensors()))


class Counted:
    """A teacher that notes its calls."""

    def __init__(self, teacher: Any, calls: list[Any]) -> None:
        self._teacher, self._calls = teacher, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def __call__(self, inputs: Any) -> Any:
        self._calls.append(inputs)
        return self._teacher(inputs)


def test_what_is_answered_late_is_moved_late() -> None:
    """A teacher that answers micro-batches when they are taken is not called by a transfer."""
    calls: list[Any] = []
    source = LiveSource(text_data(), Counted(text_teacher(), calls), TEXT, batch_tokens=90, micro_tokens=45)
    step = next(iter(source.steps()))
    moved = step.to("cpu")
    assert not calls
    assert len(moved.micro_batches) == len(step.micro_batches) > 1
    assert [batch.count for batch in moved.unanswered] == [batch.count for batch in step.unanswered]
    assert not calls
    assert bits(moved) == bits(step)
    assert calls
    assert [b.count for b in moved.micro_batches[1:]] == [b.count for b in list(step.micro_batches)[1:]]
    source.close()


def test_an_epoch_whose_last_step_was_taken_is_over(cache: Path) -> None:
    """Also where the iterator was not asked for more, as by loops that count; and `set_epoch` through the sampler."""
    loader = DistillLoader(cache, batch_size=8)
    n, seen = len(loader), []
    for _ in range(3):
        iterator = iter(loader)
        seen.append([next(iterator).epoch for _ in range(n)])
    assert seen == [[0] * n, [1] * n, [2] * n]
    state = loader.state_dict()
    resumed = DistillLoader(cache, batch_size=8)
    resumed.load_state_dict(state)
    assert list(resumed) == [], "the end of an epoch is a position"
    loader.sampler.set_epoch(1)
    assert [step.epoch for step in loader] == [1] * n
