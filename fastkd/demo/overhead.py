"""What capture costs over the bare teacher, measured: the same windows with and without all that keeps what it says."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..cache.stores import MemoryStore
from ..kernels.linear import default_chunk
from ..settings import CaptureSettings
from ..teacher.capture import capture
from ..teacher.head import logits_of
from ..teacher.protocol import Hidden, Teacher

ROUNDS = 3


def capture_overhead(teacher: Teacher, windows: Sequence[Any], asked: CaptureSettings) -> dict[str, float]:
    """Seconds a position of the bare teacher and of a capture, in turns, and the median ratio of the rounds.

    windows: some of equal length. The capture is whole: planned, run, reduced, encoded and written, into memory.
    """
    positions = sum(map(len, windows))
    few = replace(asked, held_out=0.0)
    batch = max(1, asked.batch_tokens // len(windows[0]))
    batches = [torch.from_numpy(np.stack(windows[i : i + batch])).long() for i in range(0, len(windows), batch)]
    runs = {"bare": lambda: bare(teacher, batches), "capture": lambda: capture(teacher, windows, MemoryStore(), few)}
    seconds = in_turns(runs, device=teacher.device, rounds=ROUNDS)
    return {name: statistics.median(values) / positions for name, values in seconds.items()} | {
        "ratio": ratio(seconds["capture"], seconds["bare"])
    }


@torch.inference_mode()
def bare(teacher: Teacher, batches: Sequence[torch.Tensor]) -> None:
    """The model and its head, and nothing kept: `[positions, V]` is made in chunks."""
    for inputs in batches:
        said = teacher(inputs.to(teacher.device))
        if isinstance(said, Hidden):
            states = said.states.flatten(0, 1)
            chunk = default_chunk(states.device, teacher.vocab_size, states.element_size())
            for some in torch.split(states, chunk):
                logits_of(some, said.head)


def in_turns(runs: Mapping[str, Callable[[], object]], *, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, in turns (A B A B ...), after one turn that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            _wait(device)
            begun = time.perf_counter()
            run()
            _wait(device)
            if number:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of ours over theirs: what disturbs a machine for a while disturbs both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
