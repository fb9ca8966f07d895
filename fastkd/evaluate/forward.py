"""A student that is evaluated: its logits, timed and checked; and the part of the windows that each process computes.

Steps are whole: each process computes the same micro-batches as a single process would, so that the sums of each window
are the same numbers, whichever process computes them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..cache.errors import type_name
from ..errors import StreamError
from ..stream.batch import AnyBatch, Step
from ..stream.shard_source import ShardSource
from ..stream.split import ShardOrigin
from ..utils.distributed import ALONE, Processes, is_fsdp
from .result import Windows


class NotFinite(StreamError):
    """A student's cross-entropy is not finite."""


LogitsOf = Callable[[Any], Tensor]
"""From a micro-batch (a `MicroBatch` or an `ExampleBatch`) to the logits `[m, V]` of the positions that count,
`micro_batch.targets.index`."""


class StudentForward:
    """A student as a function from micro-batches to logits.

    student: a module with `logits(micro_batch, rows)`, or a `LogitsOf`. cache: what it is measured on.
    """

    def __init__(self, student: Any, cache: ShardOrigin, device: torch.device) -> None:
        self._cache, self._device = cache, device
        self._modules = list(student.modules()) if isinstance(student, nn.Module) else []
        self._times: list[tuple[float, int]] = []
        self.logits: LogitsOf
        if (logits := getattr(student, "logits", None)) is not None:
            self.logits = lambda batch: logits(batch, rows=batch.targets.index)
        elif callable(student):
            self.logits = student
        else:
            raise StreamError(f"student: got {type_name(student)}; expected a module with `logits`, or a function.")
        self._answered = getattr(student, "answered", None)

    def answered(self, batch: Any) -> Any:
        """The micro-batch with the targets that a student's own teacher gives it (`Student.answered`)."""
        return batch if self._answered is None else self._answered(batch)

    def repeat(self, batch: Any) -> None:
        """What is run for a micro-batch once more, for the sake of other processes."""
        self.logits(self.answered(batch))

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
        vocab_size, highest = self._cache.spec.vocab_size, int(batch.labels.max())
        problem = f"got logits of shape {got}; expected ({batch.count}, {vocab_size} or more), "
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch.count:
            problem += "a row for each position that counts."
        elif logits.shape[1] < vocab_size:
            problem += f"the vocabulary of the teacher of {self._cache!r}. Give the student that vocabulary."
        elif highest >= logits.shape[1]:
            problem = (
                f"got logits for {logits.shape[1]} tokens; expected more, as {self._cache!r} has labels up to "
                f"{highest}. Give the student the vocabulary of the tokenizer."
            )
        else:
            return
        raise StreamError(f"student: {problem}")

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


class EvalPartition:
    """This process's part of the steps of an epoch.

    source: not divided over ranks, with a batch_size. windows: of the epoch. student: checked for FSDP2.
    With fewer steps than processes, each process computes all of them, and nothing is summed.
    """

    def __init__(self, source: ShardSource, windows: int, processes: Processes, student: Any) -> None:
        self._source, count = source, len(source)
        self._processes = processes if count >= processes.world_size else ALONE
        world = self._processes.world_size
        self._first, self._last = (count * rank // world for rank in (self._processes.rank, self._processes.rank + 1))
        self._max_steps = -(-count // world)
        # FSDP2 gathers the shards of a layer in every forward, so all processes must run equally many, at the same time
        modules = student.modules() if isinstance(student, nn.Module) else ()
        self._in_lockstep = world > 1 and any(is_fsdp(module) for module in modules)
        self.first_window = min(self._first * source.fingerprint["batch_size"], windows)
        """The number of the first window of the first step."""

    def steps(self, forward: Callable[[Any], object]) -> Iterator[Step]:
        """The steps of this process; the caller runs one forward for each micro-batch with positions that count.

        forward: of a micro-batch, called in addition if other processes run more forwards than this one.
        """
        self._source.seek(0, self._first)
        mine = islice(self._source.steps(epochs=1), self._last - self._first)
        last: Any = None
        for _ in range(self._max_steps):
            step = next(mine, None)
            forwards = 0 if step is None else sum(batch.count > 0 for batch in step.unanswered)
            most = max(self._processes.gather(forwards)) if self._in_lockstep else forwards
            if step is not None:
                last = step.unanswered[-1]
                yield step
            for _ in range(most - forwards):
                forward(last)

    def sum(self, parts: list[Windows], positions: int) -> tuple[list[Windows], int]:
        """The sums of all processes, of each part and of positions; each window was computed by one of them."""
        if self._processes.group is None:
            return parts, positions
        gathered = self._processes.gather((parts, positions))
        merged = [Windows.merged(of_all) for of_all in zip(*(one for one, _ in gathered), strict=True)]
        return merged, sum(count for _, count in gathered)


def check_finite(cross_entropy: Tensor, window: NDArray[np.int64]) -> None:
    """NotFinite, naming the first window, if a cross-entropy `[m]` is not finite. window `[m]`."""
    bad = ~torch.isfinite(cross_entropy).cpu().numpy()
    if bad.any():
        raise NotFinite(
            f"student: its cross-entropy is not finite at {bad.sum()} positions, the first in window {window[bad][0]}. "
            "Its weights may contain NaN, or it gives a label a probability of 0."
        )
