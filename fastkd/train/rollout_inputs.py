"""RolloutInputs: caches, or data with a live teacher, of whose sequences the student continues a part itself."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cache.errors import type_name
from ..cache.spec import CacheSpec
from ..capture.api import capture
from ..errors import TeacherError, TrainError
from ..live.rollouts import RolloutSource
from ..live.rounds import FOLDER
from ..settings import CaptureSettings, RolloutSettings, TrainSettings
from ..stream.batch import BatchSource
from ..stream.shard_source import ShardSource
from ..teachers.load import own_tokenizer
from ..teachers.protocol import Teacher
from ..utils.distributed import ALONE, Processes
from ..utils.signals import Stop
from .batch import Size
from .held_out import HeldOut
from .inputs import Finished, Inputs
from .objective import Objective
from .on_policy import OnPolicyKD
from .outline import HeldOutSize, steps_of
from .settings_check import stated
from .student import LoadedStudent, Student


class RolloutInputs(Inputs):
    """Inputs with rollouts.

    base: those (of caches, or of a live teacher) whose sequences are continued, and on which the student is evaluated.
    teacher: scores the continuations, unless others do; None if it is not known. out: the run's folder.
    named: the teacher, for the command with which others score; "" if it has no name. teacher_batch_tokens: of a
    forward of the teacher, at most. stop: ends the scoring of a round. Raises TrainError for a teacher of another
    vocabulary or tokenizer.
    """

    def __init__(
        self,
        base: Inputs,
        teacher: Teacher | None,
        rollouts: RolloutSettings,
        out: Path,
        *,
        teacher_batch_tokens: int = 8192,
        stop: Stop | None = None,
        named: str = "",
    ) -> None:
        if teacher is not None and base.spec is not None:
            check_teacher(teacher, base.spec)
        self._base, self._teacher, self._rollouts, self._folder = base, teacher, rollouts, out / FOLDER
        self._batch_tokens, self._stop, self._named = teacher_batch_tokens, stop or Stop(), named
        self.caches, self.weights, self.data, self.live = base.caches, base.weights, base.data, base.live

    @property
    def spec(self) -> CacheSpec | None:
        return self._base.spec

    @property
    def control(self) -> Inputs:
        return self._base

    def meet(self, made: LoadedStudent, settings: TrainSettings, objective: Objective | None) -> None:
        self._base.meet(made, settings, objective)
        spec, eos = self._base.spec, self._rollouts.rollout_eos
        vocab_size = made.student.vocab_size if spec is None else spec.vocab_size
        if eos is not None and eos >= vocab_size:
            raise TrainError(
                f"rollout_eos: got {eos}; expected a token of the vocabulary, from 0 to {vocab_size - 1}. Use the end "
                "of a sequence in the student's tokenizer."
            )

    def matched(self, settings: TrainSettings, student: Student, objective: Objective | None) -> Objective:
        return OnPolicyKD.from_settings(settings)

    def open(
        self, settings: TrainSettings, processes: Processes = ALONE, objective: Objective | None = None
    ) -> BatchSource:
        base = self._base.open(settings, processes, objective)
        if not isinstance(base, ShardSource):
            raise TrainError(f"rollouts: got {type_name(base)}; expected a cache, or a teacher and data.")
        if "tokens" not in base.form.spec.inputs:
            raise TrainError("rollouts: got data of examples; expected text, which can be continued.")
        teacher = self._teacher

        def score(tokens: Path, cache: Path, how: CaptureSettings) -> None:
            rank, world_size = processes.rank, processes.world_size
            capture(teacher, tokens, cache, how, rank=rank, world_size=world_size, stop=self._stop)

        return RolloutSource(
            base,
            self._folder,
            self._rollouts,
            seed=settings.seed,
            limit=None if teacher is None else teacher.max_positions,
            score=score if self._rollouts.rollout_scoring == "here" else None,
            teacher=self._named,
            teacher_batch_tokens=self._batch_tokens,
            wait_minutes=settings.timeout_minutes,
            processes=processes,
            stop=self._stop,
            steps=steps_of(settings, len(base)),
            run=stated(asdict(settings)),
        )

    def nothing_held_out(self) -> str:
        return self._base.nothing_held_out()

    def held_out(self, settings: TrainSettings, processes: Processes) -> HeldOut:
        return self._base.held_out(settings, processes)

    def held_out_size(self, settings: TrainSettings) -> HeldOutSize | None:
        return self._base.held_out_size(settings)

    def size(self, settings: TrainSettings) -> Size | None:
        return self._base.size(settings)

    def describe(self) -> Mapping[str, Any]:
        return {**(self._base.describe() or {}), "rollouts": asdict(self._rollouts)}

    def finish(self, processes: Processes) -> Finished:
        return self._base.finish(processes)

    def close(self) -> None:
        self._base.close()


def check_rollouts(
    rollouts: RolloutSettings, settings: TrainSettings, teacher: Any, objective: Objective | None, *, inside: bool
) -> None:
    """Raise TrainError, naming it, for a setting that is not possible, or not with these arguments of `train`. Nothing
    is loaded. inside: whether the teacher is made of the student."""
    for name, low, high in (("rollouts", 0.0, 1.0), ("rollout_temperature", 0.0, 1000.0)):
        if not (low <= (number := getattr(rollouts, name)) <= high and math.isfinite(number)):
            raise TrainError(f"{name}: got {number!r}; expected a number from {low:g} to {high:g}.")
    for name in ("rollout_tokens", "rollout_every", "rollout_batch", "rollout_prompt", "rollout_eos"):
        count, least = getattr(rollouts, name), int(name != "rollout_eos")
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < least):
            raise TrainError(f"{name}: got {count!r}; expected an integer from {least} on.")
    if (scoring := rollouts.rollout_scoring) not in ("here", "external"):
        raise TrainError(f"rollout_scoring: got {scoring!r}; expected here or external.")
    if not rollouts.rollouts:
        return
    problem = ""
    if settings.parallel == "fsdp":
        problem = "parallel='fsdp'; expected ddp: a sharded student cannot generate"
    elif settings.match:
        problem = f"match={', '.join(settings.match)}; expected none: rollouts have no features"
    elif settings.exits:
        problem = f"exits={settings.exits!r}; expected none"
    elif objective is not None:
        problem = f"the objective {type(objective).__name__}; expected none: rollouts have the loss of the settings"
    elif inside:
        problem = f"the teacher {teacher!r}, made of the student; expected one that is not"
    elif teacher is None and scoring == "here":
        problem = (
            "no teacher; expected one that scores what the student says (teacher), or rollout_scoring='external' if "
            "others do"
        )
    if problem:
        raise TrainError(f"rollouts: got {problem}.")


def check_teacher(teacher: Teacher, spec: CacheSpec) -> None:
    """Raise TrainError unless a teacher has the vocabulary and the tokenizer of data of this spec."""
    if teacher.vocab_size != spec.vocab_size:
        raise TrainError(
            f"rollouts: got a teacher with a vocabulary of {teacher.vocab_size}; expected {spec.vocab_size}, that of "
            "the cache. Use a teacher of the cache's tokenizer."
        )
    known = spec.provenance.tokenizer and spec.provenance.tokenizer.sha256
    if not known:
        return
    try:
        own = own_tokenizer(teacher)
    except TeacherError:  # it has none, so nothing is known of it
        return
    if own is not None and own.identity != known:
        raise TrainError(
            f"rollouts: got a teacher with the tokenizer {own.name} (sha256 {own.identity[:12]}…); expected the "
            f"cache's (sha256 {known[:12]}…): the student's tokens mean others to this teacher."
        )
