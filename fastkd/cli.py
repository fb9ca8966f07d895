"""The command line: a frozen dataclass for each command, and one function that each of them calls.

Exit status: 0; 1 where there is a problem (and it is said which); 2 where the command itself is wrong, or there is no
cache; 75 where work remains, and the same command goes on with it. Nothing heavy is imported before a command needs it.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from . import __version__
from .cache.errors import CacheError, NotFound, ReadOnly, StoreError
from .errors import DataError, StreamError, TeacherError, TrainError, WorkRemains
from .report_text import printable, ranges, report_text, size_text
from .settings import CaptureSettings, DataSettings, DemoSettings, TeacherSettings, TrainSettings

if TYPE_CHECKING:
    from .cache.stores import Store

Place = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


@dataclass(frozen=True)
class Inspect:
    """Say what a cache holds: from whom, how much, at what cost, and what is missing."""

    cache: Place
    """A folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// of a sealed cache)."""
    json: Flag = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Verify:
    """Read every shard, compare its bytes with their hashes, and name each that is bad."""

    cache: Place
    """A folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// of a sealed cache)."""
    deep: Flag = False
    """Decode every array as well, and compare the contents."""
    json: Flag = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Seal:
    """Write the manifest of a finished cache: it opens with two requests from then on, and takes no more shards."""

    cache: Place
    """A folder, or a URL (s3://, gs://, az://)."""
    json: Flag = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class Capture(CaptureSettings, DataSettings, TeacherSettings):
    """Run a teacher once over a dataset, and keep what it says. The same command again goes on where it stopped.

    Exit status 0: the cache is complete. 75: work remains (after SIGTERM, or with a full disk): requeue it.
    """

    out: str
    """The cache: a folder, or a URL (s3://, gs://, az://)."""
    rank: int | None = None
    """Which of several workers this is, from 0. None: torchrun's or SLURM's variables say so, else there is one."""
    world_size: int | None = None
    """How many workers there are. Any of them takes over what others leave undone."""
    teacher_parallel: int = 1
    """So many ranks make up one worker: for a teacher larger than one device."""
    threads: int = 1
    """Threads that encode and write."""
    json: Flag = False
    """Print events, one JSON object a line, instead of a bar; the last one is the report."""


@dataclass(frozen=True, kw_only=True)
class Train(TrainSettings):
    """Train a student from a cache. The same command again goes on where it stopped; under torchrun, on all processes.

    Exit status 0: all steps are made. 75: work remains (after SIGTERM; there is a checkpoint): requeue it.
    """

    student: str
    """A folder or a name on the Hugging Face Hub of a causal model, a folder with a config.json and no weights (they
    are then new), or module:factory of your own (called without arguments, it returns a torch module)."""
    cache: str
    """A folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// of a sealed cache)."""
    out: Path
    """The run's folder: run.json, metrics.jsonl, checkpoints, and the student as others load it."""
    control: Flag = False
    """Afterwards train the same student on hard labels alone, in the same order, and set the two side by side."""
    json: Flag = False
    """Print events, one JSON object a line, instead of a bar; the last one is the report."""


