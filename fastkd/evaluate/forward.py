"""The logits of a student that is evaluated: computed, timed and checked."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..cache.reader import Cache
from ..errors import StreamError
from ..stream.batch import AnyBatch

LogitsOf = Callable[[Any], Tensor]
"""From a micro-batch (a `MicroBatch` or an `ExampleBatch`) to the logits `[m, V]` of the positions that count,
`micro_batch.targets.index`."""


class StudentForward:
    """A student as a function from micro-batches to logits.

    student: a module with `logits(micro_batch, rows)`, or a `LogitsOf`. cache: its teacher and labels.
    """

    def __init__(self, student: Any, cache: Cache, device: torch.device) -> None:
        self._cache, self._device = cache, device
        self._modules = list(student.modules()) if isinstance(student, nn.Module) else []
        self._times: list[tuple[float, int]] = []
        self.logits: LogitsOf
        if (logits := getattr(student, "logits", None)) is not None:
            self.logits = lambda batch: logits(batch, rows=batch.targets.index)
        elif callable(student):
            self.logits = student
        else:
            raise StreamError(f"student: got {type(student).__name__}; expected a module with `logits`, or a function.")

    def timed(self, batch: AnyBatch) -> Tensor:
        """Logits `[m, V]` of the positions that count. Raises StreamError for another shape, or too few outcomes."""
        self._synchronize()
        begun = time.perf_counter()
        logits = self.logits(batch)
        self._synchronize()
        self._times.append((time.perf_counter() - begun, batch.positions))
        self._check(logits, batch)
        return logits

    def _check(self, logits: Any, batch: AnyBatch) -> None:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        vocab_size = self._cache.spec.vocab_size
        expected = f"({batch.count}, {vocab_size} or more)"
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch.count:
            raise StreamError(
                f"student: got logits of shape {got}; expected {expected}, a row for each position that counts."
            )
        if logits.shape[1] < vocab_size:
            raise StreamError(
                f"student: got logits of shape {got}; expected {expected}, the vocabulary of the teacher of "
                f"{self._cache!r}. Give the student that vocabulary."
            )
        highest = int(batch.labels.max())
        if highest >= logits.shape[1]:
            raise StreamError(
                f"student: got logits for {logits.shape[1]} tokens; expected more, as {self._cache!r} has labels up to "
                f"{highest}. Give the student the vocabulary of the tokenizer."
            )

    def time(self) -> tuple[float, int]:
        """Seconds of the forward, and its positions, without the first (which warms up) if there are more."""
        times = self._times[1:] or self._times
        return sum(seconds for seconds, _ in times), sum(positions for _, positions in times)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The module in evaluation mode, without gradients; afterwards its submodules are as they were."""
        modes = [(module, module.training) for module in self._modules]
        for module in self._modules:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def check_finite(cross_entropy: Tensor, window: NDArray[np.int64]) -> None:
    """StreamError, naming the first window, if a cross-entropy `[m]` is not finite. window `[m]`."""
    bad = ~torch.isfinite(cross_entropy).cpu().numpy()
    if bad.any():
        raise StreamError(
            f"student: its cross-entropy is not finite at {bad.sum()} positions, the first in window {window[bad][0]}. "
            "Its weights may contain NaN, or it gives a label a probability of 0."
        )


def device_of(student: Any) -> torch.device:
    """Of a module's first parameter; else the CPU."""
    first = next(student.parameters(), None) if isinstance(student, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or the CPU and its threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
