"""What `gpu_day.py` does: steps in order, each kept in a file of recordings as soon as it is done, until a deadline."""

import contextlib
import hashlib
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastkd.bench import limits
from fastkd.bench.hardware import hardware, versions
from fastkd.bench.run import progress, to_stderr
from fastkd.bench.table import Recording, Row, Table, load, save

LOG = "gpu_day"  # the recording whose rows are the steps
DONE, FAILED, BROKEN = "done", "failed", "could not run"
OK, WRONG, UNFINISHED = 0, 1, 3  # exit statuses


class WrongResult(Exception):
    """A step ran, and what it found is wrong."""


class Unfinished(Exception):
    """A step has done a part, and resumes in another call."""


class OutOfTime(BaseException):
    """The deadline has come. Not an Exception: code that continues after a failed candidate must not catch it."""


@dataclass(frozen=True)
class Step:
    """A part of the day. suite: of the recording that its rows belong to. seconds: it is not begun with less time left.
    warm: compiles its kernels, in a process of its own. always: also where it is done. stop: ends the day if it fails.
    in_parts: an unfinished step's rows are kept, and it resumes after them. before: the steps that it prepares: it is
    run where one of these is not done.
    """

    name: str
    run: Callable[[Table], None]
    suite: str = LOG
    seconds: float = 5
    warm: Callable[[Table], None] | None = None
    always: bool = False
    stop: bool = False
    in_parts: bool = False
    before: tuple[str, ...] = ()


class Day:
    """The recordings of a day in a file, those of other machines or kernels beside them untouched."""

    def __init__(self, path: Path | None, device: str, size: str) -> None:
        self.path, self.device, self.size = path, device, size
        self.versions = versions() | {"kernels": kernels_hash()}
        self.others: list[Recording] = []
        self.tables: dict[str, Table] = {}
        self.limits: dict[str, float] = {}  # of all tables
        self._before: dict[str, float] = {}  # seconds of earlier calls, by suite
        machine = hardware(device)
        for recording in load(path) if path is not None and path.exists() else []:
            if (recording.hardware, recording.versions, recording.size) == (machine, self.versions, size):
                self.table(recording.suite).rows = list(recording.rows)
                self._before[recording.suite] = recording.seconds
                self.limits |= {row.unit: row.value or 0.0 for row in recording.rows if row.case == limits.TITLE}
            else:
                self.others.append(recording)

    def table(self, suite: str) -> Table:
        """Where the rows of a suite go. The first one prints the machine."""
        if suite not in self.tables:
            self.tables[suite] = Table(self.device, suite, size=self.size, quiet=bool(self.tables))
            self.tables[suite].limits = self.limits
        return self.tables[suite]

    @property
    def steps(self) -> dict[str, Row]:
        """The steps that ended, by name."""
        return {row.name: row for row in self.table(LOG).rows if row.case == "steps"}

    def is_due(self, step: Step) -> bool:
        """Whether it is to be run. What ended in an earlier call, well or not, is not; what could not run is."""
        if step.before:
            return not self.done.issuperset(step.before)
        return step.always or step.name not in self.done

    @property
    def done(self) -> set[str]:
        """The names of the steps that ended, well or not."""
        return {name for name, row in self.steps.items() if not row.note.startswith(BROKEN)}

    def ended(self, step: Step, seconds: float, note: str) -> None:
        """Keep how a step ended, and save everything."""
        log = self.table(LOG)
        log.rows = [row for row in log.rows if (row.case, row.name) != ("steps", step.name)]
        log.case = "steps"
        log.value(step.name, seconds, "s", note=note)
        self.save()

    def save(self) -> None:
        """Write the file anew."""
        if self.path is None:
            return
        mine = []
        for suite, table in self.tables.items():
            found = table.recording()
            seconds = found.seconds + self._before.get(suite, 0.0)
            mine.append(replace(found, versions=self.versions, seconds=round(seconds, 1)))
        save([*self.others, *(one for one in mine if one.rows)], self.path)

    @property
    def wrong(self) -> list[str]:
        """What is not as it should be: steps that failed, and bounds that are missed."""
        steps = [f"{name}: {row.note}" for name, row in self.steps.items() if row.note != DONE]
        rows = [row for table in self.tables.values() for row in table.rows if row.verdict == "MISSED"]
        return steps + [f"{row.case}: {row.name}: {row.figure:.3f}, expected {row.limit}" for row in rows]


def kernels_hash() -> str:
    """A hash of the kernels' sources: steps of other ones are not skipped."""
    folder = Path(__file__).resolve().parent.parent / "kernels"
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def run(day: Day, steps: Sequence[Step], deadline: float, *, begun: float | None = None) -> int:
    """Run what is not done yet, until `deadline` seconds after `begun` (of time.monotonic). Returns the exit status."""
    begun = time.monotonic() if begun is None else begun
    left_out: list[str] = []
    for number, step in enumerate(steps):
        if not day.is_due(step):
            continue
        elapsed = time.monotonic() - begun
        if deadline - elapsed < step.seconds:
            left_out.append(step.name)
            continue
        to_stderr(progress(number, len(steps), "step", step.name, elapsed))
        table = day.table(step.suite)
        rows, start = list(table.rows), time.monotonic()
        try:
            with time_left(deadline - elapsed):
                step.run(table)
            note = DONE
        except (OutOfTime, Unfinished) as error:
            table.rows = table.rows if step.in_parts else rows
            left_out.append(f"{step.name} ({error})" if str(error) else step.name)
            continue
        except WrongResult as error:
            note = f"{FAILED}: {error}"
        except Exception as error:
            traceback.print_exc()
            table.rows, note = rows, f"{BROKEN}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        day.ended(step, time.monotonic() - start, note)
        if note != DONE and (step.stop or not is_usable(day.device)):
            to_stderr(f"{step.name}: {note}. Nothing after it is run.")
            return WRONG
        release(day.device)
    day.save()
    for text in day.wrong:
        to_stderr(f"WRONG {text}")
    if left_out:
        to_stderr(f"out of time; the same command resumes with: {', '.join(left_out)}")
    return WRONG if day.wrong else UNFINISHED if left_out else OK


@contextlib.contextmanager
def time_left(seconds: float) -> Iterator[None]:
    """Raise OutOfTime within the block after `seconds`."""

    def ring(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_usable(device: str) -> bool:
    """Whether the device still works: after an illegal access, nothing does in this process."""
    try:
        release(device)
    except Exception:
        return False
    return True


def release(device: str) -> None:
    """Give memory back, so that it does not count for the next step's peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
