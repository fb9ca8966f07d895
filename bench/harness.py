"""How everything here is timed: warm-up, runs in turns in one process, medians, ratios round by round, peak memory."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from fastkd.bench.hardware import last_level_cache

Run = Callable[[], object]
T = TypeVar("T")
MOST_BYTES = 4 << 30  # of rotating inputs


class Figure(NamedTuple):
    """A median over the rounds, with the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    def scaled(self, by: float) -> "Figure":
        """All three times a positive number."""
        return Figure(self.median * by, self.p20 * by, self.p80 * by)

    def inverse(self, of: float = 1.0) -> "Figure":
        """`of` over all three: a rate from a time. The percentiles change places."""
        return Figure(of / self.median, of / self.p80, of / self.p20)


def figure(values: Sequence[float]) -> Figure:
    """Median and percentiles of some rounds."""
    p20, median, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return Figure(median, p20, p80)


class Timings(dict[str, float]):
    """Median milliseconds of each run; every round is kept, so that two runs can be compared pair by pair."""

    def __init__(self, rounds: Mapping[str, Sequence[float]]) -> None:
        super().__init__({name: figure(values).median for name, values in rounds.items()})
        self.rounds = rounds

    def time(self, name: str) -> Figure:
        """Milliseconds of one run."""
        return figure(self.rounds[name])

    def ratio(self, one: str, other: str) -> Figure:
        """Of one run's time over the other's, round by round: what a machine's mood does to both cancels."""
        return figure([a / b for a, b in zip(self.rounds[one], self.rounds[other], strict=True)])


def interleaved(
    runs: Mapping[str, Run],
    *,
    device: str,
    rounds: int,
    warmup: int = 2,
    before: Mapping[str, Run] | None = None,
    core_time: bool = False,
    timer: Callable[[Run], float] | None = None,
) -> Timings:
    """Milliseconds of each run, taken in turns (A B A B ...). `before[name]` is done, untimed, ahead of each.

    core_time: of the cores that this process used, on all its threads, instead of the clock (CPU): on one thread what
    other processes do to the machine is then no part of it. timer: what runs a run and returns its milliseconds; None:
    the device's.
    """
    before = before or {}
    timer = timer or timer_for(device, core_time=core_time)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + rounds):
        for name, run in runs.items():
            if name in before:
                before[name]()
            elapsed = timer(run)
            if number >= warmup:
                times[name].append(elapsed)
    return Timings(times)


def timer_for(device: str, *, core_time: bool = False) -> Callable[[Run], float]:
    """What runs a run on a device and returns its milliseconds."""
    if device == "cuda":
        return _once_cuda
    clock = time.process_time if core_time else time.perf_counter

    def once(run: Run) -> float:
        start = clock()
        run()
        return (clock() - start) * 1e3

    return once


def _once_cuda(run: Run) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))


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
