"""`fastkd.sweep`: one training after another, each with other settings, and their ranking. Called again, it resumes.

SWEEP/  sweep.json  sweep.png  ARM/seed=0/ (a run of `fastkd.train`)  ARM/seed=1/ ...
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch.distributed as dist

from ..data.examples import Examples, as_examples
from ..errors import TrainError
from ..settings import TrainSettings
from ..settings_changes import TrainChanges, changed
from ..train.api import DEFAULTS, train
from ..train.batch import with_batch
from ..train.begun import begun_with
from ..train.cards import write_cards
from ..train.inputs import inputs_of
from ..train.result import TrainReport, describe_cache
from ..train.settings_check import check_best
from ..train.student import check_source, make_student
from ..train.trainer import Diverged
from ..train.watch import Watch, check_watch
from ..utils.atomic import lock, write_json, writing
from ..utils.output_guard import check_folder
from ..utils.progress import Mode, naming, notes_only
from ..utils.signals import Stop
from .arms import Arm, is_hard, make_arms
from .plot import plotted
from .result import FAILED, SWEEP, SweepReport, check_finished, make_report, read_result


@dataclass(frozen=True)
class Training:
    """A training of a sweep. name: of its arm and its seed, for messages. settings: its own. watch: makes what it is
    watched beside, when it begins."""

    name: str
    folder: Path
    settings: TrainSettings
    watch: Callable[[], Watch] | None = None

    def run(self, student: Any, cache: Any, data: Any, stop: Stop, progress: Mode) -> TrainReport | None:
        """Train, or resume. None if it diverged, which is then written in its folder."""
        watch = None if self.watch is None else self.watch()
        try:
            with naming(self.name):
                return train(
                    student, cache, self.folder, self.settings, data=data, watch=watch, stop=stop, progress=progress
                )
        except Diverged as error:
            write_json(self.folder / FAILED, {"step": error.step, "error": str(error)})
            notes_only(progress).event("note", text=f"{self.name}: diverged; continuing with the next. {error}")
            return None


def watch_of(folders: Mapping[str, Path], weights: Sequence[float], measure: str) -> Watch:
    """A watch beside the trainings in these folders that have not diverged."""
    return Watch({n: path for n, path in folders.items() if not (path / FAILED).exists()}, weights, measure)


Runner = Callable[[Sequence[Training], Any, Any, Any, Stop, Mode], Sequence[TrainReport]]
"""Runs trainings: called with them, student, cache, data, stop and progress. Returns the reports that there are."""


def one_by_one(
    trainings: Sequence[Training], student: Any, cache: Any, data: Any, stop: Stop, progress: Mode
) -> list[TrainReport]:
    """Run trainings in this process, one after another."""
    say = notes_only(progress)
    reports = []
    for number, training in enumerate(trainings, 1):
        if stop.asked:
            break
        say.event("note", text=f"training {number} of {len(trainings)}: {training.name}")
        if (report := training.run(student, cache, data, stop, progress)) is not None:
            reports.append(report)
    return reports


def sweep(
    student: Any,
    cache: Any,
    out: str | Path,
    arms: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    settings: TrainSettings = DEFAULTS,
    *,
    data: Examples | None = None,
    seeds: int = 2,
    at_once: int | None = None,
    stop_if_worse: bool = False,
    stop: Stop | None = None,
    progress: Mode = "none",
    run: Runner = one_by_one,
    **changes: Unpack[TrainChanges],
) -> SweepReport:
    """Train a student with several settings, a few seeds each, and rank the results.

    student, cache, data, settings, changes: as for `train`; the settings are those that all arms share.
    out: the sweep's folder. Called again with the same arguments, the sweep resumes; with more arms or seeds, finished
        trainings are kept.
    arms: {"alpha": [0, 0.5], "rate": [3e-4, 1e-3]} for their grid, or a list of {setting: value}, one for each arm; of
        the settings in `arms.FIELDS`. See `make_arms`.
    seeds: trainings per arm, with seeds from `settings.seed` on: the noise that differences are compared with.
    at_once: deprecated, without effect.
    stop_if_worse: with each seed, first train hard labels alone (alpha=1), and end the training of another arm with
        this seed at an evaluation after which it is worse than they are with the same rate; see `fastkd.train.watch`.
        Called again without, such trainings are continued.
    stop: stops the sweep when called; the current training writes a checkpoint. progress: "none", "bar", "lines",
        "events", or a function that is called with each event.
    run: runs the trainings that are not finished; see `Runner`.

    An arm that diverges is left as it is, and the sweep continues with the next one.
    Returns the report; its `status` is 75 if work remains. Raises TrainError for arms or settings that are not
    possible, under torchrun, and if all arms diverge; otherwise what `train` raises.
    """
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise TrainError(f"seeds: got {seeds!r}; expected an integer from 1 on.")
    if at_once is not None:
        warnings.warn("at_once has no effect: arms are trained one after another", DeprecationWarning, stacklevel=2)
    settings, out, stop = changed("sweep", settings, changes), Path(out), stop or Stop()
    check_alone()
    data = as_examples(data)
    check_folder(out, "sweep")
    inputs = inputs_of(cache, data)
    if inputs.spec is None:
        raise TrainError("cache: got a batch source; expected a cache, or a mixture of caches.")
    chosen, notes = make_arms(arms, settings, inputs.spec)
    check_best(settings)
    check_source(student, settings)
    probe = make_student(student, inputs.spec, settings, data).student
    identity = {"name": probe.name, "parameters": probe.parameters_and_bytes[0]}
    notes += [f"student: {note}" for note in probe.notes]
    del probe
    measured = inputs.evaluator(settings) is not None
    controls = controls_of(chosen, settings, measured=measured) if stop_if_worse else {}
    with writing(out), ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        stack.callback(os.close, lock(out))
        say = notes_only(progress)
        for note in notes:
            say.event("note", text=note)
        numbers = range(settings.seed, settings.seed + seeds)
        begun = begun_with([out / arm.name / f"seed={seed}" for seed in numbers for arm in chosen])
        settings = with_batch(settings, inputs.size(settings), begun)
        order = sorted(chosen, key=lambda arm: arm in controls)  # those that others are compared with come first
        runs = [(arm, seed, out / arm.name / f"seed={seed}") for seed in numbers for arm in order]
        todo: list[Training] = []
        for arm, seed, folder in runs:
            own, done = arm.of(settings, seed), read_result(folder)
            if done is not None and done.stopped and arm not in controls:
                done = None  # it goes on
            if done is not None and not done.failed:
                check_finished(folder, done, own, identity, [describe_cache(c) for c in inputs.caches])
                write_cards(folder, text=data is None)  # it may have ended before its own
            if done is None or not (done.failed or done.evaluations or not measured):
                control, watch = controls.get(arm), None
                if stop_if_worse:
                    folders = {} if control is None else {control.name: out / control.name / f"seed={seed}"}
                    watch = partial(watch_of, folders, inputs.weights, settings.best)
                todo.append(Training(f"{arm.name}, seed {seed}", folder, own, watch))
        reports = run(todo, student, cache, data, stop, progress) if todo and not stop.asked else []
        results = {(arm, seed): read_result(folder) for arm, seed, folder in runs}
        report = make_report(out, chosen, list(numbers), results, inputs.weights, measure=settings.best, notes=notes)
        seconds = sum(one.seconds for one in reports)
        waiting = sum(one.seconds * one.waiting for one in reports) / seconds if seconds else 0.0
        report = replace(report, trainings=len(reports), seconds=seconds, waiting=waiting)
        report = plotted(report) if report.complete else report
        shares = {"weights": list(inputs.weights)} if len(inputs.weights) > 1 else {}  # of a mixture's caches
        write_json(out / SWEEP, report.to_json() | {"settings": asdict(settings)} | shares)
        return report


def controls_of(arms: Sequence[Arm], settings: TrainSettings, *, measured: bool) -> dict[Arm, Arm]:
    """For each arm with a soft loss, the arm of hard labels alone with the same rate. Raises TrainError if it is not
    there, and if arms cannot be compared. measured: whether they are evaluated."""
    check_watch(control=True, by_window=measured, measure=settings.best)
    own = {arm: arm.of(settings, settings.seed) for arm in arms}
    hard = {one.rate: arm for arm, one in own.items() if is_hard(one)}
    found = {}
    for arm, one in own.items():
        if is_hard(one):
            continue
        if one.rate not in hard:
            raise TrainError(
                f"stop_if_worse: got no arm of hard labels alone with rate {one.rate:g}; expected one, which "
                f"{arm.name} is compared with. Add alpha=1."
            )
        found[arm] = hard[one.rate]
    return found


def check_alone() -> None:
    """Raise TrainError under torchrun, or in a process group of several."""
    if (count := dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise TrainError(
            f"sweep: got {count} processes; expected one. Give each process its own arms and its own folder, without "
            "torchrun, or train the arms one by one with fastkd train."
        )
