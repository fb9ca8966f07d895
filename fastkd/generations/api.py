"""`fastkd.generations`: born-again networks (Furlanello et al. 2018). Called again, it resumes.

A student is trained from a cache of the teacher; then it is captured in turn, and a new student is trained from that
cache, and so on. At the end, one more student is trained from the mean of all these caches.

    OUT/  generations.json  generations.png
          generation-1/cache  generation-1/run     what `fastkd capture` and `fastkd train` write
          generation-2/cache  generation-2/run     likewise, of the student of generation 1
          ensemble/cache      ensemble/run         the cache by `fastkd mix-targets`
          control/                                 the student of generation 1 on hard labels alone
"""

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch.distributed as dist

from ..cache import Cache, CacheError, CacheSpec, NotFound, open_cache
from ..cache.capture_plan import read_capture_plan
from ..cache.provenance import Identity, Provenance
from ..capture.api import capture
from ..capture.mix_caches import mix_targets
from ..capture.window_plan import DEFAULT_CONTEXT, cache_spec
from ..capture.window_plan import check_settings as check_capture
from ..data.documents import Documents
from ..data.examples import EXAMPLE_COLUMNS, Examples, as_examples
from ..data.sources import open_source
from ..errors import TeacherError, TrainError
from ..evaluate.api import Evaluation, evaluate
from ..models.adapters import CONFIG
from ..models.trained import load_trained
from ..settings import CaptureSettings, LiveSettings, ModelSettings, TrainSettings
from ..settings_changes import TrainChanges, changed
from ..stream.split import has_held_out
from ..sweep.result import check_finished, read_result
from ..teachers.load import as_data, as_teacher, load_teacher, named_tokenizer
from ..teachers.protocol import Teacher
from ..train.api import DEFAULTS, train
from ..train.batch import with_batch
from ..train.begun import begun_with
from ..train.beside import check_exports
from ..train.cards import write_cards
from ..train.exits import with_exits
from ..train.held_out import EVALUATION
from ..train.inputs import inputs_of
from ..train.lora import without_lora
from ..train.precision import autocast_of
from ..train.result import STUDENT, describe_cache
from ..train.settings_check import check_best, check_settings
from ..train.student import Student, check_source, make_student
from ..utils.atomic import lock, sealed, write_json, writing
from ..utils.distributed import local_device
from ..utils.output_guard import check_folder
from ..utils.progress import naming, notes_only
from ..utils.signals import Stop, Stopped
from .plot import plotted
from .result import GENERATIONS, GenerationsReport, Trained, make_report, read_json

LIVE_DEFAULTS = LiveSettings()


@dataclass(frozen=True, eq=False)
class _Arm:
    """A student to train. folder: of its run. cache: that it is trained from. says: what it learns from."""

    name: str
    folder: Path
    cache: Path
    settings: TrainSettings
    says: str


