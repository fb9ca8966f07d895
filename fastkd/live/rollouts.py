"""RolloutSource: steps of a base source, of which a part of the sequences is continued by the student itself.

On-policy distillation (Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024): the student learns from
the teacher on what it says itself, and so on the states that it gets into. A fraction of each step's sequences, chosen
by (seed, epoch, sequence), is left out of the base's micro-batches; a prefix of each is continued by the student, and
the continuation is trained on in micro-batches of their own (`RolloutBatch`), by the teacher's targets for it.

The sequences of `rollout_every` steps make a round: they are continued at once, with the student's weights before the
first of these steps. A round is committed (`rounds.py`: tokens, then targets) before it is trained on, so a run that is
killed reads it again, or makes it again from the same weights.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.reader import Cache
from ..cache.workspace import Workspace
from ..errors import StreamError, WorkRemains
from ..models.module import state_sha256
from ..settings import CaptureSettings, RolloutSettings
from ..stream.batch import AnyBatch, MicroBatch, Step
from ..stream.gather import BatchFormat, OpenShard, gather, open_shard
from ..stream.mixture import MixedSequences
from ..stream.shard_source import ShardSource
from ..stream.split import open_split
from ..stream.step_plan import split_over_ranks
from ..utils.distributed import ALONE, Processes
from ..utils.signals import Stop, Stopped
from .generators import Sampling, SamplingStudent, find
from .prompts import PromptRule, chosen
from .rounds import Rollouts, Rounds, scoring_command, scoring_settings, text_settings_of
from .sampling import keys_of

Ints = NDArray[np.int64]
VERSION = 1  # of the state
MAY_CHANGE = ("rollout_batch", "rollout_generator", "rollout_scoring")
"""Settings that may change when a run is resumed: they affect speed and rounding alone."""
Score = Callable[[Path, Path, CaptureSettings], None]
"""Makes the cache of a round, given the file of its tokens, the cache's folder, and the settings of the capture."""
KEPT_SHARDS = 32
_POLL_SECONDS = 2.0
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True, eq=False, kw_only=True)
class RolloutBatch(MicroBatch):
    """A micro-batch of what the student said. Only the positions that predict a token of a continuation count; the
    labels are the student's own tokens, which are no truth to learn. `counts["rollouts"]`: such positions in the step.
    """


class Joined(Sequence[Any]):
    """The micro-batches of a step: the base's, which may be made as they are read, and those of the rollouts."""

    def __init__(self, base: Sequence[AnyBatch], more: Sequence[AnyBatch], counts: Mapping[str, int]) -> None:
        self._base, self._more, self._counts = base, more, counts

    def __len__(self) -> int:
        return len(self._base) + len(self._more)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        batch = self._base[index] if index < len(self._base) else self._more[index - len(self._base)]
        return replace(batch, counts=self._counts)


