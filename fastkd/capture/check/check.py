"""Check a cache against its teacher: run a random sample of its batches again, and compare.

A batch is run as in the capture: the same segments in the same order, halved if it was halved. On the same hardware
only the codec's error remains, which is bounded.
"""

import math
import secrets
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ...cache import Cache, CacheError, Workspace
from ...data.examples import EXAMPLE_COLUMNS, Examples
from ...data.packing import batches
from ...errors import DataError, TeacherError
from ...settings import CaptureSettings
from ...teachers.protocol import Answer, Hidden, Teacher, TopK
from ..prepare import read_window_plan
from ..rows import Ints, ShardRows
from ..teacher_pass import TeacherPass, device_name
from ..window_plan import WindowPlan
from .compare import Deviations, compare

_SHARDS = 8  # shards to spread the sample over, unless it needs more
_EQUAL = 1e-4  # nats of excess up to which two computations count as the same
_MIN_SAME = 0.9  # share of the rows in which the same computation repeats the entries, at least
_KINDS = {"top_k": "a top-k entry is", "draws": "a drawn entry is", "tail": "a tail is"}


@dataclass
class Difference:
    """A summary of the deviations of one kind, in nats.

    compared: how many numbers. largest: the largest distance; bound: what the codec allows there. over: how many
    exceed their bound. excess: by how much, at most.
    """

    compared: int = 0
    largest: float = 0.0
    bound: float = 0.0
    over: int = 0
    excess: float = 0.0

    def add(self, found: Deviations) -> None:
        """Add some deviations."""
        if not len(found.row):
            return
        at = int(found.distance.argmax())
        if not self.compared or found.distance[at] > self.largest:
            self.largest, self.bound = float(found.distance[at]), float(found.bound[at])
        self.compared += len(found.row)
        self.over += int(np.count_nonzero(found.excess))
        self.excess = max(self.excess, float(found.excess.max()))