def generations(
    count: int,
    student: Any,
    teacher: Any,
    data: Any,
    out: str | Path,
    settings: TrainSettings = DEFAULTS,
    live: LiveSettings = LIVE_DEFAULTS,
    *,
    control: bool = False,
    ensemble: bool = True,
    stop: Stop | None = None,
    progress: str = "none",
    **changes: Unpack[TrainChanges],
) -> GenerationsReport:
    """Train a student from a teacher, a new one from that student, and so on. Called again, it resumes.

    count: how many generations. student: as for `train`; each generation starts from it as it is given: with its
        weights if it has some, otherwise with new ones by the seed.
    teacher, data: as for `capture`. Labelled `Examples` are both captured and trained on. A teacher that is given by
        name is in memory until the first generation is captured.
    out: the folder; see above. settings, changes: of the trainings. live: how data are read and divided, what targets
        are made of the answers, and how teachers are loaded and run: for all captures alike.
    control: also train the student of generation 1 on hard labels alone. ensemble: from two generations on, also train
        a student from the mean of all generations' caches.
    stop: stops it when called; the current capture or training can be resumed. progress: "none", "bar", "lines" or
        "events".

    Seeds: generation g is trained with seed `settings.seed + g - 1` (weights, data order, dropout), the ensemble's
    student with the one after the last generation's, the control with `settings.seed`. All captures have one seed, so
    that all caches have the same rows. All students are compared on the held-out split of the first cache.

    Returns the report; its `status` is 75 if work remains. Raises TrainError, before anything is written, for settings
    that are not possible, and what `capture`, `mix_targets` and `train` raise.
    """
    settings, out, stop = changed("generations", settings, changes), Path(out), stop or Stop()
    captured = live.capture_settings()
    loading = ModelSettings(
        revision=live.teacher_revision, dtype=live.teacher_dtype, attention=live.teacher_attention,
        teacher_options=live.teacher_options, device=settings.device, trust_remote_code=settings.trust_remote_code,
    )  # fmt: skip
    _check_arguments(count, settings, captured, out, ensemble=ensemble)
    data = as_examples(data)
    check_best(settings)
    check_source(student, settings)
    if not isinstance(data, (Documents, Examples)):
        data = open_source(data, live.column, live.text_documents)
    named_tokenizer(None, live.template)
    if isinstance(teacher, (str, Path)):
        first: Teacher = load_teacher(teacher, loading, data)
    else:
        first = as_teacher(teacher, data)
    rows = as_data(
        data, first, column=live.column, text_documents=live.text_documents, tokenizer=settings.tokenizer,
        template=live.template, trust_remote_code=settings.trust_remote_code,
        allow_other_tokenizer=settings.allow_other_tokenizer, loss_on=live.loss_on,
    )  # fmt: skip
    probe = _check_student(student, first, rows, settings, captured, alone=count == 1, ensemble=ensemble)
    with writing(out), ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        stack.callback(os.close, lock(out))
        arms = _arms(count, out, settings, control=control, ensemble=ensemble)
        folders = [arm.folder for arm in arms]
        family = _Family(student, rows, out, captured, loading, probe, stop, progress, folders)
        if not (out / GENERATIONS).exists():
            write_json(out / GENERATIONS, make_report(out, count, settings.best, []).to_json())
        given: list[Teacher] = [first]
        del first, teacher
        done: list[Trained] = []
        try:
            for arm in arms:
                family.prepare(arm, arms, given)
                done.append(family.train(arm))
        except Stopped:
            pass
        notes = family.notes
        report = make_report(out, count, settings.best, done, complete=len(done) == len(arms), notes=notes)
        report = plotted(report) if report.complete else report
        write_json(out / GENERATIONS, report.to_json())
        return report


def _arms(count: int, out: Path, settings: TrainSettings, *, control: bool, ensemble: bool) -> list[_Arm]:
    """The students, in the order in which they are trained."""
    place = [out / f"generation-{number}" for number in range(1, count + 1)]
    found = [
        _Arm(
            f"generation {number}", folder / "run", folder / "cache",
            replace(settings, seed=settings.seed + number - 1),
            "the teacher" if number == 1 else f"the student of generation {number - 1}",
        )
        for number, folder in enumerate(place, 1)
    ]  # fmt: skip
    if control:
        alone = replace(settings, alpha=1.0, alpha_end=None)
        found.insert(1, _Arm("control", out / "control", place[0] / "cache", alone, "hard labels alone"))
    if ensemble and count > 1:
        folder, own = out / "ensemble", replace(settings, seed=settings.seed + count)
        found.append(_Arm("ensemble", folder / "run", folder / "cache", own, f"the mean of {count} teachers"))
    return found