class RolloutSource:
    """A `BatchSource`: the steps of a base source with rollouts; see above. `bind` gives it the student.

    base: of text; it is not used elsewhere. folder: where the rounds are kept. seed: of the choices and samples. limit:
    the most positions that the teacher takes. score: makes the targets of a round, on all processes together; None:
    others make them, and the steps wait for `wait_minutes`, or until a `stop` is requested, which `score` has to heed,
    too. steps: of the training, beyond which nothing is continued. run: what the rounds of another run would differ in,
    beside what the source knows.
    Raises StreamError for invalid settings, and while iterating for rounds that are missing or of another run;
    WorkRemains if the targets of a round are not there in time.
    """

    def __init__(
        self,
        base: ShardSource,
        folder: Path,
        settings: RolloutSettings,
        *,
        seed: int = 0,
        limit: int | None = None,
        score: Score | None = None,
        teacher: str = "",
        teacher_batch_tokens: int = 8192,
        wait_minutes: float = 0.0,
        processes: Processes = ALONE,
        stop: Stop | None = None,
        steps: int | None = None,
        run: Mapping[str, Any] = _NOTHING,
    ) -> None:
        self._base, self._folder, self._settings, self._run = base, folder, settings, dict(run)
        self._seed, self._limit, self._score, self._processes = seed, limit, score, processes
        self._batch_tokens, self._wait, self._steps = teacher_batch_tokens, wait_minutes, steps
        self._teacher = teacher
        self._stop = stop or Stop()
        base.leave_out(self._chosen)
        # tokens of shards that are open for longer than a round are read once
        self._inputs = lru_cache(KEPT_SHARDS)(base.text_inputs)
        self._made = 0  # steps handed out since the beginning of the training
        self._round: _Round | None = None
        self._seconds: dict[str, float] = {}  # of the round that was made last, until they are logged
        given = {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
        self.fingerprint: dict[str, Any] = {**base.fingerprint, **given, "rollout_seed": seed}

    def bind(self, student: SamplingStudent) -> None:
        """The student that is trained on the steps; rounds are made with the weights that it then has. Its limit and
        its end of a sequence become part of the fingerprint."""
        settings, spec = self._settings, self._base.form.spec
        limits = [limit for limit in (self._limit, student.max_positions) if limit is not None]
        limit = min(limits, default=None)
        if settings.rollout_eos is not None:
            eos = [settings.rollout_eos]
        else:
            eos = sorted(i for i in ends_of(student.model) if i < spec.vocab_size)
        self._student = student
        self._sampling = Sampling(settings.rollout_tokens, settings.rollout_temperature, spec.vocab_size, tuple(eos))
        self._rule = PromptRule(
            self._seed, spec.provenance.loss_on == "assistant", settings.rollout_prompt, limit, settings.rollout_tokens
        )
        self.fingerprint |= {"rollout_eos": eos, "rollout_limit": limit}
        self._rounds = Rounds(self._folder, self.fingerprint, self._run)

    def __len__(self) -> int:
        return len(self._base)

    def steps(self) -> Iterator[Step]:
        """The steps of the base from the current position on, epoch after epoch without end."""
        base: Iterator[Step] | None = None
        try:
            while True:
                current = self._current()  # before the base goes on: its position is that of the round's first step
                base = self._base.steps() if base is None else base
                if (step := next(base, None)) is None:
                    return
                made, self._made = self._made, self._made + 1
                yield self._with_rollouts(step, current, made)
        finally:
            if base is not None:
                base.close()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """The position, after the step handed out last, in values that JSON can hold. The same on every rank."""
        return {
            "version": VERSION, "made": self._made, "base": self._base.state_dict(), "fingerprint": self.fingerprint,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a state. Raises StreamError, naming the differences, if it belongs to a source with
        other settings."""
        ours, theirs = self.fingerprint, state.get("fingerprint") or {}
        if others := [n for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n)]:
            listed = "; ".join(f"{n}: {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in others)
            raise StreamError(
                f"state: it is of a loader with other settings: {listed}. Use the same settings, or start a new run."
            )
        self._base.load_state_dict(state["base"])
        self._made = int(state["made"])

    def seek(self, epoch: int, step: int) -> None:
        """Go to the position before a step of an epoch, both counted from 0. If a round begins before it, and goes on
        after it, its tokens have to be there. Raises StreamError beyond the end of the epoch."""
        self._base.seek(epoch, step)
        self._made = epoch * len(self._base) + step

    def close(self) -> None:
        """End the active iterator, and the threads and files behind it. `steps()` may be called again."""
        self._base.close()

    def _chosen(self, epoch: int, sequences: MixedSequences) -> NDArray[np.bool_]:
        return chosen(self._seed, self._settings.rollouts, epoch, sequences)

    def _current(self) -> "_Round":
        """The round of the next step: read, or made if this is its first step."""
        number, before = divmod(self._made, self._settings.rollout_every)
        if self._round is None or self._round.number != number:
            self._round = self._open(number, before)
        return self._round

    def _open(self, number: int, before: int) -> "_Round":
        processes, begun = self._processes, time.perf_counter()
        if (student := getattr(self, "_student", None)) is None:
            raise StreamError("rollouts: got no student; call bind(student) before the first step.")
        if self._made == 0:
            if processes.first:
                self._rounds.begin(state_sha256(student.model))
            processes.wait()
        there = processes.agree(int(self._rounds.tokens(number).exists()))
        if not there:
            if before:
                raise StreamError(
                    f"{self._rounds.tokens(number)}: there is no such file, and the training is {before} steps into "
                    "that round, with other weights than made it. Restore it, or delete the checkpoints of these "
                    f"steps, so that the training resumes from step {self._made - before} or before."
                )
            made = self._make(number, student)
            with processes.all_or_none():
                if processes.first:
                    self._rounds.commit(number, made, text_settings_of(self._base.form.spec))
            taken = time.perf_counter() - begun
            tokens = int((made.lengths - made.prompts).sum())
            self._seconds = {"rollout/generate_seconds": taken, "rollout/tokens_per_second": tokens / taken}
        found = self._rounds.read(number)
        if found is None:
            raise StreamError(f"{self._rounds.tokens(number)}: there is no such file; all processes need the same run.")
        cache = self._scored(number, found) if len(found) else None
        self._seconds["rollout/seconds"] = time.perf_counter() - begun
        return _Round(number, found, cache, self._base.form)

    def _scored(self, number: int, made: Rollouts) -> Cache:
        """The cache of a round, which is made, or waited for, if it is not complete."""
        settings = scoring_settings(self._base.form.spec, number, int(made.lengths.max()), self._batch_tokens)
        waits = time.monotonic() + 60 * self._wait
        if not self._processes.agree(int(self._rounds.scored(number) is not None)):
            if self._score is not None:
                self._score(self._rounds.tokens(number), self._rounds.cache(number), settings)
                self._stop_here()
            else:
                while not self._processes.agree(int((cache := self._rounds.scored(number)) is not None)):
                    if self._processes.agree(int(time.monotonic() > waits)):
                        raise WorkRemains(
                            f"{self._rounds.cache(number)}: round {number} has no targets yet. Make them with: "
                            f"{self._command(settings, number)}; then run the same command again to resume."
                        )
                    self._stop_here()
                    time.sleep(_POLL_SECONDS)
        cache = self._rounds.scored(number)
        if cache is None:
            raise StreamError(f"{self._rounds.cache(number)}: it is not complete. Delete it, and train again.")
        spec, base = cache.spec, self._base.form.spec
        for name in ("vocab_size", "temperatures", "draw_temperature", "tokenizer"):
            if (ours := getattr(spec, name)) != (theirs := getattr(base, name)):
                raise StreamError(
                    f"{cache!r}: got {name} {ours!r}; expected {theirs!r}, as in the data trained on. Delete it, and "
                    f"capture it again: {self._command(settings, number)}"
                )
        if (count := sum(cache.manifest.column("sequences").to_pylist())) != len(made):
            raise StreamError(f"{cache!r}: got {count} sequences; expected the {len(made)} of the round. Delete it.")
        return cache

    def _command(self, settings: CaptureSettings, number: int) -> str:
        """The command that makes the targets of a round."""
        return scoring_command(settings, self._rounds.tokens(number), self._rounds.cache(number), self._teacher)

    def _stop_here(self) -> None:
        """Raise Stopped on all processes if one of them was asked to stop."""
        if self._processes.begin_sum([int(self._stop.asked)])()[0]:
            raise Stopped

    def _make(self, number: int, student: SamplingStudent) -> Rollouts:
        """Continue the prompts of a round, on all processes together."""
        prompts, columns = self._prompts()
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        limit = self._rule.limit
        allowed = np.full(len(prompts), self._sampling.tokens)
        if limit is not None:
            allowed = np.minimum(allowed, limit - lengths)
        keys, size = keys_of(len(prompts), self._seed, number), self._settings.rollout_batch
        # prompts of similar lengths together; the batches do not depend on the number of processes
        order = np.lexsort((-lengths, -allowed))
        cuts = np.flatnonzero(np.diff(allowed[order])) + 1
        batches = [part[i : i + size] for part in np.split(order, cuts) for i in range(0, len(part), size)]
        generator = find(self._settings.rollout_generator, student)
        mine: dict[int, Ints] = {}
        for some in batches[self._processes.rank :: self._processes.world_size]:
            sampling = replace(self._sampling, tokens=int(allowed[some[0]]))
            said = generator([prompts[i] for i in some], keys[some], sampling)
            mine |= dict(zip(some.tolist(), said, strict=True))
        generator.close()
        said_by = {i: tokens for part in self._processes.gather(mine) for i, tokens in part.items()}
        continued = [said_by[i] for i in range(len(prompts))]
        return Rollouts(
            [np.concatenate(pair) for pair in zip(prompts, continued, strict=True)],
            lengths,
            np.array([bool(np.isin(tokens[-1], self._sampling.eos)) for tokens in continued], np.bool_),
            **columns,
        )

    def _prompts(self) -> tuple[list[Ints], dict[str, Ints]]:
        """The prompts of the next `rollout_every` steps, and where they are from: columns of `Rollouts`."""
        prompts: list[Ints] = []
        columns: dict[str, list[int]] = {"source": [], "shard": [], "sequence": [], "step": []}
        count = self._settings.rollout_every
        if self._steps is not None:
            count = min(count, max(1, self._steps - self._made))
        for number, (epoch, sequences) in enumerate(self._base.upcoming(count)):
            mask = self._chosen(epoch, sequences)
            some = zip(*(column[mask].tolist() for column in sequences[:3]), strict=True)
            for source, row, sequence in some:
                inputs, shard, first = self._inputs(source, row)
                for begin, end in self._rule.prompts(inputs, first + sequence, epoch, (source, shard)):
                    prompts.append(inputs.tokens[begin:end].astype(np.int64))
                    values = {"source": source, "shard": shard, "sequence": first + sequence}
                    for name, value in (values | {"step": self._made + number}).items():
                        columns[name].append(value)
        return prompts, {name: np.array(values, np.int64) for name, values in columns.items()}

    def _with_rollouts(self, step: Step, current: "_Round", made: int) -> Step:
        which = current.rollouts.of_step(made)
        lengths, prompts = current.rollouts.lengths[which], current.rollouts.prompts[which]
        count = int((lengths - prompts).sum())
        metrics = {"rollout/sequences": float(len(which)), **self._seconds}
        self._seconds = {}
        if len(which):
            metrics["rollout/length"] = count / len(which)
            metrics["rollout/ended"] = float(current.rollouts.ended[which].mean())
        rank, world_size = self._processes.rank, self._processes.world_size
        counts = {"targets": step.count + count, "rollouts": count}
        more = current.micro_batches(which, rank, world_size) if len(which) else []
        return step.replace(
            micro_batches=Joined(step.micro_batches, more, counts),
            count=step.count + count,
            positions=step.positions + int(lengths.sum()),
            metrics=metrics,
        )


class _Round:
    """A round that is trained on. cache: of its targets; None for a round without rollouts. form: of the base."""

    def __init__(self, number: int, rollouts: Rollouts, cache: Cache | None, form: BatchFormat) -> None:
        self.number, self.rollouts = number, rollouts
        self._open: dict[int, OpenShard] = {}
        self._workspace = Workspace()
        if cache is not None:
            spec = cache.spec
            self._form = replace(form, spec=spec, width=spec.width, draws=spec.draws > 0, signals=())
            self._table = open_split(cache, "train")
            self._first = np.concatenate([[0], np.cumsum(self._table.sequences)])

    def micro_batches(self, which: Ints, rank: int, world_size: int) -> list[AnyBatch]:
        """A rank's micro-batches of some rollouts; every rank has equally many. which: their numbers, ascending."""
        lengths = self.rollouts.lengths[which]
        parts = [np.sort(part) for part in split_over_ranks(np.arange(len(which)), lengths, world_size)]
        numbers = [len(self._form.divide(lengths[p])) if len(p) else 0 for p in parts]
        mine = which[parts[rank]]
        rows = np.searchsorted(self._first, mine, side="right") - 1
        sequences = [(self._shard(row), mine[rows == row] - self._first[row]) for row in np.unique(rows).tolist()]
        made = gather(sequences, self._form) if len(mine) else []
        found = [batch.to(self._form.device, non_blocking=True) for batch in made]
        found += [self._form.empty()] * (max(numbers) - len(found))  # type: ignore[list-item]
        return [RolloutBatch(**{f.name: getattr(batch, f.name) for f in fields(batch)}) for batch in found]

    def _shard(self, row: int) -> OpenShard:
        """A shard, decoded; those of one step are kept."""
        if row not in self._open:
            self._open = {number: shard for number, shard in self._open.items() if number >= row - 1}
            self._open[row] = open_shard(self._table.cache, int(self._table.shard[row]), [Workspace()])
        return self._open[row]


def ends_of(model: Any) -> list[int]:
    """The ids that end a sequence of a model, by its configs; none if they name none."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return [int(i) for i in (found if isinstance(found, (list, tuple)) else [found])]
    return []