@dataclass
class TeacherCheck:
    """The result of `check_teacher`; false if there are problems.

    teacher, expected: fingerprints of the teacher and in the spec. seed: of the sample. positions, batches: how many
        were compared. shards: which were sampled, of cache_shards. recorded_batches: whether the capture's batches were
        repeated; else every sequence was a batch.
    differences: by kind: "top_k", "draws" and "tail" (log-probabilities). outcomes: rows with another number of
        outcomes.
    same_top_k, same_draws: share of the rows with the same ids; None without them, or if draws cannot be repeated, and
        draws_unknown says why.
    kl: mean KL(teacher now || stored), everything outside the top-k entries as one outcome; None without top-k.
    tolerance: nats by which a number may exceed its bound. captured_on, checked_on: devices and torch versions.
    """

    cache: str
    teacher: str
    expected: str
    seed: int
    cache_shards: int
    tolerance: float
    checked_on: str
    draws_unknown: str
    differences: dict[str, Difference]
    positions: int = 0
    batches: int = 0
    shards: list[int] = field(default_factory=list)
    recorded_batches: bool = True
    outcomes: int = 0
    same_top_k: float | None = None
    same_draws: float | None = None
    kl: float | None = None
    captured_on: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> bool | None:
        """Whether the fingerprints are equal; None if the spec has none."""
        return self.teacher == self.expected if self.expected else None

    @property
    def ok(self) -> bool:
        """Whether the teacher is the cache's, and no number exceeds its bound by more than the tolerance."""
        return not self.problems

    @property
    def excess(self) -> float:
        """The largest excess of a number over its bound, in nats. 0: the codec explains all differences."""
        return max(d.excess for d in self.differences.values())

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object; null for infinite numbers."""
        result = {**asdict(self), "fingerprint": self.fingerprint, "ok": self.ok, "excess": self.excess}
        return {name: _finite(value) for name, value in result.items()}


def check_teacher(
    cache: Cache,
    teacher: Teacher,
    *,
    positions: int = 4096,
    seed: int | None = None,
    data: Examples | None = None,
    tolerance: float | None = None,
    progress: bool = False,
) -> TeacherCheck:
    """Run the teacher on a random sample of a cache's batches, and compare its answers with what is stored.

    positions: how many to compare, at least; batches are run whole. seed: of the sample; None: random. data: the
        examples of a cache of examples. progress: a bar on stderr.
    tolerance: nats by which a number may exceed the codec's bound, as another device or torch version rounds
        differently. None: 64 units in the last place of the teacher's dtype (0.5 for bfloat16, 0.06 for float16), and
        at least 0.01.

    Raises TeacherError if the teacher cannot have made the cache, or fails; CacheError if the cache holds no inputs for
    a teacher; DataError without the examples; CorruptShard for a damaged shard.
    """
    shards = cache.shards
    _check_fits(cache, shards, teacher, data)
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise CacheError(f"tolerance: got {tolerance}; expected a number of nats, from 0 on.")
    if positions < 1:
        raise CacheError(f"positions: got {positions}; expected at least one.")
    seed = secrets.randbelow(2**31) if seed is None else seed
    random = np.random.default_rng(seed)
    checker = _Checker(cache, teacher, None if "tokens" in cache.spec.inputs else data, seed, tolerance)
    report = checker.report
    with tqdm(total=positions, unit="position", desc="compare", disable=not progress) as bar:
        for index in random.permutation(shards).tolist():
            shard = checker.read(index)
            before = report.positions
            for number in random.permutation(len(shard.batches)).tolist():
                checker.compare(shard, shard.batches[number])
                bar.update(min(report.positions, positions) - bar.n)
                share = positions / min(_SHARDS, len(shards))
                if report.positions >= positions or report.positions - before >= share:
                    break
            if report.positions >= positions:
                break
    return checker.finish()


@dataclass(frozen=True, eq=False)
class _Shard:
    """A shard of the cache: its arrays, rows, and the segments of the parts of each batch."""

    index: int
    arrays: dict[str, NDArray[Any]]
    rows: ShardRows
    batches: list[list[Ints]]


class _Checker:
    """Compares batches, and collects the result. tolerance: None: by the teacher's dtype."""

    def __init__(
        self, cache: Cache, teacher: Teacher, data: Examples | None, seed: int, tolerance: float | None
    ) -> None:
        spec = self.spec = cache.spec
        self.cache, self.teacher, self.data = cache, teacher, data
        self._plan, draw_seed, unknown = _window_plan(cache)
        self.report = TeacherCheck(
            cache=cache.store.describe(),
            teacher=teacher.fingerprint,
            expected=spec.teacher,
            seed=seed,
            cache_shards=len(cache.shards),
            tolerance=0.01 if tolerance is None else tolerance,
            checked_on=f"{device_name(teacher.device)}, torch {torch.__version__}",
            draws_unknown=unknown,
            differences={
                kind: Difference() for kind, used in (("top_k", spec.k), ("draws", spec.draws), ("tail", 1)) if used
            },
        )
        names = ("k", "draws", "draw_temperature", "mass", "temperatures")
        settings = CaptureSettings(**{name: getattr(spec, name) for name in names}, seed=draw_seed or 0)
        self._pass = TeacherPass(teacher, settings, on_answer=self._on_answer)
        self._fixed_tolerance = tolerance is not None
        self._workspace = Workspace()
        self._outcomes: dict[int, int] = {}  # by shard: rows with another number of outcomes
        self._worst: dict[int, tuple[float, str]] = {}  # by shard: the largest excess, and a description
        # of all rows: sums; the last over those whose draws can be repeated
        self._kl, self._same_top_k, self._same_draws, self._known = 0.0, 0, 0, 0

    def read(self, index: int) -> _Shard:
        """A shard, with its batches as they were captured; without a record of them, every sequence is a batch."""
        arrays = self.cache.read_shard(index, into=self._workspace)
        record = self.cache.attributes(index).get("record")
        lengths = arrays.get("document_lengths")
        recorded = None
        if isinstance(record, dict) and lengths is not None:
            recorded = _recorded_batches(lengths.astype(np.int64), record)
        if recorded is None or lengths is None:
            self.report.recorded_batches = False
            lengths = arrays["sequence_lengths"]
        elif (device := f"{record.get('device')}, torch {record.get('torch')}") not in self.report.captured_on:
            self.report.captured_on.append(device)
        document, start = np.full(len(lengths), -1, np.int64), np.zeros(len(lengths), np.int64)
        if self._plan is not None and recorded is not None and index < self._plan.shards:
            planned = self._plan.shard(index)
            if np.array_equal(planned.stop - planned.start, lengths):
                document, start = planned.document, planned.start
        rows = ShardRows(
            inputs={name: arrays[name] for name in self.spec.inputs},
            counts=arrays["logprobs"][:, 0] > -np.inf,
            sequence_lengths=arrays["sequence_lengths"],
            document_lengths=lengths,
            document=document,
            start=start,
            first_sequence=int(arrays["first_sequence"]),
        )
        _check_inputs(rows, index, self.teacher)
        self.report.shards.append(index)
        return _Shard(index, arrays, rows, recorded or [[np.array([i])] for i in range(len(lengths))])

    def compare(self, shard: _Shard, parts: list[Ints]) -> None:
        """Run the teacher on the parts of a batch of a shard, and compare."""
        segments, report = np.concatenate(parts), self.report
        some = shard.rows.select(segments)
        rows = shard.rows.rows_of(segments)[0][some.counts]
        if not len(rows):
            return
        again = np.split(np.arange(len(segments)), np.cumsum([len(part) for part in parts])[:-1])
        now, _ = self._pass.run(some, again, self.data, shard.index)
        stored = {name: shard.arrays[name][rows] for name in now}
        found = compare(self.spec, stored, {name: array[some.counts] for name, array in now.items()})
        report.batches += len(parts)
        report.positions += len(rows)
        for kind, deviations in found.deviations.items():
            report.differences[kind].add(deviations)
            self._note_worst(shard, kind, deviations, rows)
        self._outcomes[shard.index] = self._outcomes.get(shard.index, 0) + int(np.count_nonzero(~found.outcomes))
        self._kl += float(found.kl.sum())
        self._same_top_k += int(found.same_top_k.sum())
        if self._plan is not None and (some.document >= 0).all():
            self._same_draws += int(found.same_draws.sum())
            self._known += len(rows)

    def _on_answer(self, answer: Answer) -> None:
        if not self._fixed_tolerance and not isinstance(answer, TopK):
            dtype = answer.states.dtype if isinstance(answer, Hidden) else answer.values.dtype
            self.report.tolerance = max(self.report.tolerance, 64 * torch.finfo(dtype).eps)

    def _note_worst(self, shard: _Shard, kind: str, found: Deviations, rows: Ints) -> None:
        if not len(found.row) or found.excess.max() <= self._worst.get(shard.index, (0.0, ""))[0]:
            return
        at = int(found.excess.argmax())
        row = rows[found.row[at]]
        documents = shard.rows.inputs.get("document", shard.rows.inputs.get("example"))
        document = "" if documents is None else f" (document {documents[row]})"
        self._worst[shard.index] = (
            float(found.excess[at]),
            f"shard {shard.index}, row {row}{document}: {_KINDS[kind]} {found.distance[at]:.3g} nats from the "
            f"teacher's; the codec explains {found.bound[at]:.2g}",
        )

    def finish(self) -> TeacherCheck:
        """The result, with all problems."""
        report, problems = self.report, self.report.problems
        report.shards.sort()
        report.captured_on.sort()
        report.outcomes = sum(self._outcomes.values())
        if self.spec.k and report.positions:
            report.kl = self._kl / report.positions
            report.same_top_k = self._same_top_k / report.positions
        if self._known:
            report.same_draws = self._same_draws / self._known
        if report.fingerprint is False:
            problems.append(
                f"another teacher: got {report.teacher!r}; expected {report.expected!r}, which the spec names"
            )
        for _, (excess, text) in sorted(self._worst.items()):
            if excess > report.tolerance:
                problems.append(f"{text}, and the tolerance is {report.tolerance:.2g}")
        for shard, count in sorted(self._outcomes.items()):
            if count:
                problems.append(f"shard {shard}: {count} rows with another number of outcomes than the teacher's")
        for same, what in ((report.same_top_k, "top-k entries"), (report.same_draws, "draws")):
            if same is not None and same < _MIN_SAME and report.excess <= _EQUAL:
                more = ": they were drawn with another seed" if what == "draws" else ""
                problems.append(
                    f"only {same:.1%} of the rows have the same {what}, although the log-probabilities are the same"
                    + more
                )
        if not report.positions:
            problems.append("no position of the sample has a target: nothing was compared")
        return report


