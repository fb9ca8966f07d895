"""What a step of distillation costs over one of cross-entropy alone: the same student, batch, head and optimizer."""

from dataclasses import replace
from pathlib import Path

import torch

from ..cache import Cache
from ..kernels import SparseTargets
from ..settings import TrainSettings
from ..stream.batch import MicroBatch
from ..train.api import make_source
from ..train.load_student import make_student
from ..train.objective import TokenKD
from ..train.optimizer import clip_, make_optimizer
from ..train.trainer import autocast_of
from ..utils.distributed import joined_processes
from ..utils.timing import interleaved

ROUNDS = 3


def step_ratio(folder: Path, cache: Cache, settings: TrainSettings) -> dict[str, float]:
    """The median ratio of a step on cached targets over one on labels alone, by the same engine, in turns.

    folder: of the student, which is read for this and left as it is.
    """
    with joined_processes(settings.device) as processes:
        student = make_student(folder, cache.spec, settings).student.to(processes.device).train()
        student.autocast = autocast_of(settings.precision, processes.device)
        student.objective = TokenKD.from_settings(settings)
        optimizer = make_optimizer(student, settings, processes.device)
        loader = make_source(cache, settings, processes)
        try:
            step = next(loader.steps())
        finally:
            loader.close()

        def take(batches: list[MicroBatch], alpha: float) -> None:
            for batch in batches:
                scalar = torch.full((), alpha, device=processes.device)
                student(batch, num_items=step.count, alpha=scalar)["loss"].backward()
            clip_(student.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        batches = list(step.micro_batches)
        plain = [replace(batch, targets=labels_only(batch.targets)) for batch in batches]
        runs = {"distil": lambda: take(batches, settings.alpha), "labels": lambda: take(plain, 1.0)}
        times = interleaved(runs, device=processes.device.type, rounds=ROUNDS, warmup=1)
    return {"ratio": times.ratio("distil", "labels").median}


def labels_only(targets: SparseTargets) -> SparseTargets:
    """The same positions without entries: what cross-entropy alone reads."""
    return replace(targets, ids=targets.ids[:, :0], logprobs=targets.logprobs[:, :0], draws=None)
