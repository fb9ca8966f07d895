"""The command line: one function for each command of commands.py.

Exit status 0: success. 1: a problem was found and reported. 2: wrong usage, or no such cache or run. 75: work remains,
and running the same command again resumes. Heavy imports happen inside the commands.
"""

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..cache.errors import CacheError, NotFound, StoreError
from ..errors import (
    BenchError,
    ClusterError,
    DataError,
    ExportError,
    NoRun,
    NoSuite,
    ReportError,
    StreamError,
    TeacherError,
    TrainError,
    passes,
)
from ..settings import (
    CaptureSettings,
    LiveSettings,
    MutualSettings,
    RolloutSettings,
    ShareSettings,
    StudentSettings,
    TrainSettings,
)
from ..utils.atomic import disk_is_full
from ..utils.output_guard import check_folder, check_store
from ..utils.secrets import masked
from ..utils.signals import INTERRUPTED, WORK_REMAINS, Stop, Stopped, stopping
from ..utils.similar import similar_path
from ..utils.text import printable, shortened
from .cache_commands import export_cache, features, inspect, mix_targets, seal, verify
from .commands import (
    Bench,
    Capture,
    Completion,
    Demo,
    DeployReport,
    Doctor,
    Export,
    ExportCache,
    Features,
    Generations,
    Inspect,
    Match,
    MixTargets,
    Mutual,
    Plan,
    Report,
    Seal,
    Student,
    Sweep,
    Train,
    Verify,
)
from .config import config_text
from .deploy_commands import deploy_report, export
from .flags import flags, in_flags
from .options import options_of
from .outcome import NoStore, Outcome, say, settings_of, shows_progress, store_of
from .parse import Parsed, completion_script, parsed
from .run_config import leave_config