class _Family:
    """Makes the cache of each student, trains it, and evaluates it on the held-out split of the first cache."""

    def __init__(
        self,
        student: Any,
        data: Documents | Examples,
        out: Path,
        captured: CaptureSettings,
        loading: ModelSettings,
        identity: dict[str, Any],
        stop: Stop,
        progress: str,
        folders: Sequence[Path],
    ) -> None:
        self._student, self._data, self._out, self._folders = student, data, out, folders
        self._captured, self._loading, self._identity = captured, loading, identity
        self._stop, self._progress = stop, progress
        self._examples = data if isinstance(data, Examples) else None
        self._say = notes_only(progress)
        self.notes: list[str] = []

    @property
    def _first(self) -> Path:
        return self._out / "generation-1" / "cache"

    def prepare(self, arm: _Arm, arms: list[_Arm], given: list[Teacher]) -> None:
        """Fill the cache of a student. given: the first teacher, which is taken from the list. Raises Stopped."""
        if arm.name == "control":  # it reads that of generation 1
            return
        if arm.name == "ensemble":
            caches = [one.cache for one in arms if one.name.startswith("generation")]
            if not _sealed(arm.cache):
                self._note(f"{arm.name}: the mean of {len(caches)} caches: {arm.cache}")
            complete = mix_targets(caches, arm.cache, stop=self._stop, progress=self._progress).complete
        elif given or not _sealed(arm.cache):
            if not _sealed(arm.cache):
                self._note(f"{arm.name}: capturing {arm.says}: {arm.cache}")
            teacher, captured = given.pop() if given else self._trained_teacher(arm, arms), self._captured
            if arm.cache != self._first:
                captured = self._as_first()
            with naming(arm.name):
                report = capture(
                    teacher, self._data, arm.cache, captured, stop=self._stop, progress=self._progress,
                    notes=f"born-again {arm.name}",
                )  # fmt: skip
            if report.lost is not None:
                self._note(f"{arm.name}: {report.lost}")
            complete = report.complete
        else:
            complete = True
        if not complete or self._stop.asked:
            raise Stopped

    def train(self, arm: _Arm) -> Trained:
        """Train a student, unless it is trained; its evaluation. Raises Stopped."""
        cache = open_cache(arm.cache)
        size = inputs_of(cache, self._examples).size(arm.settings)
        settings = with_batch(arm.settings, size, begun_with([arm.folder, *self._folders]))
        done = read_result(arm.folder)
        if done is not None:
            check_finished(arm.folder, done, settings, self._identity, [describe_cache(cache)])
            write_cards(arm.folder, text=self._examples is None)  # it may have ended before its own
        else:
            self._note(f"{arm.name}: training on {arm.says}, seed {arm.settings.seed}: {arm.folder}")
            with naming(arm.name):
                report = train(
                    self._student, cache, arm.folder, settings, data=self._examples, stop=self._stop,
                    progress=self._progress,
                )  # fmt: skip
            if not report.complete:
                raise Stopped
        return Trained(arm.name, arm.says, str(arm.folder), arm.settings.seed, self._evaluation(arm, cache))

    def _evaluation(self, arm: _Arm, cache: Cache) -> Evaluation | None:
        """On the held-out split of the first cache; None if nothing is held out, or none is wanted."""
        if arm.settings.evaluate_every == 0 or not has_held_out(cache):
            return None
        first = open_cache(self._first)
        where = arm.folder if cache.spec.hash == first.spec.hash else arm.folder.parent
        if (there := read_json(where / EVALUATION)) is not None and where == arm.folder:
            return Evaluation.from_json(there)
        if there is not None and (found := Evaluation.from_json(there)).spec == first.spec.hash:
            return found
        source = self._trained(arm)
        made = make_student(source, first.spec, without_lora(arm.settings), self._examples).student
        device = local_device(arm.settings.device, TrainError)
        made.to(device).autocast = autocast_of(arm.settings.precision, device)
        found = evaluate(
            made, first, data=self._examples, batch_tokens=arm.settings.micro_tokens,
            max_positions=arm.settings.evaluate_positions, allow_partial=arm.settings.allow_partial,
        )  # fmt: skip
        write_json(where / EVALUATION, sealed(found.to_json()), indent=None)
        return found

    def _trained(self, arm: _Arm) -> Any:
        """A trained student: the folder of one of transformers, otherwise a module."""
        folder = arm.folder / STUDENT
        if any((folder / name).exists() for name in ("config.json", CONFIG)):
            return str(folder)
        made: Student = make_student(self._student, None, arm.settings, self._examples).student
        return load_trained(made.model, folder, TrainError)

    def _trained_teacher(self, arm: _Arm, arms: list[_Arm]) -> Teacher:
        """The student of the generation before, as a teacher."""
        source = self._trained([one for one in arms[: arms.index(arm)] if one.name.startswith("generation")][-1])
        if isinstance(source, str):
            return load_teacher(source, replace(self._loading, revision=None))
        return as_teacher(source.to(local_device(self._loading.device, TeacherError)), self._data)

    def _as_first(self) -> CaptureSettings:
        """The settings of a capture, with the context of the first one, whose default depends on the teacher, and the
        same documents held out."""
        first = open_cache(self._first)
        plan = read_capture_plan(first.store, first.spec)
        if plan is None:
            return self._captured
        same = replace(self._captured, held_out=plan.settings["held_out"])
        return same if self._examples is not None else replace(same, context=plan.settings["context"])

    def _note(self, text: str) -> None:
        self._say.event("note", text=text)