def _recorded_batches(lengths: Ints, record: dict[str, Any]) -> list[list[Ints]] | None:
    """The segments of the parts of each batch, by a shard's record; None if the record does not fit the segments."""
    batch_tokens, halved = record.get("batch_tokens"), record.get("halved")
    if type(batch_tokens) is not int or batch_tokens < 1 or not isinstance(halved, dict):
        return None
    found = []
    for number, segments in enumerate(batches(lengths, batch_tokens)):
        sizes = halved.get(str(number), [len(segments)])
        if not isinstance(sizes, list) or not all(type(n) is int and n > 0 for n in sizes):
            return None
        if sum(sizes) != len(segments):
            return None
        found.append(np.split(segments, np.cumsum(sizes)[:-1]))
    return found


def _check_fits(cache: Cache, shards: list[int], teacher: Teacher, data: Examples | None) -> None:
    spec, name = cache.spec, cache.store.describe()
    if not shards:
        raise CacheError(f"{name}: the cache has no shards yet; there is nothing to compare.")
    if teacher.vocab_size != spec.vocab_size:
        raise TeacherError(
            f"teacher: got a vocabulary of {teacher.vocab_size}; expected {spec.vocab_size}, that of the cache's "
            f"teacher ({spec.teacher!r}). Nothing was compared."
        )
    if "tokens" in spec.inputs:
        return
    if not set(EXAMPLE_COLUMNS) <= set(spec.inputs):
        raise CacheError(
            f"{name}: got inputs {', '.join(spec.inputs) or 'none'}; expected tokens or examples, to run a teacher on."
        )
    if data is None:
        raise DataError(f"data: got none; {name} is a cache of examples, which it does not contain. Name them.")


def _check_inputs(rows: ShardRows, shard: int, teacher: Teacher) -> None:
    """Errors for inputs that would fail on the device."""
    if "tokens" not in rows.inputs:
        return
    tokens, longest = rows.inputs["tokens"], int(rows.document_lengths.max())
    if len(bad := np.flatnonzero((tokens < 0) | (tokens >= teacher.vocab_size))):
        raise CacheError(
            f"shard {shard}, row {bad[0]}: got token {tokens[bad[0]]}; expected 0 to {teacher.vocab_size - 1}. Delete "
            "the shard and capture again."
        )
    if teacher.max_positions is not None and longest > teacher.max_positions:
        raise TeacherError(
            f"shard {shard}: got a segment of {longest} positions; this teacher takes at most {teacher.max_positions}. "
            "It cannot have made this cache."
        )


def _window_plan(cache: Cache) -> tuple[WindowPlan | None, int | None, str]:
    """The window plan and the seed of the draws; or why they are unknown."""
    if not cache.spec.draws:
        return None, None, "the cache has no draws"
    try:
        return *read_window_plan(cache.store, cache.spec), ""
    except DataError as error:
        return None, None, str(error)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