_ERRORS = (
    BenchError, CacheError, ClusterError, DataError, ExportError, OSError, ReportError, StreamError, TeacherError,
    TrainError,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        say(f"fastkd {__version__}")
        return 0
    given: Parsed | None = None
    try:
        given = parsed(args)
        if given.print_config:
            say(config_text(given.name, given.command).rstrip("\n"))
            return 0
        outcome = _run(given)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    except KeyboardInterrupt:
        say(printable(f"fastkd: {_interrupted(None if given is None else given.command)}"), sys.stderr)
        return INTERRUPTED
    except Exception as error:
        outcome = _unexpected(error, given.name if given is not None else "")
    if outcome.warning:
        say(printable(f"fastkd: {outcome.warning}"), sys.stderr)
    if given is not None and given.command.json is True:
        say(json.dumps(masked(outcome.report), allow_nan=False))
    elif outcome.text:
        say(outcome.text)
    return outcome.status


def _run(given: Parsed) -> Outcome:
    """Run a command. Its own errors are outcomes."""
    command = given.command
    try:
        if getattr(command, "dry_run", False):
            stopped = _stopped(f"the dry run of {given.name} was stopped. Nothing was written: run it again.")
            with stopping(*_at_end(stopped, events=command.json)):
                return _DRY_RUNS[type(command)](command)
        if (long := _LONG.get(type(command))) is None:
            return _COMMANDS[type(command)](command)
        stopped = _stopped(masked(f"{command.out}: stopped. Run the same command again to resume."))
        with stopping(*_at_end(stopped, events=command.json)) as stop:
            outcome = long(command, stop)
        leave_config(given.name, command)
        return outcome
    except _ERRORS as error:
        return _failure(error, given)
    except Stopped:
        return stopped


def capture(command: Capture, stop: Stop) -> Outcome:
    """Fill the cache. Status 75: work remains."""
    from ..cache import open_store
    from ..capture.window_plan import check_settings
    from ..utils.progress import mode_for

    settings = settings_of(CaptureSettings, command)
    check_settings(settings, threads=command.threads)
    try:
        store = open_store(command.out, create=True)
        check_store(store)
    except StoreError as error:
        raise CacheError(str(error)) from error  # once the work has begun, the same error is one to try again after
    if command.ray:
        return _on_ray(command, stop)
    if command.workers is not None or command.gpus_per_worker is not None or command.cpus_per_worker != 1.0:
        raise ClusterError("--workers, --gpus-per-worker and --cpus-per-worker: they need --ray.")
    from ..capture.answers import check_limits
    from ..capture.api import capture as run
    from ..capture.existing import check_continues
    from ..capture.runner import capture_text
    from ..teachers.load import load
    from ..teachers.tensor_parallel import heeding_others

    def before(source: Any) -> None:
        check_continues(store, settings, source, teacher=command.teacher, model=command, data=command)
        _note(f"loading {command.teacher}", events=command.json)

    with heeding_others(command.teacher_parallel):
        loaded = load(
            command.teacher,
            command,
            command,
            rank=command.rank,
            world_size=command.world_size,
            parallel=command.teacher_parallel,
            progress=shows_progress(json=command.json),
            before=before,
            check=lambda teacher: check_limits(teacher, settings, store),
        )
        report = run(
            loaded.teacher,
            loaded.data,
            store,
            settings,
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


def _on_ray(command: Capture, stop: Stop) -> Outcome:
    """Fill the cache by the workers of a Ray cluster."""
    from ..integrations.ray.capture_driver import run_work
    from ..integrations.ray.capture_report import ray_capture_text
    from ..integrations.ray.capture_worker import Work, load_named
    from ..utils.progress import mode_for

    if command.rank is not None or command.world_size is not None or command.teacher_parallel != 1:
        raise ClusterError(
            "ray: got --rank, --world-size or --teacher-parallel; expected none of them, as Ray places the workers."
        )
    notes = f"teacher {command.teacher}"
    work = Work(
        partial(load_named, command), command.out, settings_of(CaptureSettings, command),
        {"threads": command.threads, "notes": notes}, os.getcwd(),
    )  # fmt: skip
    report = run_work(
        work, workers=command.workers, gpus_per_worker=command.gpus_per_worker,
        cpus_per_worker=command.cpus_per_worker, stop=stop, progress=mode_for(events=command.json),
    )  # fmt: skip
    return Outcome({"event": "done", **report.to_json()}, ray_capture_text(report), report.status)


def plan(command: Plan) -> Outcome:
    from ..capture.window_plan import check_settings

    settings = settings_of(CaptureSettings, command)
    check_settings(settings)
    from ..capture.answers import check_limits, large_k_text
    from ..capture.estimate import estimate, estimate_text
    from ..kernels import prepare_topk
    from ..teachers.load import load

    loaded = load(
        command.teacher, command, command, rank=0, world_size=1, progress=shows_progress(json=command.json),
        before=lambda source: _note(f"loading {command.teacher}", events=False),
        check=lambda teacher: check_limits(teacher, settings),
    )  # fmt: skip
    assert loaded.data is not None
    prepared = prepare_topk(loaded.teacher.device)
    _note(
        f"measuring the data, then running a sample for {command.seconds:g} s, or one batch if it takes longer",
        events=False,
    )
    report = estimate(
        loaded.teacher,
        loaded.data,
        settings,
        seconds=command.seconds,
        price_per_hour=command.price_per_hour,
        workers=1 if command.workers is None else command.workers,
        progress=shows_progress(json=command.json),
    )
    notes = [*getattr(loaded.teacher, "notes", []), *report.data[1:]]
    notes += large_k_text(command.k, command.draws, loaded.teacher.vocab_size) + ([prepared] if prepared else [])
    return Outcome(report.to_json(), estimate_text(report), 0, "; ".join(notes))


def match(command: Match) -> Outcome:
    from ..cache import open_cache
    from ..train.match import match as run

    settings = TrainSettings(**{name: getattr(command, name) for name in _OF_MATCH})
    found = run(
        command.student, open_cache(store_of(command.cache)), features=command.features, positions=command.positions,
        data=_examples(command.data), teacher=command.teacher, init=command.init, match=command.match,
        settings=settings,
    )  # fmt: skip
    return Outcome(found.to_json(), found.text, 0, "; ".join(found.notes))


def student(command: Student) -> Outcome:
    from ..students.api import student as run
    from ..utils.progress import mode_for

    settings = settings_of(StudentSettings, command)
    cache = None if command.cache is None else store_of(command.cache)
    found = run(command.teacher, command.out, settings, cache=cache, progress=mode_for(events=command.json))
    return Outcome({"event": "done", **found.to_json()}, found.text, 0, "; ".join(found.notes))


def train(command: Train, stop: Stop) -> Outcome:
    """Train the student. Status 75: work remains."""
    from ..train.api import train as run
    from ..train.result import report_of
    from ..utils.progress import mode_for

    if command.train_teacher:
        return _with_teacher(command, stop)
    settings = settings_of(TrainSettings, command)
    report = run(
        command.student,
        _training_cache(command),
        command.out,
        settings,
        stop_if_worse=command.stop_if_worse,
        stop=stop,
        progress=mode_for(events=command.json),
        **_training(command),
    )
    if os.environ.get("RANK", "0") != "0":  # the report of rank 0 is enough
        return Outcome({"event": "done", "rank": os.environ["RANK"]}, "", report.status)
    done = {"event": "done", **report.to_json()}
    return Outcome(done, report_of(report), report.status, in_flags(report.push_failed or "", flags("train")))


def _train_dry_run(command: Train) -> Outcome:
    """What the training would take."""
    from ..train.api import TrainCall
    from ..train.dry_run import dry_run, dry_run_text

    if command.train_teacher:
        raise TrainError("dry_run: got it with train_teacher; expected one student. Leave one of them out.")
    loading = f"loading {command.student}, then running at least two micro-batches of the first step"
    settings = settings_of(TrainSettings, command)
    call = TrainCall(command.student, _training_cache(command), Path(command.out), settings, **_training(command))
    found = dry_run(call, begin=partial(_note, loading, events=False))
    return Outcome(found.to_json(), dry_run_text(found))


def _training(command: Train) -> dict[str, Any]:
    """The arguments that a training and its dry run share."""
    return {
        "teacher": command.teacher, "data": _training_data(command), "live": settings_of(LiveSettings, command),
        "write_cache": command.write_cache, "rollouts": settings_of(RolloutSettings, command),
        "control": command.control, "share": settings_of(ShareSettings, command),
    }  # fmt: skip


def _capture_dry_run(command: Capture) -> Outcome:
    """What `fastkd plan` says of the capture, once its output is known to be possible."""
    from ..capture.existing import check_continues, store_there
    from ..teachers.load import open_data

    if (store := store_there(command.out)) is not None:
        source = open_data(command.data, command.column, command.text_documents)
        check_continues(
            store, settings_of(CaptureSettings, command), source, teacher=command.teacher, model=command, data=command
        )
    same = {f.name for f in fields(Plan)} & {f.name for f in fields(Capture)}
    return plan(Plan(**{name: getattr(command, name) for name in same}))


def _training_cache(command: Train | Mutual | Sweep) -> Any:
    """The cache of a training, or the folder of a run's rollouts, which has several; or a mixture; None for no cache.
    On Ray, names, which each trial opens."""
    from ..live.rounds import SETTINGS

    places, weights = command.cache, command.cache_weights
    if weights and len(weights) != len(places):
        raise TrainError(f"cache_weights: got {len(weights)} for {len(places)} caches; expected one for each.")
    if len(places) == 1 and isinstance(command, Train) and Path(places[0], SETTINGS).is_file():
        return places[0]
    named = isinstance(command, Sweep) and command.ray
    stores = [place if named else store_of(place) for place in places]
    if len(stores) > 1:
        return list(zip(stores, weights, strict=True)) if weights else stores
    return stores[0] if stores else None


def mutual(command: Mutual, stop: Stop) -> Outcome:
    """Train the students. Status 75: work remains."""
    if len(command.student) < 2:
        raise TrainError(f"student: got {', '.join(command.student) or 'none'}; expected two or more.")
    online = settings_of(MutualSettings, command)
    return _together(command, command.student, online, stop, teacher=command.teacher)


def _with_teacher(command: Train, stop: Stop) -> Outcome:
    """Train the student and its teacher."""
    from ..train.mutual import check_trained_teacher, named
    from ..train.unused import check_rollouts_used

    check_trained_teacher(command.teacher, command.cache or None, command.write_cache, command.rollouts)
    check_rollouts_used(settings_of(RolloutSettings, command))
    if command.push or command.push_private or command.card_teacher:
        raise TrainError("push, card_teacher: got one with train_teacher; expected one student that is trained.")
    online = MutualSettings(**{f.name: getattr(command, f.name) for f in fields(LiveSettings)})
    models = named([command.teacher, command.student])
    big, small = models
    return _together(command, models, online, stop, learns={big: (), small: (big,)})


def _together(command: Train | Mutual, students: Any, online: MutualSettings, stop: Stop, **more: Any) -> Outcome:
    from ..train.mutual import mutual as run
    from ..utils.progress import mode_for

    settings = settings_of(TrainSettings, command)
    report = run(
        students,
        _training_cache(command),
        command.out,
        settings,
        online,
        data=_training_data(command),
        control=command.control,
        stop_if_worse=command.stop_if_worse,
        stop=stop,
        progress=mode_for(events=command.json),
        **more,
    )
    if os.environ.get("RANK", "0") != "0":
        return Outcome({"event": "done", "rank": os.environ["RANK"]}, "", report.status)
    return Outcome({"event": "done", **report.to_json()}, report.text, report.status)


def _training_data(command: Train | Mutual) -> Any:
    """The object that `--data` names: of a cache of examples, or the data of a training without a cache."""
    from ..teachers.load import open_data

    if command.cache and len(command.data) < 2:
        return _examples(command.data[0] if command.data else None)
    return open_data(command.data, command.column, command.text_documents) if command.data else None


def sweep(command: Sweep, stop: Stop) -> Outcome:
    """Train the arms. Status 75: work remains."""
    from ..sweep.api import sweep as run
    from ..sweep.arms import FIELDS
    from ..sweep.result import sweep_text
    from ..utils.progress import mode_for

    if not command.ray and (command.asha or command.gpus_per_worker is not None or command.cpus_per_worker != 1.0):
        raise ClusterError("--asha, --gpus-per-worker and --cpus-per-worker: they need --ray.")
    arms = {name: getattr(command, name) for name in FIELDS}
    settings = {f.name: getattr(command, f.name) for f in fields(TrainSettings) if f.name not in FIELDS}
    if command.auto and command.stop_if_worse:
        raise TrainError("stop_if_worse: got it with auto, whose rungs end arms already. Leave one of them out.")
    if command.stop_if_worse and command.ray:
        raise ClusterError("--stop-if-worse with --ray: it needs hard labels to be trained first. Use --asha instead.")
    if command.auto and command.ray:
        raise ClusterError("--auto with --ray: its arms go on by turns. Use --asha, or leave out one of them.")
    if command.auto:
        from ..sweep.auto import auto_sweep
        from ..sweep.auto_result import auto_text

        found = auto_sweep(
            command.student, _training_cache(command), command.out, {n: v for n, v in arms.items() if v},
            TrainSettings(**settings), data_name=command.data, stop=stop, data=_examples(command.data),
            progress=mode_for(events=command.json),
        )  # fmt: skip
        return Outcome({"event": "done", **found.to_json()}, auto_text(found), found.status)
    cache = _training_cache(command)
    if command.ray:
        from ..integrations.ray.tuning import sweep as run_trials

        run = partial(
            run_trials, asha=command.asha, gpus_per_worker=command.gpus_per_worker,
            cpus_per_worker=command.cpus_per_worker,
        )  # fmt: skip
    report = run(
        command.student, cache, command.out, arms, TrainSettings(**settings), seeds=command.seeds,
        at_once=command.at_once, stop_if_worse=command.stop_if_worse, stop=stop, data=_examples(command.data),
        progress=mode_for(events=command.json),
    )  # fmt: skip
    return Outcome({"event": "done", **report.to_json()}, sweep_text(report), report.status)


def generations(command: Generations, stop: Stop) -> Outcome:
    """Capture and train generation after generation. Status 75: work remains."""
    from ..generations.api import generations as run
    from ..generations.result import generations_text
    from ..teachers.load import open_data
    from ..utils.progress import mode_for

    settings = settings_of(TrainSettings, command)
    live = settings_of(LiveSettings, command)
    report = run(
        command.generations, command.student, command.teacher,
        open_data(command.data, command.column, command.text_documents), command.out, settings, live,
        control=command.control, ensemble=command.ensemble, stop=stop, progress=mode_for(events=command.json),
    )  # fmt: skip
    return Outcome({"event": "done", **report.to_json()}, generations_text(report), report.status)


def _examples(name: str | None) -> Any:
    """The object that `--data` names; its reader checks whether it fits the cache."""
    from ..data.examples import as_examples
    from ..utils.factories import is_factory, made_by

    if name is not None and not is_factory(name):
        raise DataError(f"--data: got {name!r}; expected the module:factory that returns the cache's examples.")
    return None if name is None else as_examples(made_by(name, DataError))


def report(command: Report) -> Outcome:
    from ..report.make import make_report

    found = make_report(command.runs, command.out, pngs=command.png, fetch=command.fetch)
    return Outcome(found, printable(", ".join(found["files"])))


def bench(command: Bench) -> Outcome:
    from ..bench.command import bench as run

    text, status = run(command)
    return Outcome({}, text, status)


def doctor(command: Doctor) -> Outcome:
    """Look at everything. Status 1: there is a problem."""
    from ..doctor.api import doctor as run

    found = run(command.place)
    return Outcome(found.to_json(), str(found), found.status)


def demo(command: Demo, stop: Stop) -> Outcome:
    """Run the demo, or the missing parts of it. Status 75: work remains."""
    from ..demo import run_demo

    check_folder(command.out, "demo")
    return Outcome(*run_demo(command, stop))


def completion(command: Completion) -> Outcome:
    return Outcome({}, completion_script(command.shell))


def _stopped(text: str) -> Outcome:
    return Outcome({"event": "stopped", "text": text}, "", WORK_REMAINS, text)


def _at_end(stopped: Outcome, *, events: bool) -> tuple[str, str]:
    """What a signal's handler prints on stdout and stderr before it ends the process; see `stopping`."""
    return json.dumps(stopped.report) + "\n" if events else "", printable(f"fastkd: {stopped.warning}") + "\n"


# settings of a training that the command match has too
_OF_MATCH = ("seed", "device", "allow_partial", "allow_other_tokenizer", "trust_remote_code")
_LONG: dict[type, Callable[[Any, Stop], Outcome]] = {
    Capture: capture,
    Train: train,
    Mutual: mutual,
    Sweep: sweep,
    Generations: generations,
    MixTargets: mix_targets,
    ExportCache: export_cache,
    Demo: demo,
}
_DRY_RUNS: dict[type, Callable[[Any], Outcome]] = {Capture: _capture_dry_run, Train: _train_dry_run}
_COMMANDS: dict[type, Callable[[Any], Outcome]] = {
    Doctor: doctor,
    Plan: plan,
    Inspect: inspect,
    Verify: verify,
    Seal: seal,
    Features: features,
    Match: match,
    Student: student,
    Export: export,
    DeployReport: deploy_report,
    Report: report,
    Bench: bench,
    Completion: completion,
}


def _failure(error: Exception, given: Parsed) -> Outcome:
    command = given.command
    absent = isinstance(error, (NotFound, NoRun, NoSuite, NoStore)) or isinstance(error.__cause__, NotFound)
    text = shortened(masked(in_flags(str(error), flags(given.name, given.typed)))) + _meant(str(error), given)
    if passes(error) and type(command) in _LONG:
        kept = " Committed shards are kept: run the same command again to resume."
        return _stopped(text + kept * isinstance(command, Capture))
    if disk_is_full(error):
        return _stopped(text if " again" in text else f"{text} Free some space and run the same command again.")
    return Outcome({"error": text}, "", 2 if absent else 1, text)


def _meant(text: str, given: Parsed) -> str:
    """The question whether another path was meant, for the first one in an error that does not exist beside one like
    it."""
    for option in options_of(given.name):
        value = getattr(given.command, option.name)
        if option.choices or value == option.default:  # a word that is not typed, or one of few, is no path
            continue
        for place in value if isinstance(value, tuple) else (value,):
            word = os.fspath(place) if isinstance(place, (str, Path)) else ""
            if word and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text):
                beside = similar_path(word)
                if beside is not None and "Did you mean" not in text:
                    return str(masked(f" Did you mean {beside}?"))
    return ""


def _unexpected(error: Exception, name: str) -> Outcome:
    """One sentence about an error that nobody expected; its traceback if FASTKD_TRACEBACK is set."""
    trace = os.environ.get("FASTKD_TRACEBACK", "") not in ("", "0")
    if trace:
        say("".join(traceback.format_exception(error)).rstrip("\n"), sys.stderr)
    command = f"fastkd {name}".rstrip()
    said = " ".join(str(error).split()).rstrip(".")
    text = f"`{command}` failed unexpectedly: {type(error).__name__}" + (f": {said}" if said else "") + "."
    more = " This is a fault in fastkd." if trace else " FASTKD_TRACEBACK=1 shows the traceback."
    text = shortened(masked(text)) + more
    return Outcome({"error": text}, "", 1, text)


def _interrupted(command: Any) -> str:
    """The message for a command that was interrupted immediately."""
    if type(command) in _LONG and not getattr(command, "dry_run", False):
        return f"{command.out}: interrupted. What was finished is kept: run the same command again to resume."
    if isinstance(command, (Student, Export, DeployReport, Report)) and command.out is not None:
        return f"interrupted; {command.out} was not written"  # each is written at the end, and whole
    return "interrupted"


def _note(text: str, *, events: bool) -> None:
    """Announce a long operation: a line on stderr, or an event."""
    if events:
        say(json.dumps({"event": "note", "text": masked(text)}))
    else:
        say(printable(f"fastkd: {text}"), sys.stderr)