def _cache(place: Path) -> Cache | None:
    """The cache in a folder; None if there is none yet."""
    try:
        return open_cache(place)
    except CacheError as error:
        if isinstance(error, NotFound) or isinstance(error.__cause__, NotFound):
            return None
        raise


def _sealed(place: Path) -> bool:
    """Whether there is a cache with all its shards."""
    return (cache := _cache(place)) is not None and cache.sealed


def _check_arguments(
    count: int, settings: TrainSettings, captured: CaptureSettings, out: Path, *, ensemble: bool
) -> None:
    """Everything that can be said without the teacher."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise TrainError(f"generations: got {count!r}; expected an integer from 1 on.")
    if (processes := dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise TrainError(
            f"generations: got {processes} processes; expected one. Under torchrun, run each generation by fastkd "
            "capture and fastkd train."
        )
    if settings.match:
        raise TrainError(
            "match: got features; expected none, as the layers of one generation's teacher are not the next one's."
        )
    check_folder(out, "generations")
    check_capture(captured)
    there = _cache(out / "ensemble" / "cache")
    found = there and re.match(r"mean of (\d+) caches", there.spec.teacher)
    if found and int(found[1]) != count and ensemble:
        raise TrainError(
            f"generations: got {count}; expected {found[1]}, of which {out / 'ensemble'} is the mean. Delete that "
            "folder, and the same command goes on."
        )


def _check_student(
    student: Any,
    teacher: Teacher,
    data: Documents | Examples,
    settings: TrainSettings,
    captured: CaptureSettings,
    *,
    alone: bool,
    ensemble: bool,
) -> dict[str, Any]:
    """Name and size of the student. TrainError if it cannot be trained from the caches, or be the next teacher."""
    text = {} if isinstance(data, Examples) else data.text_settings
    tokenizer = Identity.of(text["tokenizer"]) if "tokenizer" in text else None
    source = Provenance(tokenizer=tokenizer, loss_on=text.get("loss_on"))
    spec: CacheSpec = cache_spec(
        captured, vocab_size=teacher.vocab_size, inputs=EXAMPLE_COLUMNS if isinstance(data, Examples) else ("tokens",),
        shard_positions=captured.shard_positions or 2**20, tokenizer=source.texts()["tokenizer"],
    )  # fmt: skip
    check_settings(settings, spec)
    if isinstance(data, Examples) and not data.labelled:
        raise TrainError("data: got examples without labels; expected Examples(..., labels=...).")
    examples = data if isinstance(data, Examples) else None
    made = make_student(student, spec, settings, examples).student
    check_exports(settings, made)
    if settings.exits:
        with_exits(settings, made, None, examples)
    if not alone and ensemble and made.vocab_size != teacher.vocab_size:
        raise TrainError(
            f"student: got a vocabulary of {made.vocab_size}; expected {teacher.vocab_size}, that of the teacher, as "
            "the targets of both are averaged for the ensemble. Give it that one, or leave the ensemble out "
            "(--no-ensemble)."
        )
    longest = captured.context or min(DEFAULT_CONTEXT, teacher.max_positions or DEFAULT_CONTEXT)
    if not isinstance(data, Examples) and made.max_positions is not None and made.max_positions < longest:
        raise TrainError(
            f"student: it takes {made.max_positions} tokens; expected {longest}, the context of the capture. Use "
            f"context={made.max_positions} or less."
        )
    return {"name": made.name, "parameters": made.parameters_and_bytes[0]}
