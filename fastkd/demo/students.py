"""The students of the language demo: the teacher with layers removed, evaluated untrained, and trained."""

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ..cache import Cache
from ..evaluate.api import evaluate
from ..settings import StudentSettings, TrainSettings
from ..students.api import student as make_student_of
from ..train.api import EVALUATION, train
from ..train.arms import CONTROL
from ..train.checkpoint import FOLDER as CHECKPOINTS
from ..train.precision import autocast_of
from ..train.result import RUN, STUDENT, describe_cache, run_document
from ..train.student import make_student
from ..utils.atomic import remove_folder, write_text
from ..utils.distributed import joined_processes
from ..utils.progress import mode_for, naming
from ..utils.signals import Stopped
from .artifacts import Json, cached_result, make_folder, write_json
from .completions import prefixes_of, student_completions
from .job import Job
from .step_ratio import step_ratio
from .teacher import held_out_windows, teacher_identity


def make_students(job: Job, cache: Cache) -> tuple[dict[str, Json], dict[str, float]]:
    """Make, evaluate and train all students. Returns their completions by name, and the `step_ratio`.

    Raises `Stopped` if `job.stop` was called.
    """
    stages, first = job.stages, job.trainings[0][1]
    inputs: Json = {"teacher": teacher_identity(job.teacher), "cut": job.settings.cut}
    with stages.stage("prune", f"one layer in {job.settings.cut} removed: {job.pruned}"):
        make_folder(job.pruned, inputs, stages.log, lambda: prune(job.teacher, job.pruned, job.settings.cut))
    inputs |= {"cache": cache.spec.hash}
    with stages.stage("evaluate", "the pruned student"):
        folder = job.out / "damaged"
        make_folder(folder, inputs, stages.log, lambda: evaluate_untrained(job.pruned, cache, folder, first))
    for name, settings, control in job.trainings:
        text = f"{job.steps}, alpha = {settings.alpha:g}" + ", and its control" * control
        with stages.stage(f"train {name}", text):
            run = job.out / name
            run_inputs = inputs | {"settings": asdict(settings), "control": control}
            make = partial(train_student, job, cache, run, settings, control=control)
            make_folder(run, run_inputs, stages.log, make)
            for one in (run, run / CONTROL):  # not needed any more, and three times the student's size
                shutil.rmtree(one / CHECKPOINTS, ignore_errors=True)
    inputs |= {"settings": asdict(first)}
    with stages.stage("step", "of distillation, and of cross-entropy alone"):
        step = cached_result(job.out / "step.json", inputs, lambda: step_ratio(job.pruned, cache, first))
    with stages.stage("completions", "by the students"):
        prefixes = prefixes_of(held_out_windows(cache, job.sizes))
        healed = job.out / "healed"
        folders = {"damaged": job.pruned, "healed": healed / STUDENT, "control": healed / CONTROL / STUDENT}
        answers = {}
        for name, folder in folders.items():
            complete = partial(student_completions, folder, job.teacher, prefixes)
            answers[name] = cached_result(job.out / f"completions-{name}.json", inputs, complete)
    return answers, step


def prune(teacher: Path, folder: Path, every: int) -> None:
    """Write a folder with the teacher, less one layer in `every`, and its tokenizer."""
    remove_folder(folder)  # of a run that was stopped before it was complete
    make_student_of(teacher, folder, StudentSettings(drop_every=every))


def evaluate_untrained(student: Path, cache: Cache, out: Path, settings: TrainSettings) -> None:
    """Write the run folder of a student that was not trained: run.json and evaluation.json."""
    with joined_processes(settings.device) as processes:
        loaded = make_student(student, cache.spec, settings).student.to(processes.device)
        loaded.autocast = autocast_of(settings.precision, processes.device)
        found = evaluate(loaded, cache, batch_tokens=settings.micro_tokens, progress=True)
        size, inputs = loaded.parameters_and_bytes, {"caches": [describe_cache(cache)]}
        document = run_document(loaded, size, inputs, processes.device, 1)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / EVALUATION, json.dumps(found.to_json()) + "\n")
    write_json(out / RUN, document)


def train_student(job: Job, cache: Cache, out: Path, settings: TrainSettings, *, control: bool) -> None:
    """Train a student, or resume its training. Raises `Stopped` if `job.stop` was called."""
    with naming(out.name):
        report = train(job.pruned, cache, out, settings, control=control, stop=job.stop, progress=mode_for())
    if not report.complete:
        raise Stopped
