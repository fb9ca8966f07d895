"""How everything here is measured: interleaved runs in one process, medians, ratios against a limit of the same run."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]


def hardware(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    info: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        import triton

        info |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, "cuda": torch.version.cuda}
    else:
        info |= {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    return info


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class Timings(dict[str, float]):
    """Median milliseconds of each run; every round is kept, so that two runs can be compared pair by pair."""

    def __init__(self, rounds: dict[str, list[float]]) -> None:
        super().__init__({name: statistics.median(values) for name, values in rounds.items()})
        self.rounds = rounds

    def ratio(self, one: str, other: str) -> float:
        """Median over the rounds of one run's time over the other's: what a machine's mood does to both cancels."""
        return statistics.median(a / b for a, b in zip(self.rounds[one], self.rounds[other], strict=True))


def interleaved(
    runs: dict[str, Run],
    *,
    device: str,
    rounds: int,
    warmup: int = 2,
    before: dict[str, Run] | None = None,
    core_time: bool = False,
) -> Timings:
    """Milliseconds of each run, taken in turns (A B A B ...). `before[name]` is done, untimed, ahead of each.

    core_time: of the cores that this process used, on all its threads, instead of the clock (CPU): on one thread what
    other processes do to the machine is then no part of it.
    """
    before = before or {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + rounds):
        for name, run in runs.items():
            if name in before:
                before[name]()
            elapsed = _once_cuda(run) if device == "cuda" else _once_cpu(run, core_time=core_time)
            if number >= warmup:
                times[name].append(elapsed)
    return Timings(times)


def _once_cuda(run: Run) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def _once_cpu(run: Run, *, core_time: bool = False) -> float:
    clock = time.process_time if core_time else time.perf_counter
    start = clock()
    run()
    return (clock() - start) * 1e3


def peak_bytes(run: Callable[[], list[torch.Tensor]], device: str) -> int:
    """Peak of allocated bytes over what was there before, less the tensors that `run` returns."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        returned = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - base
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
            returned = run()
        live = peak = 0
        for event in trace.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
    return peak - sum(t.numel() * t.element_size() for t in returned)


class Table:
    """Rows of figures beside their limits: printed as they come, kept for a JSON file."""

    def __init__(self, device: str) -> None:
        self.hardware = hardware(device)
        self.rows: list[dict[str, Any]] = []
        print("  ".join(f"{k}={v}" for k, v in self.hardware.items()), flush=True)

    def title(self, text: str) -> None:
        """A heading."""
        print(f"\n{text}", flush=True)

    def row(self, what: str, value: float, limit: str = "", note: str = "") -> None:
        """One figure. `limit`: "<= 1.10" or ">= 0.93", or nothing where none is set."""
        verdict = ""
        if limit:
            sign, bound = limit.split()
            verdict = "ok" if (value <= float(bound) if sign == "<=" else value >= float(bound)) else "MISSED"
        self.rows.append({"what": what, "value": value, "limit": limit, "verdict": verdict, "note": note})
        print(f"  {what:<74} {value:9.3f}  {limit:>8} {verdict:<6} {note}", flush=True)

    def save(self, path: str | None) -> None:
        """The rows and the hardware, as JSON."""
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps({"hardware": self.hardware, "rows": self.rows}, indent=1))
