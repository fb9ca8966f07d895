"""`fastkd.train`: a student trained from a cache; called again, it goes on where it stopped.

RUN/  run.json  metrics.jsonl  checkpoints/  student/  control/ (the same again)
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..cache.reader import Cache
from ..data.examples import Examples
from ..errors import StreamError, TrainError
from ..settings import TrainSettings
from ..stream.cached import DistillLoader
from ..stream.dataset_check import check_data
from ..stream.open_caches import open_sources
from ..stream.split import open_split
from ..utils.atomic import write_text
from ..utils.distributed import ALONE, Processes, together
from ..utils.output_guard import check_run_place
from ..utils.signals import Stop
from .load_student import make_student
from .result import CONTROL, RUN, TrainReport
from .settings_check import check_settings
from .student import Student
from .trainer import Evaluate, Trainer

if TYPE_CHECKING:
    from ..evaluate.api import Evaluation

DEFAULTS = TrainSettings()
EVALUATION, EVALUATIONS = "evaluation.json", "evaluations.json"  # of one cache; a list, of a mixture


def train(
    student: Any,
    cache: Any,
    out: str | Path,
    settings: TrainSettings = DEFAULTS,
    *,
    data: Examples | None = None,
    control: bool = False,
    evaluate: Evaluate | None = None,
    stop: Stop | None = None,
    progress: str = "none",
    **changes: Any,
) -> TrainReport:
    """Train a student from a cache. Called again with the same arguments, it goes on from the last checkpoint.

    student: a folder or a name of a causal model of transformers, a config (new weights), a torch module, or a
        callable that returns one; see `make_student`. A module that is given is left as it is.
    cache: a `Cache`, what `open_cache` takes, or a mixture [(cache, weight), ...].
    data: of a cache of examples, the labelled `Examples` that it was captured from; the student is then a module that
        maps them to logits, or what returns one.
    out: the run's folder, which all processes see.
    settings, changes: a `TrainSettings`, and fields of it that differ: `train(..., rate=1e-3, alpha=0)`.
    control: afterwards train the same student on hard labels alone (alpha=1), in the same order, into out/control.
    evaluate: measures a student, every `evaluate_every` steps and at the end; None: `fastkd.evaluate.api` on the
        held-out split.
    stop: ask for a stop with `stop()`, from a signal's handler, say: a checkpoint is written.
    progress: "none", "bar", "lines" or "events".

    Under torchrun, or in a process group that is there, all processes call it alike; the first one writes.
    Returns what was done; `status` is 75 where work remains. Raises TrainError for the student, the settings, a folder
    that is no run's, the checkpoints, and for a loss or a gradient that is not finite; StreamError and CacheError for
    the cache.
    """
    if unknown := sorted(set(changes) - {f.name for f in fields(TrainSettings)}):
        raise TypeError(f"train() got unexpected settings: {', '.join(unknown)}")
    settings = replace(settings, **changes)
    check_run_place(Path(out))
    caches, weights = open_sources(cache)
    check_data(caches, data)
    check_settings(settings, caches[0].spec)
    with together(settings.device) as processes, ExitStack() as stack:
        devices = [processes.device] if processes.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        kept: list[Evaluation] = []

        def keep(found: list["Evaluation"]) -> None:
            kept[:] = found

        measure = evaluate or held_out(settings, caches, [float(w) for w in weights], keep, data, processes)
        source = caches[0] if len(caches) == 1 else list(zip(caches, weights, strict=True))
        run = partial(_run, source, caches, data, processes, measure, None if evaluate else kept, stop, progress)
        report = run(student, Path(out), settings)
        if control and report.complete:
            plain = replace(settings, alpha=1.0, alpha_end=None)
            report = replace(report, control=run(student, Path(out) / CONTROL, plain))
            if processes.first:
                _note_control(Path(out), report)
        return report


def _run(
    cache: Any,
    caches: Sequence[Cache],
    data: Examples | None,
    processes: Processes,
    evaluate: Evaluate | None,
    kept: list["Evaluation"] | None,
    stop: Stop | None,
    progress: str,
    student: Any,
    out: Path,
    settings: TrainSettings,
) -> TrainReport:
    """One training. kept: the last evaluations, one of each cache; None where `evaluate` is the caller's."""
    if kept is not None:
        kept.clear()  # another run's
    made = make_student(student, caches[0].spec, settings, data)
    loader = make_loader(cache, settings, processes, data)
    trainer = Trainer(made, loader, processes, settings, out, evaluate=evaluate, progress=progress)
    try:
        trainer.resume()
        if stop is not None:
            stop.gentle = True
        trainer.run(stop or Stop())
        if trainer.step >= trainer.steps:
            # of a run that was at its end already, what was measured is not known by window
            trainer.measure_result(again=kept == [])
        report = trainer.report()
        if processes.first:
            if kept:  # by window, so that runs can be compared pairwise
                documents = [one.to_json() for one in kept]
                name, document = (EVALUATION, documents[0]) if len(documents) == 1 else (EVALUATIONS, documents)
                write_text(out / name, json.dumps(document) + "\n")
            trainer.write_run(caches, report)  # last: it says that the run is complete
        processes.wait()
        return report
    finally:
        if stop is not None:
            stop.gentle = False
        trainer.close()


