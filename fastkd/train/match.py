"""`fastkd match`: how alike a student and the features of a cache are, and a student initialised by what matched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..cache.errors import type_name
from ..cache.reader import Cache
from ..data.examples import Examples, as_examples
from ..errors import TeacherError, TrainError
from ..kernels.features.losses import feature_loss_names
from ..models.adapters import has_adapters
from ..models.hf import load_causal_lm
from ..models.hub import resolve as find_files
from ..models.taps import layers_of
from ..settings import TrainSettings
from ..stream.batch import MicroBatch
from ..stream.cached import CachedSource
from ..utils.atomic import check_place
from ..utils.factories import is_factory, made_by
from .layer_init import Initialised, initialise, sources
from .matched import student_layers
from .matching import entered, resolve
from .result import write_student
from .similarity import POSITIONS, Similarity, similarity
from .student import LoadedStudent, Student, check_source, make_student

DEFAULTS = TrainSettings()
_INIT_POSITIONS = 16384  # of the least squares


@dataclass(frozen=True)
class MatchReport:
    """similarity: before anything was changed. initialised, folder: of the student that was written, if one was asked
    for. notes: for the user, a line each."""

    similarity: Similarity
    initialised: Initialised | None = None
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """For a terminal."""
        if self.initialised is None:
            return self.similarity.text
        return "\n".join([self.similarity.text, "", self.initialised.text, f"student: {self.folder}"])

    def to_json(self) -> dict[str, Any]:
        found = self.similarity.to_json()
        if self.initialised is not None:
            one = self.initialised
            found["init"] = {"layers": list(one.layers), "embedding": one.embedding, "norm": one.norm}
            found["init"] |= {"lm_head": one.lm_head, "notes": one.notes, "student": str(self.folder)}
        return found


def match(
    student: Any,
    cache: Cache,
    *,
    features: Sequence[str] = (),
    positions: int = POSITIONS,
    data: Examples | None = None,
    teacher: Any = None,
    init: Path | None = None,
    match: Sequence[str] = ("auto",),
    settings: TrainSettings = DEFAULTS,
) -> MatchReport:
    """Compare a student (see `make_student`) with the features of a cache; see `similarity`.

    teacher, init: the cache's teacher, as a folder, a name, module:factory or a model; and a folder, into which a
    student is written whose layers are the teacher's, by the entries `match` (see `layer_init`).
    Raises TrainError and StreamError, before anything is written.
    """
    if (teacher is None) != (init is None):
        there, missing = ("init", "teacher") if teacher is None else ("teacher", "init")
        raise TrainError(f"{there}, {missing}: got {there} alone; expected both, or neither.")
    if positions < 16:
        raise TrainError(f"positions: got {positions}; expected at least 16.")
    if init is not None and init.exists() and (not init.is_dir() or any(init.iterdir())):
        raise TrainError(f"init: got {str(init)!r}, which has files; expected a new folder, or an empty one.")
    data = as_examples(data)
    check_source(student, settings)
    if init is not None:
        check_place(init, "init", TrainError)
        if isinstance(teacher, (str, Path)) and not is_factory(str(teacher)):
            try:
                find_files(teacher)  # before the student is loaded and run
            except TeacherError as error:
                raise TrainError(f"teacher: {error}") from error
    made = make_student(student, cache.spec, settings, data)
    if init is not None and has_adapters(made.student.model):
        raise TrainError("init: got a student with an adapter; expected a whole model, as its own weights are written.")
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    made.student.to(device)
    found = similarity(
        made.student, cache, features=features, positions=positions, data=data, seed=settings.seed,
        allow_partial=settings.allow_partial,
    )  # fmt: skip
    if init is None:
        return MatchReport(found, notes=made.student.notes)
    done = _initialised(made, _teacher(teacher, settings), cache, match, settings)
    tensors = {f"model.{name}": x.detach().cpu() for name, x in made.student.model.state_dict().items()}
    write_student(init, made.student.cpu(), tensors, made.tokenizer)
    return MatchReport(found, done, init, made.student.notes)


def _initialised(
    made: LoadedStudent, teacher: Any, cache: Cache, match: Sequence[str], settings: TrainSettings
) -> Initialised:
    student, count = made.student, len(layers_of(teacher))
    specs = {name: cache.features[name].spec for name in cache.features}
    about = student_layers(student)
    resolved = resolve(match, specs, about, feature_loss_names())
    states = [(entered(specs[one.teacher]), int(one.student)) for one in resolved.matches if one.output[:5] == "state"]
    if layers := {spec.layers for spec in specs.values() if spec.layers not in (None, count)}:
        raise TrainError(f"teacher: got one with {count} layers; expected the cache's, with {layers.pop()}.")
    teacher.to(next(student.parameters()).device)
    return initialise(student, teacher, sources(about, count, states), _slice(cache, student, settings))


def _slice(cache: Cache, student: Student, settings: TrainSettings) -> Iterator[MicroBatch]:
    """Micro-batches of a part of the cache."""
    source = CachedSource(
        cache, batch_tokens=4096, micro_tokens=4096, seed=settings.seed, device=next(student.parameters()).device,
        allow_partial=settings.allow_partial,
    )  # fmt: skip
    done = 0
    try:
        for step in source:
            for batch in step.micro_batches:
                yield batch
                done += batch.positions
                if done >= _INIT_POSITIONS:
                    return
    finally:
        source.close()


def _teacher(teacher: Any, settings: TrainSettings) -> Any:
    """A teacher's model, in float32."""
    if isinstance(teacher, str) and is_factory(teacher):
        teacher = made_by(teacher, TrainError)
    if isinstance(teacher, torch.nn.Module):
        return teacher.float()
    if not isinstance(teacher, (str, Path)):
        raise TrainError(f"teacher: got {type_name(teacher)}; expected a folder, a name, or a torch module.")
    try:
        files = find_files(teacher)
        options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code, "dtype": torch.float32}
        return load_causal_lm(teacher, files, notes=[], **options)
    except TeacherError as error:
        raise TrainError(f"teacher: {error}") from error
