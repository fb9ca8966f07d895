"""Timing of alternatives in one process: warm-up, alternating rounds, medians, and ratios round by round."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch

from fastkd.utils.intervals import Interval, t_quantile

Run = Callable[[], object]


class Figure(NamedTuple):
    """Median over the rounds, with the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    def scaled(self, by: float) -> "Figure":
        """All three times a positive number."""
        return Figure(self.median * by, self.p20 * by, self.p80 * by)

    def inverse(self, of: float = 1.0) -> "Figure":
        """`of` divided by all three, for example a rate from a time; the percentiles swap."""
        return Figure(of / self.median, of / self.p80, of / self.p20)


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% interval (Student's t) of independent values."""
    n = len(values)
    if n < 2:
        return Interval(fmean(values), float("inf"))
    return Interval(fmean(values), t_quantile(n - 1) * stdev(values) / n**0.5)


def figure(values: Sequence[float]) -> Figure:
    """Median and percentiles of the values of several rounds."""
    p20, median, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return Figure(median, p20, p80)


class Timings(dict[str, float]):
    """Median milliseconds by run. `rounds` keeps every round, so that two runs can be compared pair by pair."""

    def __init__(self, rounds: Mapping[str, Sequence[float]]) -> None:
        super().__init__({name: figure(values).median for name, values in rounds.items()})
        self.rounds = rounds

    def time(self, name: str) -> Figure:
        """Milliseconds of one run."""
        return figure(self.rounds[name])

    def ratio(self, one: str, other: str) -> Figure:
        """Time of `one` divided by the time of `other`, round by round: a slow phase of the machine cancels."""
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
    """Milliseconds of each run, in alternation (A B A B ...). `before[name]` is called, untimed, before each.

    core_time: measure the CPU time of this process, all threads together, instead of wall time (CPU only); with one
    thread, other processes on the machine then do not count. timer: calls a run and returns its milliseconds; None:
    the timer of the device.
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
    """A function that calls a run on a device and returns its milliseconds."""
    if device == "cuda":
        return _time_cuda
    clock = time.process_time if core_time else time.perf_counter

    def time_cpu(run: Run) -> float:
        start = clock()
        run()
        return (clock() - start) * 1e3

    return time_cpu


def _time_cuda(run: Run) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))
