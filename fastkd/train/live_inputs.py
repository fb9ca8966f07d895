"""LiveInputs: data without a cache, answered by a teacher beside the student, inside its forward, or by nobody."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..cache.reader import open_cache
from ..cache.spec import CacheSpec
from ..cache.stores import MemoryStore, Store, open_store
from ..capture.answers import check_limits
from ..capture.claims import Claims
from ..capture.existing import check_continues
from ..capture.feature_settings import check_feature_settings
from ..capture.features.prepare import Feature
from ..capture.probe import agree_on_probe
from ..capture.teacher_pass import TeacherPass
from ..data.documents import Documents
from ..data.examples import Examples
from ..data.sources import open_source
from ..errors import DataError, TeacherError, TrainError
from ..live.planned import NoTeacher, PlannedShards, plan_shards
from ..live.source import LiveSource
from ..live.write_through import WriteThrough, begin_planned
from ..models.tokenizers import Tokenizer
from ..settings import DataSettings, LiveSettings, ModelSettings, TrainSettings
from ..stream.batch import BatchSource
from ..stream.buckets import up_to
from ..teachers.load import (
    Check,
    accept,
    as_data,
    as_teacher,
    load_teacher,
    named_tokenizer,
    own_tokenizer,
)  # fmt: skip
from ..teachers.protocol import Teacher
from ..utils.distributed import ALONE, Processes
from ..utils.output_guard import check_store
from ..utils.signals import Stop
from ..utils.words import words_of
from .batch import Size
from .held_out import HeldOut
from .inputs import Finished, Inputs, size_of, source_options, train_size
from .matched import matched_objective, signals_of
from .matching import Match, parse
from .objective import Objective, TokenKD, WeightedSum
from .outline import HeldOutSize
from .student import LoadedStudent, Student
from .teacher_kinds import MakeTeacher, find_kind

if TYPE_CHECKING:
    from ..evaluate.api import Evaluation

DEFAULTS = LiveSettings()
_INSTEAD = (
    "Capture a cache first (fastkd capture) and train from it, or use another teacher_dtype, smaller teacher batches "
    "(teacher_batch_tokens) or smaller micro-batches (micro_tokens)."
)


def check_arguments(cache: Any, teacher: Any, data: Any, write_cache: Any, settings: TrainSettings,
                    objective: Objective | None, *, rollouts: bool = False) -> None:  # fmt: skip
    """Raise TrainError unless these arguments of `train` fit together. Nothing is loaded. rollouts: whether a teacher
    beside a cache has something to do."""
    if cache is not None:
        for name, value in (("teacher", None if rollouts else teacher), ("write_cache", write_cache)):
            if value is not None:
                raise TrainError(
                    f"cache, {name}: got both; expected one of them: a cache has its targets already. Leave one out."
                )
        return
    if data is None:
        got = "a teacher without data" if teacher is not None else "neither"
        raise TrainError(f"cache, data: got {got}; expected a cache, or the data to train on (and a teacher).")
    if teacher is None and reads_answers(settings, objective):
        what = f"match={', '.join(settings.match)}" if settings.match else f"alpha={settings.alpha:g}"
        raise TrainError(
            f"teacher: got none, and {what}; expected a teacher or a cache, or alpha=1 to train on labels alone."
        )
    if is_inside(teacher) and not reads_answers(settings, objective):
        raise TrainError(
            f"teacher: got {teacher!r}, and alpha=1; expected none, as labels alone are learned, or a smaller alpha."
        )
    if settings.match and is_inside(teacher):
        raise TrainError(
            f"match: got {', '.join(settings.match)}, and the teacher {teacher}; expected a cache, or a teacher beside "
            "the student: inner states of an average of the student are not matched."
        )
    if write_cache is not None and (teacher is None or is_inside(teacher)):
        got = "none" if teacher is None else repr(teacher)
        raise TrainError(f"write_cache: got the teacher {got}; expected one that is not made of the student.")


def live_identity(live: LiveSettings, data: Any) -> dict[str, Any]:
    """What is known of the fingerprint of the source of a live teacher before that is loaded; see
    `PlannedShards.describe`."""
    names = ["k", "draws", "draw_temperature", "mass", "temperatures", "data_seed"]
    if not isinstance(data, Examples):
        names += ["packing", "on_long", "overlap"]
        names += [name for name in ("context", "shard_positions") if getattr(live, name) is not None]
    return {name: getattr(live, name) for name in names}


def feature_names(settings: TrainSettings) -> tuple[str, ...]:
    """The hidden states of the teacher that a training matches. Raises TrainError for auto."""
    entries = [parse(text) for text in settings.match]
    if not all(isinstance(one, Match) for one in entries):
        raise TrainError(
            f"match: got {', '.join(settings.match)} without a cache; expected entries that name the teacher's layers "
            "(20:16:mse:0.1), or a cache whose features auto chooses from."
        )
    return tuple(dict.fromkeys(one.teacher for one in entries if isinstance(one, Match)))


def is_inside(teacher: Any) -> bool:
    """Whether a teacher is made of the student, by its name."""
    return isinstance(teacher, str) and find_kind(teacher) is not None


def reads_answers(settings: TrainSettings, objective: Objective | None) -> bool:
    """Whether a training needs the answers of a teacher: it has a soft loss, or matches features.

    objective: None for the `TokenKD` of the settings. One of another class may have an attribute `reads_answers`; else
        it is taken to need them if it reads targets or features.
    """
    if settings.match:
        return True
    if objective is None:
        objective = TokenKD.from_settings(settings)
    if isinstance(objective, WeightedSum):
        plain = TrainSettings()
        return any(reads_answers(plain, term) for term in objective.terms.values())
    if isinstance(objective, TokenKD):
        return not (float(objective.config.alpha) == 1 and objective.alpha_end in (None, 1))
    read = any(name == "targets" or name.startswith("features/") for name in objective.signals)
    return bool(getattr(objective, "reads_answers", read))


class LiveInputs(Inputs):
    """Data that are divided as by a capture, with targets that are made during the training.

    teacher: answers beside the student. make: makes a teacher of the student, which answers inside its forward. Neither
    of them: labels alone. data: what `as_data` takes. named: the teacher, for run.json. write_cache: where what the
    teacher answers is committed, and read from; notes: for that cache. features: hidden states of the teacher that are
    matched; their bases are kept in the cache that is written, or in a folder. stop: ends the capture of a shard.
    """

    live = True

    def __init__(
        self,
        teacher: Teacher | None,
        data: Any,
        settings: LiveSettings = DEFAULTS,
        *,
        make: MakeTeacher | None = None,
        named: str = "",
        write_cache: Store | None = None,
        notes: str = "",
        features: Sequence[str] = (),
        folder: Path | None = None,
        processes: Processes = ALONE,
        stop: Stop | None = None,
        tokenizer: Tokenizer | str | None = None,
        allow_other_tokenizer: bool = False,
        trust_remote_code: bool = False,
        progress: bool = False,
    ) -> None:
        self._teacher, self._make, self._settings, self._named = teacher, make, settings, named
        self._source, self._progress = data, progress
        self._reading = {"allow_other_tokenizer": allow_other_tokenizer, "trust_remote_code": trust_remote_code}
        self._tokenizer = tokenizer
        self.data = data if isinstance(data, Examples) else None
        self._store, self._notes = write_cache, notes
        self._names, self._folder, self._processes, self._stop = tuple(features), folder, processes, stop
        self._planned: PlannedShards | None = None
        self._written: WriteThrough | None = None
        self._features: list[Feature] = []
        if teacher is not None:
            self._planned = self._plan(teacher, tokenizer)

    @property
    def teacher(self) -> Teacher | None:
        """What answers beside the student, if anything does."""
        return self._teacher

    @property
    def spec(self) -> CacheSpec | None:
        return None if self._teacher is None or self._planned is None else self._planned.spec

    @property
    def planned(self) -> PlannedShards:
        """The data, divided; without a teacher, they are once the student is made."""
        assert self._planned is not None, "meet() comes first"
        return self._planned

    def _plan(self, teacher: Teacher, tokenizer: Any) -> PlannedShards:
        settings = self._settings
        data = as_data(
            self._source,
            teacher,
            column=settings.column,
            text_documents=settings.text_documents,
            tokenizer=tokenizer,
            template=settings.template,
            loss_on=settings.loss_on,
            **self._reading,
        )
        given = None if isinstance(teacher, NoTeacher) else teacher
        return plan_shards(
            data, given, settings.capture_settings(self._names), vocab_size=teacher.vocab_size,
            max_positions=teacher.max_positions, store=self._store, notes=self._notes, progress=self._progress,
        )  # fmt: skip

    def meet(self, made: LoadedStudent, settings: TrainSettings, objective: Objective | None) -> None:
        super().meet(made, settings, objective)
        student = made.student
        if self.buckets is not None and self._teacher is not None:
            self.buckets = up_to(self.buckets, self._teacher.max_positions)
        if self._planned is None:
            if self._settings.template is not None and self._tokenizer is None:
                raise DataError("template: got one without a teacher; expected the tokenizer that it is for as well.")
            self._planned = self._plan(
                NoTeacher(student.vocab_size, student.max_positions), self._tokenizer or made.tokenizer
            )
        self._check_length(student)
        self._check_vocabulary(made)
        reads = reads_answers(settings, objective)
        if reads and self._make is not None:
            student.live = self._make(student, self._planned.settings)
        if reads and (objective is None or isinstance(objective, TokenKD)):
            (objective or TokenKD.from_settings(settings)).check_cache(self._planned.spec)

    def _check_vocabulary(self, made: LoadedStudent) -> None:
        """Raise TrainError unless student and teacher speak of the same tokens; a student may be padded."""
        teacher, student, ours = self._teacher, made.student, made.tokenizer
        if teacher is None or self._reading["allow_other_tokenizer"]:
            return
        theirs = _tokenizer_of(teacher)
        if ours is not None and theirs is not None and ours.identity != theirs.identity:
            raise TrainError(
                f"tokenizer {ours.name} (sha256 {ours.identity[:12]}…) is not the teacher's, {theirs.name} (sha256 "
                f"{theirs.identity[:12]}…): their ids mean other tokens. Use a student of the teacher's tokenizer, or "
                "--allow-other-tokenizer if both give the same ids."
            )
        if student.vocab_size > teacher.vocab_size and (ours is None or ours.vocab_size > teacher.vocab_size):
            raise TrainError(
                f"teacher: got a vocabulary of {teacher.vocab_size}; expected that of {student.name}, "
                f"{student.vocab_size}. Use a teacher of the student's vocabulary, or --allow-other-tokenizer if the "
                "student's further outputs are padding."
            )

    def _check_length(self, student: Student) -> None:
        plan, most = self.planned.plan, student.max_positions
        if most is not None and (longest := min(int(plan.lengths.max()), plan.settings.context)) > most:
            raise TrainError(
                f"{student.name}: got sequences of up to {longest} tokens; this student takes {most}. Use a student "
                f"with a longer context, or context={most}."
            )

    def matched(self, settings: TrainSettings, student: Student, objective: Objective | None) -> Objective | None:
        if not settings.match:
            return objective
        assert self._teacher is not None
        if self._cache() is not None:
            place = self._store
        else:
            place = open_store(self._folder, create=True) if self._folder is not None else MemoryStore()
            claims = Claims(place, self._processes.rank, self._processes.world_size)
            with ExitStack() as stack:
                teacher_pass = TeacherPass(self._teacher, self.planned.settings)
                begun = begin_planned(self.planned, teacher_pass, place, claims, stack, self._names)
            self._features = begun.features
        caches = [open_cache(place)]
        return matched_objective(settings, caches, student, objective=objective, data=self.data)

    def open(
        self, settings: TrainSettings, processes: Processes = ALONE, objective: Objective | None = None
    ) -> BatchSource:
        written = self._cache()
        teacher = self._teacher if written is not None or reads_answers(settings, objective) else None
        read = () if objective is None else signals_of(objective).get("features", ())
        features = [one for one in self._features if one.name in read]
        alone = written is None and self._folder is not None and processes.rank == 0
        if teacher is not None and hasattr(teacher, "probe") and alone:
            agree_on_probe(teacher, open_store(self._folder, create=True))
        options = source_options(settings, processes) | {"buckets": self.buckets}
        return LiveSource(self.planned, teacher, write_cache=written, features=features, **options)

    def _cache(self) -> WriteThrough | None:
        """The cache that is written, opened when it is first needed: once all else is checked."""
        if self._written is None and self._store is not None:
            assert self._teacher is not None
            processes = self._processes
            self._written = WriteThrough.open(
                self.planned,
                self._teacher,
                self._store,
                features=self._names,
                rank=processes.rank,
                world_size=processes.world_size,
                stop=self._stop,
            )
            self._features = self._written.features
        return self._written

    def nothing_held_out(self) -> str:
        documents = words_of(self.planned.spec.inputs).documents
        return "" if self.planned.has_held_out else f"no {documents} are held out (held_out)."

    def held_out(self, settings: TrainSettings, processes: Processes) -> HeldOut:
        table = self.planned.table("held_out", max_positions=settings.evaluate_positions, limit="evaluate_positions")
        return HeldOut(
            [partial(self._evaluate, settings=settings, processes=processes)], [1.0],
            sequences=int(table.sequences.sum()), positions=int(table.positions.sum()),
        )  # fmt: skip

    def held_out_size(self, settings: TrainSettings) -> HeldOutSize | None:
        if self._planned is None or self.nothing_held_out():
            return None
        table = self.planned.table("held_out", max_positions=settings.evaluate_positions)
        return size_of(table, self.planned.plan.capture_plan(), self.data)

    def size(self, settings: TrainSettings) -> Size | None:
        if self._planned is None:
            return None
        table = self.planned.table("train", skip=settings.skip, max_positions=settings.max_positions)
        return train_size(table, self.planned.plan.capture_plan(), self.data)

    def _evaluate(self, student: Student, *, settings: TrainSettings, processes: Processes) -> "Evaluation":
        from ..evaluate.api import evaluate, evaluation_sizes

        totals, spec = self.planned.plan.totals, self.planned.spec
        sizes = evaluation_sizes(totals["positions"], totals["windows"], spec.vocab_size, settings.micro_tokens)
        source = LiveSource(
            self.planned, self._teacher, split="held_out", shuffle=False, max_positions=settings.evaluate_positions,
            device=processes.device, write_cache=self._cache(), buckets=self.buckets, **sizes,
        )  # fmt: skip
        try:
            return evaluate(student, source, processes=processes)
        finally:
            source.close()

    def describe(self) -> Mapping[str, Any]:
        planned = self.planned
        settings = {name: str(x) if isinstance(x, Path) else x for name, x in asdict(self._settings).items()}
        about = {"teacher": self._named or None, "data": getattr(planned.data, "name", type(planned.data).__name__)}
        live = {**about, "plan": planned.plan.totals, "settings": settings, "identity": planned.describe()}
        if self._store is not None:
            live["write_cache"] = self._store.describe()
        return {"caches": [], "live": live}

    def finish(self, processes: Processes) -> Finished:
        if self._written is None:
            return Finished()
        report = self._written.finish()
        processes.wait()
        where = self._store.describe() if self._store is not None else ""
        if report is None:
            left = len(self._written.missing())
            return Finished(
                f"{where}: {left} of {self.planned.plan.shards} shards are not written, as this training did not read "
                "them; a longer one, or fastkd capture with the same settings, goes on."
            )
        if report.complete:
            return Finished(f"{where}: the cache is complete and sealed")
        return Finished(f"{where}: {len(self._written.missing())} shards are not written", complete=False)

    def close(self) -> None:
        if self._written is not None:
            self._written.close()


def _tokenizer_of(teacher: Teacher) -> Tokenizer | None:
    """The tokenizer in a teacher's folder; None if it has none."""
    try:
        return own_tokenizer(teacher)
    except (TeacherError, DataError):
        return None


