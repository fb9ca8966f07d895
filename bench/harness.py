"""Inputs larger than the last-level cache, and peak memory. Timing itself is in `fastkd.bench.timing`."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, Generic, TypeVar

import torch

from fastkd.bench.hardware import last_level_cache
from fastkd.bench.timing import Run

T = TypeVar("T")
MOST_BYTES = 4 << 30  # of rotating inputs together


class Rotation(Generic[T]):
    """Inputs used one after another; enough of them that none is still in a cache when it is used again."""

    def __init__(self, inputs: Sequence[T]) -> None:
        self.inputs = inputs
        self._turns = cycle(inputs)
        self.last = inputs[0]

    def take(self) -> T:
        """The next input."""
        self.last = next(self._turns)
        return self.last

    def run(self, call: Callable[[T], object]) -> Run:
        """A run that calls a function on the next input each time."""
        return lambda: call(self.take())


def rotation(make: Callable[[], T], size: int, device: str) -> Rotation[T]:
    """Inputs of `size` bytes each that `make` returns, together larger than the last-level cache."""
    return Rotation([make() for _ in range(copies(size, last_level_cache(device)))])


def copies(size: int, cache: int) -> int:
    """Number of inputs of `size` bytes such that all but one fill the cache: at least 2, and at most 4 GiB together."""
    return max(2, min(-(-cache // size) + 1, MOST_BYTES // size))


def peak_bytes(run: Callable[[], Sequence[torch.Tensor | None]], device: str) -> int:
    """Peak of bytes allocated during a run, without the tensors that it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        returned = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - base
    else:
        profiler: Any = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        with profiler as trace:
            returned = run()
        live = peak = 0
        for event in trace.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
    return peak - sum(t.numel() * t.element_size() for t in returned if t is not None)
