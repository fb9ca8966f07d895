"""`fastkd.integrations.ray.sweep`: the trainings of `fastkd.sweep` as trials of Ray Tune, as many at once as fit.

All trials read the same cache. Their runs, the ranking, sweep.json and the plot are those of `fastkd.sweep`.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from ...data.examples import Examples
from ...errors import ClusterError, TrainError
from ...evaluate.measures import sign_of
from ...settings import TrainSettings
from ...settings_changes import TrainChanges
from ...sweep.api import Training
from ...sweep.api import sweep as sweep_here
from ...sweep.result import FAILED, STOPPED, SweepReport, read_result
from ...train.api import DEFAULTS
from ...train.result import TrainReport
from ...utils.atomic import remove_folder, write_json
from ...utils.progress import Mode, notes_only
from ...utils.signals import Stop
from .board import listening, make_board, stoppable
from .cluster import connected, enter_folder, resources_of


class SweepOptions(TrainChanges, total=False):
    """Other arguments of `fastkd.sweep`."""

    data: Examples | None
    seeds: int
    at_once: int | None
    stop_if_worse: bool


FOLDER = ".ray"  # of Ray's own files, in the sweep's, while it runs
REDUCTION = 2  # of ASHA: the part of the trials that goes on at a rung is 1/2


def sweep(
    student: Any,
    cache: Any,
    out: str | Path,
    arms: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    settings: TrainSettings = DEFAULTS,
    *,
    asha: bool = False,
    gpus_per_worker: float | None = None,
    cpus_per_worker: float = 1.0,
    failures: int = 3,
    stop: Stop | None = None,
    progress: Mode = "none",
    **options: Unpack[SweepOptions],
) -> SweepReport:
    """Train a student with several settings on a Ray cluster, and rank the results. Called again, it resumes.

    student, cache, out, arms, settings, options: as for `fastkd.sweep`; the cache is a name that every machine can
        open, out a folder that all machines share.
    asha: stop trainings early that are behind the others, by the measure `best`: after 1, 2, 4, ... evaluations the
        better half continues (asynchronous successive halving, Li et al., MLSys 2020).
    gpus_per_worker, cpus_per_worker: reserved for each training. None: one GPU if the cluster has any.
    failures: how often a training is resumed after the loss of its process.

    Returns and raises what `fastkd.sweep` does; ClusterError without Ray or a cluster.
    """
    if options.get("stop_if_worse"):
        raise ClusterError("stop_if_worse on Ray: it needs hard labels to be trained first. Use asha instead.")
    run = partial(_run, out=Path(out).absolute(), asha=asha, gpus=gpus_per_worker, cpus=cpus_per_worker, tries=failures)
    return sweep_here(
        student, cache, Path(out).absolute(), arms, settings, stop=stop, progress=progress, run=run, **options
    )


def _run(
    trainings: Sequence[Training],
    student: Any,
    cache: Any,
    data: Any,
    stop: Stop,
    progress: Mode,
    *,
    out: Path,
    asha: bool,
    gpus: float | None,
    cpus: float,
    tries: int,
) -> list[TrainReport]:
    """Run trainings as trials: a `Runner` of a sweep."""
    with connected() as ray:
        from ray import tune

        os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ours asks the trials to write checkpoints
        each, board = resources_of(ray, cpus, gpus), make_board(ray)
        measure = trainings[0].settings.best
        scheduler = None
        if asha:
            scheduler = tune.schedulers.ASHAScheduler(
                time_attr="training_iteration", grace_period=1, reduction_factor=REDUCTION, max_t=1 << 20
            )
        work = tune.with_parameters(
            _trial, trainings=trainings, given=(student, cache, data), board=board, folder=os.getcwd()
        )
        tuner = tune.Tuner(
            tune.with_resources(work, {"cpu": each.cpus, "gpu": each.gpus}),
            param_space={"number": tune.grid_search(list(range(len(trainings))))},
            tune_config=tune.TuneConfig(
                metric=measure, mode="min" if sign_of(measure) > 0 else "max", scheduler=scheduler
            ),
            run_config=tune.RunConfig(
                name=FOLDER, storage_path=str(out), failure_config=tune.FailureConfig(max_failures=tries), verbose=0
            ),
        )
        say = notes_only(progress)
        with listening(ray, board, stop, say), redirect_stdout(sys.stderr):  # stdout is for the report
            found = tuner.fit()
        _, errors = ray.get(board.ends.remote())
        ray.kill(board)
        remove_folder(out / FOLDER)
        if errors:
            raise errors[0]
        if found.errors and not stop.asked:
            raise ClusterError(f"{out}: a training failed {tries + 1} times: {found.errors[0]}")
        steps = {one.config["number"]: (one.metrics or {}).get("step") for one in found}
        return [report for n, one in enumerate(trainings) if (report := _outcome(one, steps.get(n), stop)) is not None]


def _outcome(training: Training, step: int | None, stop: Stop) -> TrainReport | None:
    """The report of a training; None if it diverged, or is not finished. One that the scheduler stopped is marked."""
    done = read_result(training.folder)
    if done is None and step is not None and not stop.asked:
        text = f"{STOPPED}, after step {step}: behind the others at that step"
        write_json(training.folder / FAILED, {"step": step, "error": text})
    if done is None or done.failed:
        return None
    known = {f.name for f in fields(TrainReport)} - {"control", "without_features", "verdicts", "stopped_worse"}
    return TrainReport(**{name: value for name, value in done.run["report"].items() if name in known})


def _trial(
    config: Mapping[str, Any], *, trainings: Sequence[Training], given: tuple[Any, Any, Any], board: Any, folder: str
) -> None:
    """What a trial does: one training, whose evaluations it reports to Tune."""
    import ray
    from ray import tune

    enter_folder(folder)
    training = trainings[config["number"]]
    measure = training.settings.best

    def listen(event: Mapping[str, Any]) -> None:
        if event["event"] in ("note", "training"):
            board.note.remote(f"{training.name}: {event['text']}")
        elif event["event"] == "evaluation":
            tune.report({measure: event["measures"][measure], "step": event["step"]})

    with stoppable(ray, board) as stop:
        if stop.asked:
            return
        try:
            training.run(*given, stop, listen)
        except TrainError as error:
            ray.get(board.error.remote(error))
