"""Inputs larger than the last-level cache, and peak memory. Timing itself is in `fastkd.utils.timing`."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, Generic, TypeVar

import torch

from fastkd.bench.hardware import last_level_cache
from fastkd.utils.timing import Run

T = TypeVar("T")
MOST_BYTES = 4 << 30  # of rotating inputs


class Rotation(Generic[T]):
    """Inputs one after another, so many that none is in a cache any more when its turn comes again."""

    def __init__(self, inputs: Sequence[T]) -> None:
        self.inputs = inputs
        self._turns = cycle(inputs)
        self.last = inputs[0]

    def take(self) -> T:
        """The next one."""
        self.last = next(self._turns)
        return self.last

    def run(self, call: Callable[[T], object]) -> Run:
        """A call on the next one each time."""
        return lambda: call(self.take())


def rotation(make: Callable[[], T], size: int, device: str) -> Rotation[T]:
    """Inputs of `size` bytes each that `make` returns, together larger than the last-level cache."""
    return Rotation([make() for _ in range(copies(size, last_level_cache(device)))])


def copies(size: int, cache: int) -> int:
    """How many inputs of so many bytes: all others together fill the cache, as far as 4 GiB do; two at least."""
    return max(2, min(-(-cache // size) + 1, MOST_BYTES // size))


def peak_bytes(run: Callable[[], Sequence[torch.Tensor | None]], device: str) -> int:
    """Peak of allocated bytes over what was there before, less the tensors that `run` returns."""
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
