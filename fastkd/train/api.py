"""`fastkd.train`: train a student from a cache. Called again with the same arguments, it resumes.

RUN/  run.json  metrics.jsonl  evaluation.json  checkpoints/  student/  control/  without_features/ (the same again)
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..cache.reader import Cache
from ..cache.spec import CacheSpec
from ..data.examples import Examples
from ..errors import StreamError, TrainError
from ..settings import TrainSettings
from ..stream.batch import BatchSource
from ..stream.cached import CachedSource
from ..stream.split import check_data, has_held_out, open_sources, open_split
from ..utils.atomic import sealed, write_json, writing
from ..utils.distributed import ALONE, Processes, joined_processes
from ..utils.output_guard import check_folder
from ..utils.progress import Progress
from ..utils.signals import Stop
from .arms import control_arms
from .exits import exit_students, with_exits
from .matched import matched_objective, signals_of
from .objective import Objective
from .result import RUN, TrainReport, describe_cache
from .settings_check import check_settings
from .student import Student, make_student
from .trainer import Evaluate, Trainer
from .verdict import judge

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
    objective: Objective | None = None,
    control: bool = False,
    evaluate: Evaluate | None = None,
    stop: Stop | None = None,
    progress: str = "none",
    **changes: Any,
) -> TrainReport:
    """Train a student from a cache. Called again with the same arguments, it resumes from the last checkpoint.

    student: a folder or a name of a causal model of transformers, a config (new weights), a torch module, or a
        callable that returns one; see `make_student`. A module is copied, and not changed.
    cache: a `Cache`, an argument of `open_cache`, a mixture [(cache, weight), ...], or a `BatchSource`.
    data: for a cache of examples, the labelled `Examples` that it was captured from; the student is then a module that
        maps them to logits, or a callable that returns one.
    out: the run's folder, which all processes share.
    settings, changes: a `TrainSettings`, and other values of its fields: `train(..., rate=1e-3, alpha=0)`.
    objective: an `Objective` instead of the distillation loss of the settings (`TokenKD`).
    control: afterwards train the same student on hard labels alone (alpha=1), in the same order, into out/control; and
        if it matches features, before that the same student without them, into out/without_features.
    evaluate: measures a student, every `evaluate_every` steps and at the end. Default: `fastkd.evaluate` on the
        held-out split of the caches.
    stop: stops the training when called, for example by a signal handler; a checkpoint is written.
    progress: "none", "bar", "lines" or "events".

    Under torchrun, or in an initialized process group, all processes make the same call; the first one writes the log.
    Returns the report; its `status` is 75 if work remains. Raises TrainError for the student, the settings, a folder
    with other files, damaged checkpoints, and for a loss or a gradient that is not finite (`Diverged`); StreamError and
    CacheError for the cache.
    """
    if unknown := sorted(set(changes) - {f.name for f in fields(TrainSettings)}):
        raise TypeError(f"train() got unexpected settings: {', '.join(unknown)}")
    settings, out = replace(settings, **changes), Path(out)
    check_folder(out, "run")
    inputs = Inputs.of(cache, data)
    check_settings(settings, inputs.spec, objective)
    with (
        writing(out),
        joined_processes(settings.device, timeout_minutes=settings.timeout_minutes) as processes,
        ExitStack() as stack,
    ):
        devices = [processes.device] if processes.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        shared = (inputs, processes, evaluate or held_out(settings, inputs, processes), stop or Stop(), progress)
        arms = control_arms(settings, objective) if control else []  # before an objective's parameters are trained
        report, ours = _run(student, out, settings, objective, *shared)
        for arm in arms:
            if not report.complete:
                break
            if processes.first:
                text = f"now the same student {arm.says}: {out / arm.folder}"
                Progress(0, unit="step", mode="lines" if progress == "bar" else progress).event("note", text=text)
            found, theirs = _run(student, out / arm.folder, arm.settings, arm.objective, *shared)
            judged = judge(arm.folder, ours, theirs, inputs.weights, settings.best)
            verdicts = report.verdicts | ({arm.folder: judged} if judged else {})
            report = replace(report, **{arm.folder: found}, verdicts=verdicts)
            if processes.first:
                document = json.loads((out / RUN).read_text()) | {"report": report.to_json()}
                write_json(out / RUN, document)
        return report


def _run(
    student: Any,
    out: Path,
    settings: TrainSettings,
    objective: Objective | None,
    inputs: "Inputs",
    processes: Processes,
    evaluate: Evaluate | None,
    stop: Stop,
    progress: str,
) -> "tuple[TrainReport, list[Evaluation]]":
    """Train, or resume, in a folder. Returns the report, and the last evaluations by window, one for each cache."""
    held = evaluate if isinstance(evaluate, HeldOut) else None
    if held is not None:
        held.evaluations.clear()  # those of another run
    made = make_student(student, inputs.spec, settings, inputs.data)
    if settings.match:
        objective = matched_objective(settings, inputs.caches, made.student, objective=objective, data=inputs.data)
    if settings.exits:
        objective = with_exits(settings, made.student, objective, inputs.data)
    trainer = Trainer(
        made, inputs.open(settings, processes, objective), processes, settings, out, objective=objective,
        evaluate=evaluate, progress=progress,
    )  # fmt: skip
    try:
        trainer.resume()
        stop.gentle = True
        trainer.run(stop)
        if trainer.step >= trainer.steps:
            # of a run that was complete already, there are no evaluations by window
            trainer.evaluate_result(again=held is not None and not held.evaluations)
        report = trainer.report()
        if processes.first:
            if held is not None and held.evaluations:  # by window, so that runs can be compared pairwise
                documents = [sealed(one.to_json()) for one in held.evaluations]
                name, document = (EVALUATION, documents[0]) if len(documents) == 1 else (EVALUATIONS, documents)
                write_json(out / name, document, indent=None)
            caches = {"caches": [describe_cache(cache) for cache in inputs.caches]}
            trainer.write_run(report, caches if inputs.source is None else None)  # last: the run is then complete
        processes.wait()
        return report, [] if held is None else list(held.evaluations)
    finally:
        stop.gentle = False
        trainer.close()


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a student is trained on: caches with their weights, and the data of caches of examples; or a source."""

    caches: Sequence[Cache] = ()
    weights: Sequence[float] = ()
    data: Examples | None = None
    source: BatchSource | None = None

    @classmethod
    def of(cls, cache: Any, data: Examples | None = None) -> "Inputs":
        """The inputs for an argument `cache` of `train`. Raises StreamError and CacheError."""
        if isinstance(cache, BatchSource):
            return cls(data=data, source=cache)
        if hasattr(cache, "steps") or isinstance(cache, type):
            members = ("fingerprint", "__len__", "steps", "state_dict", "load_state_dict", "seek", "close")
            missing = ", ".join(name for name in members if not hasattr(cache, name))
            what = f"the class {cache.__name__}" if isinstance(cache, type) else type(cache).__name__
            raise StreamError(
                f"cache: got {what}{f' without {missing}' if missing else ''}; expected a cache, or an object with the "
                "members of fastkd.stream.BatchSource."
            )
        caches, weights = open_sources(cache)
        check_data(caches, data)
        return cls(caches, [float(weight) for weight in weights], data)

    @property
    def spec(self) -> CacheSpec | None:
        """The spec of the first cache."""
        return self.caches[0].spec if self.caches else None

    def open(self, settings: TrainSettings, processes: Processes, objective: Objective | None = None) -> BatchSource:
        """The source of a training, before the first step of the first epoch, with the signals that its objective
        reads."""
        if self.source is not None:
            self.source.seek(0, 0)
            return self.source
        mixture = list(zip(self.caches, self.weights, strict=True))
        signals = {} if objective is None else signals_of(objective)
        cache = self.caches[0] if len(mixture) == 1 else mixture
        return make_source(cache, settings, processes, self.data, features=signals.get("features", ()))


