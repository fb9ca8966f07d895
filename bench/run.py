"""Run suites: one in this process, several in a process each, so that none affects the next one."""

import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastkd.bench.suites import Case, RunConfig, Suite
from fastkd.bench.table import Recording, Table, load
from fastkd.errors import BenchError
from fastkd.utils.numbers import duration

Say = Callable[[str], None]
Keep = Callable[[Sequence[Recording]], None]


def run_suites(
    suites: Sequence[Suite],
    ask: RunConfig,
    *,
    runs: int = 1,
    say: Say,
    keep: Keep = lambda found: None,
) -> tuple[list[Recording], list[str]]:
    """Recordings, and the names of suites that failed. runs: number of times that each suite is measured, alternating.
    keep: called with all recordings after each case of a single suite, otherwise after each suite, so that little is
    lost if the process is stopped."""
    turns = [suite for _ in range(runs) for suite in suites]
    if len(turns) == 1:
        return [run_suite(turns[0], ask, say, keep)], []
    found: list[Recording] = []
    failed: list[str] = []
    begun = time.monotonic()
    for number, suite in enumerate(turns):
        say(progress(number, len(turns), "suite", suite.name, time.monotonic() - begun))
        recordings = _apart(suite, ask)
        found += recordings
        keep(found)
        failed += [] if recordings else [suite.name]
    return found, failed


def run_suite(suite: Suite, ask: RunConfig, say: Say, keep: Keep = lambda found: None) -> Recording:
    """One suite, in this process. keep: as in `run_suites`."""
    device = ask.device if ask.device in suite.devices else suite.devices[0]
    ask = RunConfig(device, ask.full, ask.peers, ask.rounds)
    cases = suite.cases(ask)
    table = Table(device, suite.name, size=ask.size("small", "full"))
    run_cases(cases, table, say, keep)
    table.say_load()
    return table.recording()


def run_cases(cases: Sequence[Case], table: Table, say: Say, keep: Keep = lambda found: None) -> None:
    """Run each case in turn, reporting the progress before each. keep: called with the rows so far after each."""
    begun = time.monotonic()
    for number, case in enumerate(cases):
        say(progress(number, len(cases), f"{table.suite} case", case.name, time.monotonic() - begun))
        case.run(table)
        keep([table.recording()])
        if table.device == "cuda":  # memory that this case keeps must not count for the next one's peak
            import torch

            gc.collect()
            torch.cuda.empty_cache()


def progress(done: int, total: int, what: str, name: str, seconds: float) -> str:
    """A line of progress: the next item, the time so far and, from the second item on, an estimate of the rest."""
    left = f", about {duration(seconds / done * (total - done))} left" if done else ""
    return f"{what} {done + 1} of {total} ({done / total:.0%}, {duration(seconds)} so far{left}): {name}"


def _apart(suite: Suite, ask: RunConfig) -> list[Recording]:
    """Run a suite in a separate process. Empty if it failed; it has printed the reason."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "fastkd", "bench", suite.name, "--device", ask.device, "--json", str(path)]
        command += ["--full"] * ask.full + ["--peers"] * ask.peers
        command += ["--rounds", str(ask.rounds)] if ask.rounds else []
        status = subprocess.run(command).returncode
        return load(path) if status == 0 else []


def device_for(asked: str | None) -> str:
    """The requested device; by default "cuda" if there is a GPU, otherwise "cpu". Raises BenchError."""
    import torch

    there = torch.cuda.is_available()
    if asked not in (None, "cpu", "cuda"):
        raise BenchError(f"--device: got {asked}; expected cpu or cuda.")
    if asked == "cuda" and not there:
        raise BenchError("--device cuda: torch finds no GPU here. --device cpu measures what runs on a CPU.")
    return asked or ("cuda" if there else "cpu")


def to_stderr(text: str) -> None:
    """Print a line for the person at the terminal."""
    print(f"bench: {text}", file=sys.stderr, flush=True)
