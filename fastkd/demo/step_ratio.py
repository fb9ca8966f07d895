"""The time of a training step on cached targets, over that of a step of cross-entropy alone."""

import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from ..cache import Cache
from ..kernels import SparseTargets
from ..settings import TrainSettings
from ..stream.batch import MicroBatch
from ..train.api import make_source
from ..train.objective import TokenKD
from ..train.optimizer import clip_, make_optimizer
from ..train.precision import autocast_of
from ..train.student import make_student
from ..utils.distributed import joined_processes

ROUNDS = 3


def step_ratio(folder: Path, cache: Cache, settings: TrainSettings) -> dict[str, float]:
    """The median ratio over rounds, of the same student, batch and optimizer. folder: the student's, which is not
    changed."""
    with joined_processes(settings.device) as processes:
        device = processes.device
        student = make_student(folder, cache.spec, settings).student.to(device).train()
        student.autocast = autocast_of(settings.precision, device)
        student.objective = TokenKD.from_settings(settings)
        optimizer = make_optimizer(student, settings, device)
        source = make_source(cache, settings, processes)
        try:
            step = next(source.steps())
        finally:
            source.close()

        def seconds(batches: list[MicroBatch], alpha: float) -> float:
            begun = time.perf_counter()
            for batch in batches:
                scalar = torch.full((), alpha, device=device)
                student(batch, num_items=step.count, alpha=scalar)["loss"].backward()
            clip_(student.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - begun

        batches = list(step.micro_batches)
        labels = [replace(batch, targets=labels_only(batch.targets)) for batch in batches]
        ratios = [seconds(batches, settings.alpha) / seconds(labels, 1.0) for _ in range(1 + ROUNDS)]
    return {"ratio": median(ratios[1:])}  # the first round warms up


def labels_only(targets: SparseTargets) -> SparseTargets:
    """The same positions without entries, all that cross-entropy needs."""
    return replace(targets, ids=targets.ids[:, :0], logprobs=targets.logprobs[:, :0], draws=None)
