"""What the bare teacher takes."""

from typing import Any

import torch
from numpy.typing import NDArray

from ..kernels.topk.api import default_chunk
from ..models.lm_head import logits_of
from ..models.protocol import Hidden
from ..teachers.protocol import Teacher
from ..utils.timing import interleaved

TIMES = 2  # before and after the capture, each


def bare_seconds(teacher: Teacher, windows: NDArray[Any], *, warm_up: bool) -> list[float]:
    """Seconds a position of the bare teacher on one batch of windows `[n, L]`, some times over."""
    batch = torch.from_numpy(windows).long()
    runs = {"bare": lambda: bare(teacher, batch)}
    times = interleaved(runs, device=teacher.device.type, rounds=TIMES, warmup=int(warm_up))
    return [milliseconds / 1e3 / batch.numel() for milliseconds in times.rounds["bare"]]


@torch.inference_mode()
def bare(teacher: Teacher, inputs: torch.Tensor) -> None:
    """The model and its head on a batch `[n, L]`, and nothing kept: logits are made in the capture's chunks."""
    said = teacher(inputs.to(teacher.device))
    if isinstance(said, Hidden):
        states = said.states.flatten(0, 1)
        for some in torch.split(states, default_chunk(states, teacher.vocab_size)):
            logits_of(some, said.lm_head)