def load_inputs(
    teacher: Any,
    data: Any,
    settings: TrainSettings,
    live: LiveSettings = DEFAULTS,
    *,
    write_cache: Any = None,
    folder: Path | None = None,
    processes: Processes = ALONE,
    stop: Stop | None = None,
    progress: bool = False,
) -> LiveInputs:
    """The inputs of a training without a cache: loads the teacher, and plans the data.

    teacher: a `Teacher`, a torch module, a name (see `load_teacher`), KIND:TEXT of one that is made of the student (see
        `teacher_kinds`), or None for labels alone. data: `Documents`, `Examples`, files, a `Dataset` or documents.
    write_cache: a folder, a URL or a `Store`, to write what the teacher answers to. folder: for the bases
    of features, if they are not in a cache that is written. stop: ends the capture of a shard for that cache.
    Raises TeacherError, DataError and TrainError.
    """
    store = None
    if write_cache is not None:
        store = open_store(write_cache, create=True)
        check_store(store)
    captured = live.capture_settings(feature_names(settings))
    check_feature_settings(captured)
    named_tokenizer(None, live.template)
    if not isinstance(data, (Documents, Examples)):
        data = open_source(data, live.column, live.text_documents)
    make = find_kind(teacher) if isinstance(teacher, str) else None
    loaded, named = None, str(teacher) if isinstance(teacher, (str, Path)) else type(teacher).__name__
    if teacher is not None and make is None:
        if store is not None and isinstance(teacher, (str, Path)):
            reading = DataSettings(
                data=(), loss_on=live.loss_on, template=live.template, tokenizer=settings.tokenizer,
                allow_other_tokenizer=settings.allow_other_tokenizer,
            )  # fmt: skip
            how = _model_settings(settings, live, processes)
            check_continues(store, captured, data, teacher=teacher, model=how, data=reading)
        check = partial(check_limits, settings=captured, out=store)
        try:
            loaded = load_beside(teacher, data, settings, live, processes, progress, check)
        except torch.OutOfMemoryError as error:
            raise TrainError(
                f"teacher: {named} does not fit into the memory of {processes.device}. {_INSTEAD}"
            ) from error
        check(loaded)
        place = store or (open_store(folder) if folder is not None and folder.is_dir() else None)
        if place is not None:
            agree_on_probe(loaded, place, write=store is not None)
        if not isinstance(teacher, (str, Path)):
            named = getattr(loaded, "name", named)
    return LiveInputs(
        loaded,
        data,
        live,
        make=make,
        write_cache=store,
        features=feature_names(settings),
        folder=folder,
        processes=processes,
        stop=stop,
        notes=f"teacher {getattr(loaded, 'name', named)}" if isinstance(teacher, (str, Path)) else "",
        named=named if teacher is not None else "",
        tokenizer=settings.tokenizer,
        allow_other_tokenizer=settings.allow_other_tokenizer,
        trust_remote_code=settings.trust_remote_code,
        progress=progress,
    )


def load_beside(
    teacher: Any,
    data: Any,
    settings: TrainSettings,
    live: LiveSettings,
    processes: Processes,
    progress: bool = False,
    check: Check = accept,
) -> Teacher:
    """A teacher on the student's device. data, check: see `as_teacher`. Raises TeacherError."""
    if not isinstance(teacher, (str, Path)):
        return as_teacher(teacher, data)
    return load_teacher(teacher, _model_settings(settings, live, processes), data, progress=progress, check=check)


def _model_settings(settings: TrainSettings, live: LiveSettings, processes: Processes) -> ModelSettings:
    """How the teacher of a training is loaded."""
    return ModelSettings(
        revision=live.teacher_revision,
        dtype=live.teacher_dtype,
        attention=live.teacher_attention,
        device=str(processes.device),
        teacher_options=live.teacher_options,
        trust_remote_code=settings.trust_remote_code,
    )