@dataclass(frozen=True, kw_only=True)
class Sweep(TrainSettings):
    """Train several students from one read of a cache: the grid of the values given of alpha, temperature, divergence,
    treatment and rate. All other settings are shared. The same command again goes on where it stopped.

    Exit status 0: all arms are trained. 75: work remains (after SIGTERM; every arm has a checkpoint): requeue it.
    """

    student: str
    """A folder or a name on the Hugging Face Hub of a causal model, a folder with a config.json and no weights (they
    are then new), or module:factory of your own (called without arguments, it returns a new torch module each time)."""
    cache: str
    """A folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// of a sealed cache)."""
    out: Path
    """The sweep's folder: sweep.json, sweep.png, and a run's folder for each arm and seed."""
    alpha: tuple[float, ...] = ()  # type: ignore[assignment]
    """Weights of the hard labels: 0 is the teacher alone, 1 the labels alone."""
    temperature: tuple[float, ...] = ()  # type: ignore[assignment]
    """Of the soft loss; the cache says which it can serve."""
    divergence: tuple[Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"], ...] = ()  # type: ignore[assignment]
    """Of the student from the teacher."""
    treatment: tuple[Literal["auto", "bucket", "sampled", "renormalize"], ...] = ()  # type: ignore[assignment]
    """Of the teacher's mass outside the head."""
    rate: tuple[float, ...] = ()  # type: ignore[assignment]
    """The highest learning rates."""
    seeds: int = 2
    """Trainings of each arm, from `--seed` on, a read of the cache each: what differences are held against."""
    at_once: int | None = None
    """Arms in memory at once; each further pass reads the cache again. None: all of a seed's."""
    json: Flag = False
    """Print events, one JSON object a line, instead of a bar; the last one is the report."""


@dataclass(frozen=True)
class Demo(DemoSettings):
    """A real teacher's cache, and from it a student: the teacher with layers removed, healed, beside its control."""

    json: Flag = False
    """Print one JSON object instead of text."""


Command = (
    Annotated[Capture, tyro.conf.subcommand("capture")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Seal, tyro.conf.subcommand("seal")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


class Outcome(NamedTuple):
    """What a command found: as JSON, as text, as an exit status; and what a person has to know beside it."""

    report: dict[str, Any]
    text: str
    status: int = 0
    warning: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        _say(f"fastkd {__version__}")
        return 0
    try:
        command = _parse(args or ["--help"])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        outcome = _COMMANDS[type(command)](command)
    except (CacheError, DataError, StreamError, TeacherError, TrainError) as error:
        outcome = _failure(error)
    except KeyboardInterrupt:
        _say("fastkd: interrupted", sys.stderr)
        return 130
    if outcome.warning:
        _say(printable(f"fastkd: {outcome.warning}"), sys.stderr)
    if command.json:
        _say(json.dumps(outcome.report, allow_nan=False))
    elif outcome.text:
        _say(outcome.text)
    return outcome.status


def capture(command: Capture) -> Outcome:
    """Fill the cache; status 75 where work remains."""
    from .cache.stores.base import clean
    from .progress import mode_for
    from .teacher.capture import capture as run
    from .teacher.job import WORK_REMAINS
    from .teacher.load import load
    from .teacher.pipeline import Stopped
    from .teacher.signals import stopping
    from .teacher.text import capture_text

    try:
        with stopping() as stop:
            loaded = load(
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
                command.out,
                CaptureSettings(**{f.name: getattr(command, f.name) for f in fields(CaptureSettings)}),
                rank=loaded.place.worker,
                world_size=loaded.place.workers,
                group=loaded.place.group,
                threads=command.threads,
                stop=stop,
                progress=mode_for(events=command.json),
                notes=f"teacher {getattr(loaded.teacher, 'name', command.teacher)}",
            )
    except Stopped:
        text = "stopped before the first shard. The same command again goes on."
        return Outcome({"event": "stopped", "text": text}, "", WORK_REMAINS, text)
    except (ReadOnly, NotFound):
        raise
    except StoreError as error:
        text = clean(f"{error} What was committed stays: the same command goes on from there.")
        return Outcome({"event": "stopped", "text": text}, "", WORK_REMAINS, text)
    return Outcome({"event": "done", **report.to_json()}, capture_text(report), report.status)


def inspect(command: Inspect) -> Outcome:
    """Describe the cache."""
    from .cache import open_cache
    from .inspect_cache import inspect_cache

    report = inspect_cache(open_cache(_store(command.cache)), progress=_at_terminal())
    return Outcome(report, report_text(report))


def verify(command: Verify) -> Outcome:
    """Check the cache; status 1 where there is a problem."""
    from .cache import verify_cache

    store = _store(command.cache)
    found = verify_cache(store, deep=command.deep, progress=_at_terminal())
    read = f"{found.shards:,} shards, {found.positions:,} positions, {size_text(found.bytes)}"
    count = len(found.problems)
    verdict = f"{count:,} problem{'s' * (count > 1)} found" if count else "no problem found"
    lines = [str(problem) for problem in found.problems]
    if found.missing:
        lines.append(f"not there (not written yet?): shards {ranges(found.missing)}")
    lines.append(f"{store.describe()}: {verdict} ({read} {'hashed and decoded' if found.deep else 'hashed'})")
    text = "\n".join(printable(line) for line in lines)
    warning = f"only the manifest's shards were looked at. {found.unlisted}" if found.unlisted else ""
    report = {"cache": store.describe(), "ok": found.ok, **asdict(found)}
    return Outcome(report, text, 0 if found.ok else 1, warning)


def seal(command: Seal) -> Outcome:
    """Seal the cache, or say that it is; a cache without shards is refused."""
    from .cache import open_cache, open_writer
    from .cache.manifest import gaps

    cache = open_cache(_store(command.cache))
    name = cache.store.describe()
    if not cache.store.readonly and not cache.shards:
        raise CacheError(f"{name}: there are no shards yet, and a sealed cache takes none. Nothing was written.")
    with open_writer(cache.store) as writer:
        table = writer.seal(progress=_at_terminal())
    missing = gaps(table.column("shard").to_numpy())
    warning = (
        f"{name}: shards {ranges(missing)} are missing, and a sealed cache takes no more. To write them, delete "
        "manifest.parquet and seal again afterwards."
    )
    report: dict[str, Any] = {"cache": name, "already": cache.sealed, "shards": len(table)}
    report |= {"positions": sum(table.column("positions").to_pylist()), "missing": missing}
    state = "was sealed already" if cache.sealed else "sealed"
    text = f"{name}: {state}, {report['shards']:,} shards, {report['positions']:,} positions"
    return Outcome(report, printable(text), 0, warning if missing else "")


def train(command: Train) -> Outcome:
    """Train the student; status 75 where work remains."""
    from .cache.stores.base import clean
    from .progress import mode_for
    from .student.result import report_of
    from .student.train import train as run
    from .teacher.job import WORK_REMAINS
    from .teacher.pipeline import Stopped
    from .teacher.signals import stopping

    store = _store(command.cache)
    settings = TrainSettings(**{f.name: getattr(command, f.name) for f in fields(TrainSettings)})
    try:
        with stopping() as stop:
            report = run(
                command.student,
                store,
                command.out,
                settings,
                control=command.control,
                stop=stop,
                progress=mode_for(events=command.json),
            )
    except Stopped:
        text = f"{command.out}: stopped. The same command again goes on."
        return Outcome({"event": "stopped", "text": text}, "", WORK_REMAINS, text)
    except (ReadOnly, NotFound):
        raise
    except (StoreError, WorkRemains) as error:
        text = clean(str(error))
        return Outcome({"event": "stopped", "text": text}, "", WORK_REMAINS, text)
    if os.environ.get("RANK", "0") != "0":  # what one process says is enough
        return Outcome({"event": "done", "rank": os.environ["RANK"]}, "", report.status)
    return Outcome({"event": "done", **report.to_json()}, report_of(report), report.status)


def sweep(command: Sweep) -> Outcome:
    """Train the arms; status 75 where work remains."""
    from .cache.stores.base import clean
    from .progress import mode_for
    from .student.arms import FIELDS
    from .student.sweep import sweep as run
    from .student.sweep_result import sweep_text
    from .teacher.job import WORK_REMAINS
    from .teacher.pipeline import Stopped
    from .teacher.signals import stopping

    shared = {f.name: getattr(command, f.name) for f in fields(TrainSettings) if f.name not in FIELDS}
    try:
        with stopping() as stop:
            report = run(
                command.student,
                _store(command.cache),
                command.out,
                {name: getattr(command, name) for name in FIELDS},
                TrainSettings(**shared),
                seeds=command.seeds,
                at_once=command.at_once,
                stop=stop,
                progress=mode_for(events=command.json),
            )
    except Stopped:
        text = f"{command.out}: stopped. The same command again goes on."
        return Outcome({"event": "stopped", "text": text}, "", WORK_REMAINS, text)
    except (ReadOnly, NotFound):
        raise
    except (StoreError, WorkRemains) as error:
        text = clean(str(error))
        return Outcome({"event": "stopped", "text": text}, "", WORK_REMAINS, text)
    return Outcome({"event": "done", **report.to_json()}, sweep_text(report), report.status)


def demo(command: Demo) -> Outcome:
    """Run the demo, or what is missing of it."""
    from .demo import Clock, demo_text, run_demo, text_of
    from .hf import SmolLM2

    clock = Clock()
    with clock.stage("teacher", "SmolLM2-135M-Instruct, converted once"):
        teacher = SmolLM2(command.out / "teacher")
    report = run_demo(command, teacher, demo_text(), clock)
    return Outcome(report, text_of(report))


_COMMANDS: dict[type, Callable[[Any], Outcome]] = {
    Capture: capture,
    Inspect: inspect,
    Verify: verify,
    Seal: seal,
    Train: train,
    Sweep: sweep,
    Demo: demo,
}


class _NoStore(CacheError):
    """What was given names nothing that a cache could lie in."""


def _store(place: str) -> "Store":
    from .cache import open_store

    try:
        return open_store(place)
    except StoreError:
        raise
    except CacheError as error:
        raise _NoStore(str(error)) from error


def _failure(error: Exception) -> Outcome:
    from .cache.stores.base import clean

    absent = isinstance(error, (NotFound, _NoStore)) or isinstance(error.__cause__, NotFound)
    return Outcome({"error": clean(str(error))}, "", 2 if absent else 1, clean(str(error)))


def _parse(args: list[str]) -> Capture | Inspect | Verify | Seal | Train | Sweep | Demo:
    """The command. SystemExit after help, or after having said what is wrong with the arguments."""

    def parse(args: list[str], *, aloud: bool) -> Capture | Inspect | Verify | Seal | Train | Sweep | Demo:
        return tyro.cli(
            Command,
            prog="fastkd",
            description="A teacher runs once, and a cache keeps what it said: fill one, look at it, check it, seal it. "
            "`fastkd --version` says which fastkd.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
            console_outputs=aloud,
        )

    try:
        return parse(args, aloud=False)
    except SystemExit as stop:
        if stop.code:
            from .cache.stores.base import clean

            # the message quotes the arguments, and a URL among them may hold a password
            args = [clean(arg) for arg in args]
        parse(args, aloud=True)
        raise


def _at_terminal() -> bool:
    return sys.stderr.isatty()


def _say(text: str, stream: Any = None) -> None:
    """Print, as far as the stream can show the text; to nobody, where whoever read it has gone."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