def make_source(
    cache: Any,
    settings: TrainSettings,
    processes: Processes = ALONE,
    data: Examples | None = None,
    *,
    features: Sequence[str] = (),
) -> CachedSource:
    """The source that a training with these settings reads. features: names. Raises StreamError and CacheError."""
    names = (
        "batch_size", "micro_tokens", "layout", "seed", "shards_open", "skip", "max_positions", "threads",
        "allow_partial",
    )  # fmt: skip
    return CachedSource(
        cache,
        **{name: getattr(settings, name) for name in names},
        batch_tokens=settings.batch_tokens if settings.batch_size is None else None,
        rank=processes.rank,
        world_size=processes.world_size,
        reduce=processes.reduce,
        device=processes.device,
        data=data,
        features=features,
    )


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Evaluates a student on the held-out split of each cache; returns the means over caches, by their weights.

    processes: they share the work. evaluations: the last ones, one for each cache.
    """

    settings: TrainSettings
    inputs: Inputs
    processes: Processes
    evaluations: "list[Evaluation]"

    def __call__(self, student: Student) -> dict[str, float]:
        self.evaluations[:] = self._of(student)
        found = means(self.evaluations, self.inputs.weights)
        for name, part in exit_students(student).items():
            theirs = means(self._of(part), self.inputs.weights)
            found |= {f"{name}/{measure}": value for measure, value in theirs.items()}
        return found

    def _of(self, student: Any) -> "list[Evaluation]":
        from ..evaluate.api import evaluate

        return [
            evaluate(
                student,
                cache,
                data=self.inputs.data,
                batch_tokens=self.settings.micro_tokens,
                max_positions=self.settings.evaluate_positions,
                allow_partial=self.settings.allow_partial,
                processes=self.processes,
            )
            for cache in self.inputs.caches
        ]


def held_out(settings: TrainSettings, inputs: Inputs, processes: Processes = ALONE) -> HeldOut | None:
    """The default evaluation of a training; None without a held-out split, and if the settings want none. Raises
    TrainError if they want one and there is no held-out split, and StreamError if shards of it are missing."""
    if settings.evaluate_every == 0:
        return None
    problem = "" if inputs.caches else "a batch source has no held-out split. Pass evaluate."
    if without := [cache for cache in inputs.caches if not has_held_out(cache)]:
        problem = f"no documents of {without[0]!r} were held out."
    if not problem:
        for cache in inputs.caches:
            open_split(cache, "held_out", allow_partial=settings.allow_partial)
        return HeldOut(settings, inputs, processes, [])
    if settings.evaluate_every is None:
        return None
    raise TrainError(f"evaluate_every: got {settings.evaluate_every}, and {problem}")


def means(evaluations: "Sequence[Evaluation]", weights: Sequence[float]) -> dict[str, float]:
    """The mean of each measure over caches, by their weights."""
    total: dict[str, float] = {}
    for one, weight in zip(evaluations, weights, strict=True):
        for name, value in one.summary().items():
            if (mean := value["mean"]) is not None:
                total[name] = total.get(name, 0.0) + mean * weight / sum(weights)
    return total
