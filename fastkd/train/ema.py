"""AveragedTeacher: the average of a student's weights over its training, as its teacher (`--teacher ema:0.999`).

Mean teacher, Tarvainen & Valpola 2017: after each step, average = d · average + (1 − d) · student, and the student
learns from the answers of the average, which is better than the student is at any one step.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.answers import topk_config
from ..errors import TrainError
from ..live.answer import answer
from ..models.module import detached
from ..models.protocol import Output
from ..stream.batch import AnyBatch
from ..utils.distributed import is_dtensor
from .student import Student

KIND = "ema"
_HALF = (torch.float16, torch.bfloat16)


class AveragedTeacher(nn.Module):
    """A copy of a student's model whose weights are an average of the student's; see `InForward`.

    decay: d, from 0 (the student after the last step, without its dropout) to 1 (a frozen copy of the student as it
        was). config: the settings of the targets, such as `LiveSettings`. every: steps between updates; with decay=0
        the copy is then a stale student, as in codistillation (Anil et al. 2018).
    warmup: the decay of update t, from 0 on, is min(decay, (1 + t) / (10 + t)), so that the first weights, which may be
        random, are soon forgotten. Not with decay=1.

    The copy runs without dropout. Floating-point buffers are averaged as weights are, others are copied. Averages of
    half-precision weights are kept, and run, in float32: (1 − d) · (student − average) is below half precision's
    rounding. They can be exported: `write_student(folder, teacher, ...)`.
    """

    def __init__(
        self, student: Student, config: Any, *, decay: float = 0.999, every: int = 1, warmup: bool = True
    ) -> None:
        super().__init__()
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
            raise TrainError(f"decay: got {decay!r}; expected a number from 0 to 1.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise TrainError(f"every: got {every!r}; expected an integer from 1 on.")
        self.decay, self.every, self.warmup = float(decay), every, warmup
        self._config = config
        self.name, self.vocab_size = f"the average of {student.name}", student.vocab_size
        self._logits_of: Callable[..., Tensor] = partial(_logits, student)
        self.model = student.copied_model().requires_grad_(False)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.dtype in _HALF:
                tensor.data = tensor.data.float()
        stored = self.model.state_dict().keys()
        self._stored = [name in stored for name, _ in self.model.named_buffers()]
        self.train()

    def train(self, mode: bool = True) -> "AveragedTeacher":
        """It stays in evaluation mode, whatever mode its student is put into."""
        return super().train(False)

    def answer(self, batch: AnyBatch, output: Output | None, student: Student) -> AnyBatch:
        """The micro-batch with targets of the average."""
        found: AnyBatch = self(batch, student)
        return found

    @torch.no_grad()
    def forward(self, batch: AnyBatch, student: Student) -> AnyBatch:
        return answer(batch, detached(student.run(batch, self.model)), self._config)

    def logits(self, batch: AnyBatch, rows: Tensor | None = None) -> Tensor:
        """Logits `[m, V]` of the average, as `Student.logits`: it can be evaluated as a student."""
        return self._logits_of(batch, rows, self.model)

    def decay_at(self, update: int) -> float:
        """The decay of an update, counted from 0."""
        if self.decay == 1.0 or not self.warmup:
            return self.decay
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def after_step(self, student: Student, step: int) -> None:
        """Average the student's weights in, if it is time to. step: the number of steps that were made."""
        if step % self.every:
            return
        weight = 1.0 - self.decay_at(step // self.every - 1)
        if not weight:
            return
        ours, theirs = (list(map(_local, model.parameters())) for model in (self.model, student.model))
        # by order, not by name: activation checkpointing renames the student's
        torch._foreach_lerp_(ours, [b.to(a.dtype) for a, b in zip(ours, theirs, strict=True)], weight)
        for a, b, stored in zip(self.model.buffers(), student.model.buffers(), self._stored, strict=True):
            if stored:  # equal numbers stay, which may be infinite
                a.copy_(torch.where(a == b, a, a.lerp(b.to(a.dtype), weight)) if a.is_floating_point() else b)

    def describe(self) -> Mapping[str, Any]:
        found = {"decay": self.decay, "every": self.every, "warmup": self.warmup}
        return found | {"targets": asdict(topk_config(self._config))}


def teacher_kind(text: str) -> Callable[[Student, Any], AveragedTeacher]:
    """What makes the teacher of `--teacher ema:TEXT`, from a student and the settings of targets. text: the decay."""
    try:
        decay = float(text)
    except ValueError:
        decay = math.nan
    if not 0 <= decay <= 1:
        raise TrainError(
            f"teacher: got {f'{KIND}:{text}'!r}; expected ema:DECAY with a decay from 0 to 1, such as ema:0.999."
        )
    return lambda student, config: AveragedTeacher(student, config, decay=decay)


def _logits(student: Student, batch: AnyBatch, rows: Tensor | None, model: nn.Module) -> Tensor:
    """The logits of a copy of a student's model. FSDP2 replaces the method `logits` once the copy is made."""
    return student.logits(batch, rows, lambda one: student.run(one, model))


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter: student and average are sharded alike."""
    return parameter.to_local() if is_dtensor(parameter) else parameter.detach()
