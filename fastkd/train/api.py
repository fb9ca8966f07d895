"""`fastkd.train`: train a student from a cache, or beside its teacher. Called again with the same arguments, it
resumes.

RUN/  run.json  metrics.jsonl  evaluation.json  checkpoints/  student/  control/  without_features/ (the same again)
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch

from ..data.examples import as_examples
from ..errors import TrainError
from ..models.upload import Upload, check_base, check_upload, upload
from ..settings import LiveSettings, RolloutSettings, ShareSettings, TrainSettings
from ..settings_changes import TrainChanges, changed
from ..utils.atomic import sealed, write_json, writing
from ..utils.distributed import Processes, joined_processes
from ..utils.output_guard import check_folder
from ..utils.progress import Mode, is_shown, naming, notes_only
from ..utils.signals import Stop
from .arms import CONTROL, WITHOUT_FEATURES, Arm, control_arms
from .batch import with_batch
from .begun import begun_with, continued
from .cards import SHARE, write_cards
from .checkpoint import steps_of
from .exits import with_exits
from .finished import finished_report
from .held_out import EVALUATION, EVALUATIONS
from .inputs import CacheInputs, Inputs, SourceInputs, inputs_of, make_source
from .live_inputs import LiveInputs, check_arguments, is_inside, live_identity, load_beside, load_inputs
from .objective import Objective
from .outline import Outline, outline_of
from .result import RUN, TrainReport
from .rollout_inputs import RolloutInputs, check_rollouts
from .settings_check import check_begun, check_best, check_settings, doubtful
from .student import check_source, make_student
from .trainer import Evaluate, Pause, Trainer
from .unused import check_live, check_rollouts_used, check_share
from .verdict import judge
from .watch import Watch, check_watch

if TYPE_CHECKING:
    from ..evaluate.api import Evaluation

__all__ = ["EVALUATION", "EVALUATIONS", "make_source", "run_trainer", "train", "train_one"]
DEFAULTS = TrainSettings()
LIVE_FOLDER = "live"  # in the run's: bases of the features of a live teacher
LIVE, NO_ROLLOUTS = LiveSettings(), RolloutSettings()
STUDENT_ARM = ""  # the folder of the student itself, within the run's
Done = dict[str, tuple[TrainReport, "list[Evaluation]"]]


def train(
    student: Any,
    cache: Any = None,
    out: str | Path | None = None,
    settings: TrainSettings = DEFAULTS,
    *,
    teacher: Any = None,
    data: Any = None,
    live: LiveSettings = LIVE,
    write_cache: Any = None,
    rollouts: RolloutSettings = NO_ROLLOUTS,
    objective: Objective | None = None,
    control: bool = False,
    stop_if_worse: bool = False,
    evaluate: Evaluate | None = None,
    stop: Stop | None = None,
    pause: Pause | None = None,
    watch: Watch | None = None,
    share: ShareSettings = SHARE,
    progress: Mode = "none",
    **changes: Unpack[TrainChanges],
) -> TrainReport:
    """Train a student from a cache, or beside a teacher. Called again with the same arguments, it resumes from the last
    checkpoint.

    student: a folder or a name of a causal model of transformers, a config (new weights), a torch module, or a
        callable that returns one; see `make_student`. A module is copied, and not changed.
    cache: a `Cache`, an argument of `open_cache`, a mixture [(cache, weight), ...] or [cache, ...], or a `BatchSource`;
        or None, with data and usually a teacher.
    teacher: without a cache: a `Teacher`, a torch module or a name, as of `fastkd.capture`, which is run on every
        micro-batch; or KIND:TEXT for one that is made of the student (see `teacher_kinds`). None: with alpha=1.
    data: with a teacher, what `fastkd.capture` takes. For a cache of examples, the labelled `Examples` that it was
        captured from. With examples the student is a module that maps them to logits, or a callable that returns one.
    live: without a cache, how data are divided and targets are made: as by a capture with the same settings.
    write_cache: with a teacher, a folder or URL: what the teacher answers is committed there as shards of a cache, and
        read from there, also by later trainings.
    out: the run's folder, which all processes share.
    settings, changes: a `TrainSettings`, and other values of its fields: `train(..., rate=1e-3, alpha=0)`.
    rollouts: which part of the sequences the student continues itself (on-policy distillation), scored by the teacher,
        which may then be given beside a cache.
    objective: an `Objective` instead of the distillation loss of the settings (`TokenKD`).
    control: afterwards train the same student on hard labels alone (alpha=1), in the same order, into out/control; and
        if it matches features, before that the same student without them, into out/without_features.
    stop_if_worse: train the control first, and end the training of the student at an evaluation after which it is worse
        than the control by the measure `best`, beyond the interval; see `watch.py`. The report is then complete, and
        the result exported. Called again without stop_if_worse, the training is continued.
    evaluate: measures a student, every `evaluate_every` steps and at the end. Default: `fastkd.evaluate` on the
        held-out split of the caches.
    stop: stops the training when called, for example by a signal handler; a checkpoint is written.
    pause: evaluates after other steps, and pauses after one of them, for a later call.
    watch: instead of stop_if_worse, the other runs that the student is compared with; see `watch.py`.
    share: what the model card says of the teacher, and the repository on the Hugging Face Hub that the student is
        uploaded to when training is complete. Whether that is possible is checked first. The report says if the upload
        failed; its status is then 1.
    progress: "none", "bar", "lines", "events", or a function that is called with each event.

    Under torchrun, or in an initialized process group, all processes make the same call; the first one writes the log.
    Returns the report; its `status` is 75 if work remains. Raises TrainError for the student, the settings, a folder
    with other files, damaged checkpoints, and for a loss or a gradient that is not finite (`Diverged`); StreamError and
    CacheError for the cache.
    """
    if out is None:
        raise TypeError("train() got no folder for the run (out)")
    settings, out, stop = changed("train", settings, changes), Path(out), stop or Stop()
    data = as_examples(data)
    call = TrainCall(
        student, cache, out, settings, teacher, data, live, write_cache, rollouts, objective, control, evaluate, share
    )
    cached, settings, live, begun = call.checked()
    with (
        writing(out),
        joined_processes(settings.device, timeout_minutes=settings.timeout_minutes) as processes,
        ExitStack() as stack,
    ):
        target = _upload_target(share, processes)
        plain = teacher is None and not rollouts.rollouts and not stop_if_worse and not (objective or evaluate or pause)
        before = finished_report(out, student, settings, cached, control=control) if plain and processes.first else None
        if (before := processes.gather(before)[0]) is not None:
            if processes.first:
                write_cards(out, text=True, share=share if target is None else replace(share, push=target.repo))
            return _after(before, target, progress)
        check_begun(out, settings, identity_of(cached, settings, live, data))
        check_source(student, settings, None if cached is None else cached.data)
        inputs: Inputs = cached or load_inputs(
            teacher,
            data,
            settings,
            live,
            write_cache=write_cache,
            folder=out / LIVE_FOLDER,
            processes=processes,
            stop=stop,
            progress=is_shown(progress) and processes.first,
        )
        stack.callback(inputs.close)
        if (size := inputs.size(settings)) is not None:
            settings = with_batch(settings, size, begun)
        if rollouts.rollouts:
            scores = inputs.teacher if isinstance(inputs, LiveInputs) else None
            if scores is None and teacher is not None:
                scores = load_beside(teacher, None, settings, live, processes)
            batch_tokens = live.teacher_batch_tokens
            name = str(teacher) if isinstance(teacher, (str, Path)) else ""
            inputs = RolloutInputs(
                inputs, scores, rollouts, out, teacher_batch_tokens=batch_tokens, stop=stop, named=name
            )
        devices = [processes.device] if processes.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        shared = (processes, evaluate, stop, progress)
        if stop_if_worse:
            by_window = evaluate is None and settings.evaluate_every != 0 and not inputs.nothing_held_out()
            check_watch(control=control, by_window=by_window, measure=settings.best)
        arms = control_arms(settings, objective) if control else []  # before an objective's parameters are trained
        order = [Arm(STUDENT_ARM, "with its own settings", settings, objective), *arms]
        done: Done = {}
        for arm in reversed(order) if stop_if_worse else order:
            if done and processes.first:
                text = f"now the same student {arm.says}: {out / arm.folder}"
                notes_only(progress).event("note", text=text)
            if stop_if_worse:
                watch = Watch({name: out / name for name in done}, inputs.weights, settings.best)
            trained_on = inputs if arm.folder == STUDENT_ARM else inputs.control
            given = (student, out / arm.folder, arm.settings, arm.objective, trained_on, *shared)
            with naming(*([(arm.folder or "student").replace("_", " ")] if arms else [])):
                done[arm.folder] = train_one(*given, watch=watch, pause=pause, tell=not done)
            report = with_arms(out, done, inputs.weights, settings.best)
            ended = STUDENT_ARM in done and report.complete and report.stopped_worse is None
            if ended and report.arms and not report.verdicts:
                report = replace(report, not_compared=_why_not_compared(inputs, settings, evaluate))
            if processes.first and report.arms and STUDENT_ARM in done:
                document = json.loads((out / RUN).read_text()) | {"report": report.to_json()}
                write_json(out / RUN, document)
            if not done[arm.folder][0].complete:
                break
        if report.complete:
            finished = inputs.finish(processes)
            if finished.text and processes.first:
                notes_only(progress).event("note", text=finished.text)
            if not finished.complete:
                report = replace(report, unfinished=finished.text)
        if report.complete and processes.first:
            named = share if target is None else replace(share, push=target.repo)
            if is_inside(teacher) and share.card_teacher is None:
                named = replace(named, card_teacher="its own average")
            write_cards(out, text=inputs.data is None, share=named)
    return _after(report, target, progress)


def _why_not_compared(inputs: Inputs, settings: TrainSettings, evaluate: Evaluate | None) -> str:
    """Why a student has no verdict against what was trained beside it, as a sentence."""
    if evaluate is not None:
        return "it was evaluated by a function that was given, which does not say what each window has."
    if settings.evaluate_every == 0:
        return "nothing was evaluated, as evaluate_every is 0."
    return inputs.nothing_held_out() or f"the evaluations do not have {settings.best}, which decides."


class CheckedCall(NamedTuple):
    """A call of `train` whose arguments fit. inputs: those that read caches or a source, None for one without.
    settings, live: with what the data and an earlier run in the folder decide. begun: of that run, see `begun_with`."""

    inputs: CacheInputs | SourceInputs | None
    settings: TrainSettings
    live: LiveSettings
    begun: Mapping[str, Any]


@dataclass(frozen=True)
class TrainCall:
    """The arguments of `train` that a dry run has as well."""

    student: Any
    cache: Any
    out: Path
    settings: TrainSettings = DEFAULTS
    teacher: Any = None
    data: Any = None
    live: LiveSettings = LIVE
    write_cache: Any = None
    rollouts: RolloutSettings = NO_ROLLOUTS
    objective: Objective | None = None
    control: bool = False
    evaluate: Evaluate | None = None
    share: ShareSettings = SHARE

    def checked(self) -> CheckedCall:
        """Raise what `train` does for arguments that do not fit, before anything is loaded."""
        settings, teacher, live, objective = self.settings, self.teacher, self.live, self.objective
        check_folder(self.out, "run")
        check_settings(settings, None, objective)
        check_rollouts(self.rollouts, settings, teacher, objective, inside=is_inside(teacher))
        rolls = self.rollouts.rollouts > 0
        check_arguments(self.cache, teacher, self.data, self.write_cache, settings, objective, rollouts=rolls)
        beside = teacher is not None and not is_inside(teacher)
        check_live(live, cached=self.cache is not None, teacher=beside, rollouts=rolls)
        check_rollouts_used(self.rollouts)
        check_share(self.share)
        if self.evaluate is None:
            check_best(settings)
        if self.share.push is not None:
            check_base(self.student, adapter=settings.lora_rank is not None)
        cached = None if self.cache is None else inputs_of(self.cache, self.data)
        begun = begun_with([self.out, *(self.out / name for name in (CONTROL, WITHOUT_FEATURES))])
        live = continued(live, begun)
        if cached is not None:
            check_settings(settings, cached.spec, objective)
            settings = with_batch(settings, cached.size(settings), begun)
        return CheckedCall(cached, settings, live, begun)


def identity_of(
    cached: CacheInputs | SourceInputs | None, settings: TrainSettings, live: LiveSettings, data: Any
) -> Mapping[str, Any]:
    """What is known of the data of a training before anything is loaded; see `check_begun`."""
    return live_identity(live, data) if cached is None else cached.identity(settings)


def _upload_target(share: ShareSettings, processes: Processes) -> Upload | None:
    """Where the first process uploads the student to; None for the others, and if nowhere. Raises TrainError on all
    processes if it cannot."""
    target, problem = None, None
    if share.push is None:
        return None
    if processes.first:
        try:
            target = check_upload(share.push, private=share.push_private)
        except TrainError as error:
            problem = str(error)
    if problem := processes.gather(problem)[0]:
        raise TrainError(problem)
    return target


def _after(report: TrainReport, target: Upload | None, progress: Mode) -> TrainReport:
    """The report of a training, after the upload of its student, if it is complete and to be uploaded."""
    if target is None or not report.complete or report.student is None:
        return report
    notes_only(progress).event("note", text=f"uploading {report.student} to {target.repo}")
    try:
        return replace(report, pushed=upload(target, Path(report.student), quiet=progress != "bar"))
    except TrainError as error:
        return replace(report, push_failed=str(error))


def with_arms(out: Path, done: "Done", weights: Sequence[float], measure: str) -> TrainReport:
    """The report of a student with those of the arms that were trained beside it. done: each one's report, and its last
    evaluations by window."""
    arms = {name: report for name, (report, _) in done.items() if name != STUDENT_ARM}
    ours: list[Evaluation] = []
    if STUDENT_ARM not in done:  # the arms come first: it waits where it is
        first = next(iter(arms.values()))
        report = TrainReport(str(out), max(steps_of(out), default=0), first.steps, 0, {}, {}, {})
    else:
        report, ours = done[STUDENT_ARM]
    found = {} if report.stopped_worse else {n: judge(n, ours, done[n][1], weights, measure) for n in arms}
    verdicts = {name: one for name in (WITHOUT_FEATURES, CONTROL) if (one := found.get(name)) is not None}
    return replace(report, control=arms.get(CONTROL), without_features=arms.get(WITHOUT_FEATURES), verdicts=verdicts)


def train_one(
    student: Any,
    out: Path,
    settings: TrainSettings,
    objective: Objective | None,
    inputs: Inputs,
    processes: Processes,
    evaluate: Evaluate | None,
    stop: Stop,
    progress: Mode,
    *,
    watch: Watch | None = None,
    pause: Pause | None = None,
    tell: bool = False,
) -> "tuple[TrainReport, list[Evaluation]]":
    """Train, or resume, in a folder. Returns the report, and the last evaluations by window, one for each cache.

    student: as of `train`, or a `LoadedStudent`. tell: say before the first step how many there will be.
    """
    made = make_student(student, inputs.spec, settings, inputs.data)
    inputs.meet(made, settings, objective)
    settings = with_batch(settings, inputs.size(settings), begun_with([out]))
    held = inputs.evaluator(settings, processes) if evaluate is None else None
    objective = inputs.matched(settings, made.student, objective)
    if settings.exits:
        objective = with_exits(settings, made.student, objective, inputs.data)
    source = inputs.open(settings, processes, objective)
    trainer = Trainer(
        made, source, processes, settings, out, objective=objective, evaluate=evaluate or held, watch=watch,
        pause=pause, progress=progress,
    )  # fmt: skip
    evaluations = {} if held is None else {EVALUATION: held.evaluations}
    outline = outlined(inputs, settings, len(source), by_window=evaluate is None) if tell and pause is None else None
    report = run_trainer(trainer, out, inputs, processes, stop, evaluations, outline)
    return report, [] if held is None else list(held.evaluations)


def outlined(inputs: Inputs, settings: TrainSettings, per_epoch: int, *, by_window: bool = True) -> Outline:
    """The outline of a training on these inputs, whose source has `per_epoch` steps. by_window: it is evaluated on the
    held-out split, not by a function of the caller. For a training that is only planned, too."""
    held, why = None, ""
    if by_window and settings.evaluate_every != 0:
        held, why = inputs.held_out_size(settings), inputs.nothing_held_out()
    doubts = doubtful(settings, inputs.spec)
    return outline_of(settings, per_epoch, size=inputs.size(settings), held_out=held, why=why, doubts=doubts)


def run_trainer(
    trainer: Trainer,
    out: Path,
    inputs: Inputs,
    processes: Processes,
    stop: Stop,
    evaluations: "Mapping[str, list[Evaluation]]",
    outline: Outline | None = None,
) -> TrainReport:
    """Train, or resume, and write what a run leaves. evaluations: by the name of a file for them, where the trainer's
    evaluation puts those by window, one for each cache: so runs can be compared pairwise. outline: said before the
    first step."""
    try:
        trainer.resume()
        if outline is not None:
            trainer.tell(outline)
        with stop.gently():
            trainer.run(stop)
            if trainer.complete:
                # of a run that was complete already, there are no evaluations by window
                trainer.evaluate_result(stop, again=any(not found for found in evaluations.values()))
            held = inputs.held_out_size(trainer.settings) if evaluations else None
            report = replace(trainer.report(), held_out={} if held is None else held.to_json())
            if processes.first:
                for name, found in evaluations.items():
                    documents = [sealed(one.to_json()) for one in found]
                    if len(documents) == 1:
                        write_json(out / name, documents[0], indent=None)
                    elif documents:
                        write_json(out / name.replace("evaluation", "evaluations", 1), documents, indent=None)
                trainer.tidy_checkpoints()
                trainer.write_run(report, inputs.describe())  # last: the run is then complete
            processes.wait()
        return report
    finally:
        trainer.close()