def make_loader(
    cache: Any, settings: TrainSettings, processes: Processes, data: Examples | None = None
) -> DistillLoader:
    """What a training of these settings reads. Raises StreamError and CacheError."""
    return DistillLoader(
        cache,
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens if settings.batch_size is None else None,
        micro_tokens=settings.micro_tokens,
        layout=settings.layout,
        seed=settings.seed,
        shards_open=settings.shards_open,
        rank=processes.rank,
        world_size=processes.world_size,
        reduce=processes.reduce,
        skip=settings.skip,
        max_positions=settings.max_positions,
        device=processes.device,
        threads=settings.threads,
        allow_partial=settings.allow_partial,
        data=data,
    )


def held_out(
    settings: TrainSettings,
    caches: Sequence[Cache],
    weights: Sequence[float],
    keep: Callable[[list["Evaluation"]], object] = lambda found: None,
    data: Examples | None = None,
    processes: Processes = ALONE,
) -> Evaluate | None:
    """Measures on the held-out split: of a mixture, the mean over its caches by their weights. None where no evaluation
    is asked for; TrainError where one is, and nothing was held out. keep: given what was found, of each cache.
    processes: over which the windows are divided."""
    if settings.evaluate_every == 0:
        return None
    try:
        for cache in caches:
            open_split(cache, "held_out", allow_partial=settings.allow_partial)
    except StreamError as error:
        if settings.evaluate_every is None:
            return None
        raise TrainError(f"evaluate_every: got {settings.evaluate_every}, and {error}") from error
    from ..evaluate.api import evaluate

    def measures(student: Student) -> dict[str, float]:
        found = [
            evaluate(
                student,
                cache,
                data=data,
                batch_tokens=settings.micro_tokens,
                max_positions=settings.evaluate_positions,
                processes=processes,
            )
            for cache in caches
        ]
        keep(found)
        return means(found, weights)

    return measures


def means(found: Sequence["Evaluation"], weights: Sequence[float]) -> dict[str, float]:
    """Each measure, the mean over caches by their weights."""
    total: dict[str, float] = {}
    for one, weight in zip(found, weights, strict=True):
        for name, value in one.summary().items():
            if (mean := value["mean"]) is not None:
                total[name] = total.get(name, 0.0) + mean * weight / sum(weights)
    return total


def _note_control(out: Path, report: TrainReport) -> None:
    """run.json with the control beside the student."""
    document = json.loads((out / RUN).read_text())
    document["report"] = report.to_json()
    write_text(out / RUN, json.dumps(document, indent=1, allow_nan=False) + "\n")
