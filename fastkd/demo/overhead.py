"""What the bare teacher takes, and how runs are timed against each other."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from ..kernels.linear import default_chunk
from ..teacher.head import logits_of
from ..teacher.protocol import Hidden, Teacher

TIMES = 2  # before and after the capture, each


def bare_seconds(teacher: Teacher, windows: NDArray[Any], *, warm_up: bool) -> list[float]:
    """Seconds a position of the bare teacher on one batch of windows `[n, L]`, some times over."""
    batch = torch.from_numpy(windows).long()
    if warm_up:
        bare(teacher, batch)
    seconds = in_turns({"bare": lambda: bare(teacher, batch)}, device=teacher.device, rounds=TIMES, warm_up=False)
    return [value / batch.numel() for value in seconds["bare"]]


@torch.inference_mode()
def bare(teacher: Teacher, inputs: torch.Tensor) -> None:
    """The model and its head on a batch `[n, L]`, and nothing kept: `[positions, V]` is made in chunks."""
    said = teacher(inputs.to(teacher.device))
    if isinstance(said, Hidden):
        states = said.states.flatten(0, 1)
        for some in torch.split(states, default_chunk(states.device, teacher.vocab_size, states.element_size())):
            logits_of(some, said.head)


def in_turns(
    runs: Mapping[str, Callable[[], object]], *, device: torch.device, rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each run, in turns (A B A B ...); warm_up: after a turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm_up):
        for name, run in runs.items():
            _wait(device)
            begun = time.perf_counter()
            run()
            _wait(device)
            if number or not warm_up:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of ours over theirs: what disturbs a machine for a while disturbs both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
