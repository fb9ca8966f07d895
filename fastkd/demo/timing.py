"""Timing: the teacher alone, against a capture; and a distillation step, against one of cross-entropy alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from ..cache import Cache
from ..kernels import SparseTargets
from ..kernels.topk.api import default_chunk
from ..models.lm_head import logits_of
from ..models.protocol import Hidden
from ..settings import TrainSettings
from ..stream.batch import MicroBatch
from ..teachers.protocol import Teacher
from ..train.api import make_source
from ..train.load_student import make_student
from ..train.objective import TokenKD
from ..train.optimizer import clip_, make_optimizer
from ..train.trainer import autocast_of
from ..utils.distributed import joined_processes
from ..utils.timing import interleaved

TEACHER_ROUNDS = 2  # before the capture, and again after it
STEP_ROUNDS = 3


def teacher_seconds(teacher: Teacher, windows: NDArray[Any], *, warm_up: bool) -> list[float]:
    """Seconds per position of the teacher alone on one batch of windows `[n, L]`, in each of two rounds."""
    batch = torch.from_numpy(windows).long()
    runs = {"teacher": lambda: _forward(teacher, batch)}
    times = interleaved(runs, device=teacher.device.type, rounds=TEACHER_ROUNDS, warmup=int(warm_up))
    return [milliseconds / 1e3 / batch.numel() for milliseconds in times.rounds["teacher"]]


@torch.inference_mode()
def _forward(teacher: Teacher, inputs: torch.Tensor) -> None:
    """Compute all logits of a batch `[n, L]`, in the chunks of a capture, and keep none."""
    answer = teacher(inputs.to(teacher.device))
    if isinstance(answer, Hidden):
        states = answer.states.flatten(0, 1)
        for chunk in torch.split(states, default_chunk(states, teacher.vocab_size)):
            logits_of(chunk, answer.lm_head)


def step_ratio(folder: Path, cache: Cache, settings: TrainSettings) -> dict[str, float]:
    """Time of a step on cached targets divided by that of a step on labels alone, with the same student, batch and
    optimizer: the median over rounds. folder: the student's; it is not changed."""
    with joined_processes(settings.device) as processes:
        student = make_student(folder, cache.spec, settings).student.to(processes.device).train()
        student.autocast = autocast_of(settings.precision, processes.device)
        student.objective = TokenKD.from_settings(settings)
        optimizer = make_optimizer(student, settings, processes.device)
        source = make_source(cache, settings, processes)
        try:
            step = next(source.steps())
        finally:
            source.close()

        def take(batches: list[MicroBatch], alpha: float) -> None:
            for batch in batches:
                scalar = torch.full((), alpha, device=processes.device)
                student(batch, num_items=step.count, alpha=scalar)["loss"].backward()
            clip_(student.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        batches = list(step.micro_batches)
        plain = [replace(batch, targets=labels_only(batch.targets)) for batch in batches]
        runs = {"distill": lambda: take(batches, settings.alpha), "labels": lambda: take(plain, 1.0)}
        times = interleaved(runs, device=processes.device.type, rounds=STEP_ROUNDS, warmup=1)
    return {"ratio": times.ratio("distill", "labels").median}


def labels_only(targets: SparseTargets) -> SparseTargets:
    """The same positions without entries, all that cross-entropy needs."""
    return replace(targets, ids=targets.ids[:, :0], logprobs=targets.logprobs[:, :0], draws=None)
