"""The command line: one function for each command of commands.py.

Exit status 0: success. 1: a problem was found and reported. 2: wrong usage, or no such cache or run. 75: work remains,
and running the same command again resumes. Heavy imports happen inside the commands.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from ..cache.errors import CacheError, NotFound, ReadOnly, StoreError
from ..errors import (
    BenchError,
    DataError,
    NoRun,
    NoSuite,
    ReportError,
    StreamError,
    TeacherError,
    TrainError,
    WorkRemains,
)
from ..settings import CaptureSettings, DataSettings, TrainSettings
from ..utils.numbers import size_text
from ..utils.output_guard import check_cache_place, check_demo_place
from ..utils.signals import WORK_REMAINS, Stop, Stopped, stopping
from ..utils.text import printable, ranges, report_text
from .commands import (
    Bench,
    Capture,
    Completion,
    Demo,
    Inspect,
    Plan,
    Report,
    Seal,
    Sweep,
    Train,
    Verify,
)
from .flags import in_flags
from .parse import completion_script, flags, parse

if TYPE_CHECKING:
    from ..cache.stores import Store
    from ..capture.check import TeacherCheck


class Outcome(NamedTuple):
    """Result of a command: a JSON report, text for stdout, the exit status, and a warning for stderr."""

    report: dict[str, Any]
    text: str
    status: int = 0
    warning: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        _say(f"fastkd {__version__}")
        return 0
    try:
        command = parse(args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        outcome = _COMMANDS[type(command)](command)
    except (BenchError, CacheError, DataError, ReportError, StreamError, TeacherError, TrainError) as error:
        outcome = _failure(error, command)
    except KeyboardInterrupt:
        _say("fastkd: interrupted", sys.stderr)
        return 130
    if outcome.warning:
        _say(printable(f"fastkd: {outcome.warning}"), sys.stderr)
    if command.json is True:
        _say(json.dumps(outcome.report, allow_nan=False))
    elif outcome.text:
        _say(outcome.text)
    return outcome.status


def capture(command: Capture) -> Outcome:
    """Fill the cache. Status 75: work remains."""
    return _stoppable(
        partial(_captured, command), "stopped before the first shard. Run the same command again to resume."
    )


def _captured(command: Capture, stop: Stop) -> Outcome:
    from ..cache import open_store
    from ..capture.window_plan import check_settings
    from ..utils.progress import mode_for

    check_settings(_capture_settings(command))
    store = open_store(command.out, create=True)
    check_cache_place(store)
    _note(f"loading {command.teacher}", events=command.json)
    from ..capture.api import capture as run
    from ..capture.runner import capture_text
    from ..teachers.load import load

    with _work_remains(StoreError, more=" Committed shards are kept: run the same command again to resume."):
        loaded = load(
            command.teacher,
            command,
            command,
            rank=command.rank,
            world_size=command.world_size,
            parallel=command.teacher_parallel,
            progress=_at_terminal(),
        )
        report = run(
            loaded.teacher,
            loaded.data,
            store,
            _capture_settings(command),
            rank=loaded.worker.worker,
            world_size=loaded.worker.workers,
            group=loaded.worker,
            threads=command.threads,
            stop=stop,
            progress=mode_for(events=command.json),
            notes=f"teacher {getattr(loaded.teacher, 'name', command.teacher)}",
        )
        loaded.worker.leave()
    return Outcome({"event": "done", **report.to_json()}, capture_text(report), report.status)


def plan(command: Plan) -> Outcome:
    """Estimate a capture from a sample of it."""
    from ..capture.window_plan import check_settings

    check_settings(_capture_settings(command))
    _note(f"loading {command.teacher}", events=False)
    from ..capture.answers import large_k_text
    from ..capture.estimate import estimate, estimate_text
    from ..kernels import prepare_topk
    from ..teachers.load import load

    loaded = load(command.teacher, command, command, rank=0, world_size=1, progress=_at_terminal())
    assert loaded.data is not None
    prepared = prepare_topk(loaded.teacher.device)
    _note(
        f"measuring the data, then running a sample for {command.seconds:g} s, or one batch if it takes longer",
        events=False,
    )
    report = estimate(
        loaded.teacher,
        loaded.data,
        _capture_settings(command),
        seconds=command.seconds,
        price_per_hour=command.price_per_hour,
        workers=command.workers,
        progress=_at_terminal(),
    )
    notes = [*getattr(loaded.teacher, "notes", []), *report.data[1:]]
    notes += large_k_text(command.k, command.draws, loaded.teacher.vocab_size) + ([prepared] if prepared else [])
    return Outcome(report.to_json(), estimate_text(report), 0, "; ".join(notes))


def _capture_settings(command: Capture | Plan) -> CaptureSettings:
    return CaptureSettings(**{f.name: getattr(command, f.name) for f in fields(CaptureSettings)})


def inspect(command: Inspect) -> Outcome:
    """Describe the cache."""
    from ..cache import open_cache
    from ..cache.inspect import inspect_cache

    report = inspect_cache(open_cache(_store(command.cache)), progress=_at_terminal())
    return Outcome(report, report_text(report))


def verify(command: Verify) -> Outcome:
    """Check the cache. Status 1: a problem was found."""
    from ..cache import verify_cache

    store = _store(command.cache)
    found = verify_cache(store, deep=command.deep, progress=_at_terminal())
    read = f"{found.shards:,} shards, {found.positions:,} positions, {size_text(found.bytes)}"
    count = len(found.problems)
    verdict = f"{count:,} problem{'s' * (count > 1)} found" if count else "no problem found"
    lines = [str(problem) for problem in found.problems]
    if found.missing:
        why, also = (
            ("sealed without them", " after deleting manifest.parquet") if found.sealed else ("not written yet?", "")
        )
        lines.append(
            f"missing ({why}): shards {ranges(found.missing)}. Run the same capture again{also} to write them."
        )
    lines.append(f"{store.describe()}: {verdict} ({read} {'hashed and decoded' if found.deep else 'hashed'})")
    if any(problem.shard is not None for problem in found.problems):
        sealed = " and manifest.parquet" if found.sealed else ""
        lines.append(f"To repair the cache, delete the damaged shards{sealed} and run the same capture again.")
    text = "\n".join(printable(line) for line in lines)
    warning = f"only the shards in the manifest were checked. {found.unlisted}" if found.unlisted else ""
    report = {"cache": store.describe(), "ok": found.ok, **asdict(found)}
    if command.teacher is None or not found.ok:
        return Outcome(report, text, 0 if found.ok else 1, warning)
    from ..capture.check import check_text

    check = _check_teacher(command, command.teacher, store)
    report |= {"ok": check.ok, "teacher": check.to_json()}
    return Outcome(report, f"{text}\n\n{check_text(check)}", 0 if check.ok else 1, warning)


def _check_teacher(command: Verify, teacher: str, store: "Store") -> "TeacherCheck":
    """The check of a cache against its teacher."""
    from ..cache import open_cache
    from ..capture.check import check_teacher
    from ..data.examples import Examples
    from ..teachers.load import load

    data = None if command.examples is None else DataSettings(data=(command.examples,))
    loaded = load(teacher, command, data, rank=0, world_size=1, progress=_at_terminal())
    examples = loaded.data if isinstance(loaded.data, Examples) else None
    return check_teacher(
        open_cache(store),
        loaded.teacher,
        positions=command.positions,
        seed=command.sample,
        data=examples,
        progress=_at_terminal(),
    )


def seal(command: Seal) -> Outcome:
    """Seal the cache. A sealed cache is reported as such; a cache without shards is refused."""
    from ..cache import open_cache, open_writer
    from ..cache.capture_plan import planned_shards
    from ..cache.manifest import gaps

    cache = open_cache(_store(command.cache))
    name = cache.store.describe()
    if not cache.store.readonly and not cache.shards:
        raise CacheError(f"{name}: got a cache without shards; a sealed cache accepts no more. Nothing was written.")
    with open_writer(cache.store) as writer:
        table = writer.seal(progress=_at_terminal())
    missing = gaps(table.column("shard").to_numpy(), end=planned_shards(cache.store))
    warning = (
        f"{name}: shards {ranges(missing)} are missing, and a sealed cache accepts no more. To write them, delete "
        "manifest.parquet and run the capture again."
    )
    report: dict[str, Any] = {"cache": name, "already": cache.sealed, "shards": len(table)}
    report |= {"positions": sum(table.column("positions").to_pylist()), "missing": missing}
    state = "already sealed" if cache.sealed else "sealed"
    text = f"{name}: {state}, {report['shards']:,} shards, {report['positions']:,} positions"
    return Outcome(report, printable(text), 0, warning if missing else "")


def train(command: Train) -> Outcome:
    """Train the student. Status 75: work remains."""
    return _stoppable(partial(_trained, command), f"{command.out}: stopped. Run the same command again to resume.")


def _trained(command: Train, stop: Stop) -> Outcome:
    from ..train.api import train as run
    from ..train.result import report_of
    from ..utils.progress import mode_for

    with _work_remains(StoreError, WorkRemains):
        report = run(
            command.student,
            _store(command.cache),
            command.out,
            TrainSettings(**{f.name: getattr(command, f.name) for f in fields(TrainSettings)}),
            data=_examples(command.data),
            control=command.control,
            stop=stop,
            progress=mode_for(events=command.json),
        )
    if os.environ.get("RANK", "0") != "0":  # the report of rank 0 is enough
        return Outcome({"event": "done", "rank": os.environ["RANK"]}, "", report.status)
    return Outcome({"event": "done", **report.to_json()}, report_of(report), report.status)


def sweep(command: Sweep) -> Outcome:
    """Train the arms. Status 75: work remains."""
    return _stoppable(partial(_swept, command), f"{command.out}: stopped. Run the same command again to resume.")


def _swept(command: Sweep, stop: Stop) -> Outcome:
    from ..sweep.api import sweep as run
    from ..sweep.arms import FIELDS
    from ..sweep.result import sweep_text
    from ..utils.progress import mode_for

    shared = {f.name: getattr(command, f.name) for f in fields(TrainSettings) if f.name not in FIELDS}
    with _work_remains(StoreError, WorkRemains):
        report = run(
            command.student,
            _store(command.cache),
            command.out,
            {name: getattr(command, name) for name in FIELDS},
            TrainSettings(**shared),
            data=_examples(command.data),
            seeds=command.seeds,
            at_once=command.at_once,
            stop=stop,
            progress=mode_for(events=command.json),
        )
    return Outcome({"event": "done", **report.to_json()}, sweep_text(report), report.status)


def _examples(factory: str | None) -> Any:
    """The object that `--data` names. Its reader checks whether it fits the cache."""
    from ..utils.factories import is_factory, made_by

    if factory is None:
        return None
    if not is_factory(factory):
        raise DataError(f"--data: got {factory!r}; expected the module:factory that returns the cache's examples.")
    return made_by(factory, DataError)


def report(command: Report) -> Outcome:
    """Write the report page."""
    from ..report.make import make_report

    found = make_report(command.runs, command.out, pngs=command.png)
    return Outcome(found, printable(", ".join(found["files"])))


def bench(command: Bench) -> Outcome:
    """Run the benchmarks."""
    from ..bench.command import bench as run

    text, status = run(command)
    return Outcome({}, text, status)


def demo(command: Demo) -> Outcome:
    """Run the demo, or the missing parts of it. Status 75: work remains."""
    return _stoppable(partial(_demo, command), "stopped. Run the same command again to resume.")


def _demo(command: Demo, stop: Stop) -> Outcome:
    from ..demo import run_demo

    check_demo_place(command.out)
    return Outcome(*run_demo(command, stop))


def completion(command: Completion) -> Outcome:
    """Print the completion script."""
    return Outcome({}, completion_script(command.shell))


def _stoppable(run: Callable[[Stop], Outcome], stopped: str) -> Outcome:
    """Run a long command. Status 75 if a signal stops it before its job begins (with the text `stopped`), or if a
    recoverable error interrupts it (see `_work_remains`)."""
    try:
        with stopping() as stop:
            return run(stop)
    except Stopped:
        text = stopped
    except _Recoverable as recoverable:
        text = str(recoverable)
    return Outcome({"event": "stopped", "text": text}, "", WORK_REMAINS, text)


class _Recoverable(Exception):
    """A recoverable error: the same command can be run again. Its text contains no credentials."""


@contextmanager
def _work_remains(*errors: type[Exception], more: str = "") -> Iterator[None]:
    """Turn these errors into `_Recoverable`, except for a store that does not exist or is read-only."""
    from ..cache.credentials import redact

    try:
        yield
    except (ReadOnly, NotFound):
        raise
    except errors as error:
        raise _Recoverable(redact(f"{error}{more}")) from error


_COMMANDS: dict[type, Callable[[Any], Outcome]] = {
    Capture: capture,
    Plan: plan,
    Inspect: inspect,
    Verify: verify,
    Seal: seal,
    Train: train,
    Sweep: sweep,
    Report: report,
    Bench: bench,
    Demo: demo,
    Completion: completion,
}


class _NoStore(CacheError):
    """The argument does not name a cache store."""


def _store(place: str) -> "Store":
    from ..cache import open_store

    try:
        return open_store(place)
    except StoreError:
        raise
    except CacheError as error:
        raise _NoStore(str(error)) from error


def _failure(error: Exception, command: Any) -> Outcome:
    from ..cache.credentials import redact

    absent = isinstance(error, (NotFound, NoRun, NoSuite, _NoStore)) or isinstance(error.__cause__, NotFound)
    text = redact(in_flags(str(error), flags(command)))
    return Outcome({"error": text}, "", 2 if absent else 1, text)


def _note(text: str, *, events: bool) -> None:
    """Announce a long operation: a line on stderr, or an event."""
    if events:
        _say(json.dumps({"event": "note", "text": text}))
    else:
        _say(printable(f"fastkd: {text}"), sys.stderr)


def _at_terminal() -> bool:
    return sys.stderr.isatty()


def _say(text: str, stream: Any = None) -> None:
    """Print text. Characters that the stream cannot encode are escaped; a closed pipe is ignored."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:
        # otherwise Python's flush at exit would raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
