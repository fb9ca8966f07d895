"""`Rehearsal`: what a step of a training takes, measured on its first micro-batches. Nothing is written."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TrainError
from ..stream.batch import AnyBatch, BatchSource, Step
from .checkpoint import model_tensors, optimizer_tensors
from .objectives.hidden import HiddenKD
from .trainer import Trainer

_LEAST, _MOST = 2, 16  # micro-batches: the first one takes longer
_ROWS, _LOGITS = 1024, 2**27  # positions whose logits are timed, at most, and their numbers


@dataclass(frozen=True)
class StepCost:
    """What was measured of a training's first micro-batches.

    step_seconds: of a whole step, with the answers of a live teacher, once its data are there: micro_batches times the
    mean of those that were run but the first, and the optimizer. run: micro-batches that were run.
    evaluation_seconds: of a position that is evaluated.
    memory: in bytes: "weights" of the student, and of what answers inside it; "gradients"; "optimizer", its state;
    "activations", what is kept for the backward of a micro-batch, 0 if that is not known (compile).
    peak: bytes that the GPU held at most; None on other devices.
    """

    step_seconds: float
    micro_batches: int
    run: int
    evaluation_seconds: float
    memory: dict[str, int]
    peak: int | None


class Rehearsal(Trainer):
    """A `Trainer` that makes one odd step, and is of no use afterwards. Use it instead of `resume` and
    `run`; `close` it."""

    @property
    def source(self) -> BatchSource:
        return self._source

    @property
    def device(self) -> torch.device:
        return self._processes.device

    def measure(self, seconds: float) -> StepCost:
        """Run the first micro-batches for about so many seconds, at least two, and the optimizer once."""
        begun = time.perf_counter()
        device = self._processes.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        scheduled = self._objective.schedule(0, self.steps)
        scalars = {name: torch.full((), value, device=device) for name, value in scheduled.items()}
        for term in self.student.modules():
            if isinstance(term, HiddenKD):
                term.fit = False  # to the first batch, which is a part of the first step alone
        self._seed_dropout()
        taken: list[float] = []
        kept: list[int] = []
        steps: list[Step] = []
        batch: AnyBatch | None = None
        for step in self._source.steps():
            steps.append(step)
            at = time.perf_counter()
            for batch in step.micro_batches:  # a teacher may answer one when it is taken
                first = not taken and not self.settings.compile
                with kept_for_backward(self.student, kept) if first else nullcontext():
                    self._parallel.forward_backward(batch, last=False, num_items=step.count, **scalars)
                _synchronise(device)
                taken.append(time.perf_counter() - at)
                at = time.perf_counter()
                if enough := len(taken) >= _LEAST and (len(taken) == _MOST or at - begun >= seconds):
                    break
            if enough:
                break
        if batch is None:
            raise TrainError(f"source: got no step from {type(self._source).__name__}.steps(); expected at least one.")
        gradients = sum(_bytes(p.grad) for p in self.student.parameters() if p.grad is not None)
        at = time.perf_counter()
        self.student.clip_(self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _synchronise(device)
        optimizer_seconds = time.perf_counter() - at
        each = taken[1:] or taken
        return StepCost(
            step_seconds=sum(each) / len(each) * len(steps[0].micro_batches) + optimizer_seconds,
            micro_batches=len(steps[0].micro_batches),
            run=len(taken),
            evaluation_seconds=self._evaluated(batch),
            memory={
                "weights": sum(map(_bytes, (*self.student.parameters(), *self.student.buffers()))),
                "gradients": gradients,
                "optimizer": sum(map(_bytes, optimizer_tensors(self.optimizer, self.student).values())),
                "activations": sum(kept),
            },
            peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )

    def checkpoint_bytes(self) -> tuple[int, int]:
        """Bytes of the weights in a checkpoint, and of the optimizer's state, once a step was made."""
        state = optimizer_tensors(self.optimizer, self.student)
        return sum(map(_bytes, model_tensors(self.student).values())), sum(map(_bytes, state.values()))

    @torch.no_grad()
    def _evaluated(self, batch: AnyBatch) -> float:
        """Seconds of a position that is evaluated: of the forward, and of the logits of a position that counts."""
        index = batch.targets.index
        rows = min(batch.count, _ROWS, _LOGITS // self.student.vocab_size)
        if index is None or rows < 1:
            return 0.0
        self.student.eval()
        seconds = []
        for some in (1, rows):
            at = time.perf_counter()
            self.student.logits(batch, index[:some])
            _synchronise(self._processes.device)
            seconds.append(time.perf_counter() - at)
        self.student.train()
        return seconds[0] / max(batch.positions, 1) + max(0.0, seconds[1] - seconds[0]) / max(rows - 1, 1)


@contextmanager
def kept_for_backward(model: torch.nn.Module, found: list[int]) -> Iterator[None]:
    """Within the context, append to `found` the bytes of what is kept for a backward: tensors that share memory once,
    without a model's own parameters and buffers."""
    own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    seen: set[tuple[int, int]] = set()

    def pack(tensor: Tensor) -> Tensor:
        if (where := _storage(tensor)) not in seen | own:
            seen.add(where)
            found.append(where[1])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's memory."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
