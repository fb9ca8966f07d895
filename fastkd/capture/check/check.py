"""Check a cache against its teacher: run a random sample of its batches again, and compare.

A batch is run as in the capture: the same segments in the same order, halved if it was halved. On the same hardware
only the codec's error remains, which is bounded.
"""

import math
import secrets
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ...cache import Cache, CacheError, Workspace
from ...data.examples import EXAMPLE_COLUMNS, Examples
from ...data.packing import batches
from ...errors import DataError, TeacherError
from ...kernels import KDError
from ...kernels.targets import FIELDS
from ...models.protocol import Hidden
from ...teachers.protocol import Teacher
from ..answers import full_output
from ..prepare import read_window_plan
from ..rows import Ints, ShardRows, teacher_inputs
from ..teacher_pass import device_name
from ..window_plan import WindowPlan
from .compare import Difference, Floats, deviations, kl_divergence
from .recompute import Recomputed, Stored, recompute

Array = NDArray[Any]

_SHARDS = 8  # shards to spread the sample over, unless it needs more
_EQUAL = 1e-4  # nats of excess up to which two computations count as the same
_MIN_SAME_DRAWS = 0.9  # share of the rows in which the same computation repeats the draws, at least
_KINDS = {
    "top_k": "a top-k entry is",
    "rank": "a top-k entry is not among the best, and",
    "draws": "a drawn entry is",
    "tail": "a tail is",
}


@dataclass(frozen=True)
class TeacherCheck:
    """The result of `check_teacher`; false if there are problems.

    teacher, expected: fingerprints of the teacher and in the spec; fingerprint: whether they are equal; None if the
        spec has none. seed: of the sample. positions, batches: how many were compared. shards: which were sampled, of
        cache_shards. recorded_batches: whether the capture's batches were repeated; else every sequence was a batch.
    differences: by kind: "top_k", "draws" and "tail" (log-probabilities), and "rank": by how much top-k entries miss
        being among as many of the teacher's best. outcomes: rows with another number of outcomes.
    same_draws: share of the rows with the same draws; None if unknown, and draws_unknown says why.
    kl, kl_max: KL(teacher now || stored), everything outside the top-k entries as one outcome; None without top-k.
    tolerance: nats by which a number may exceed its bound. captured_on, checked_on: devices and torch versions.
    """

    cache: str
    teacher: str
    expected: str
    fingerprint: bool | None
    seed: int
    positions: int
    batches: int
    shards: list[int]
    cache_shards: int
    recorded_batches: bool
    differences: dict[str, Difference]
    outcomes: int
    same_draws: float | None
    draws_unknown: str
    kl: float | None
    kl_max: float | None
    tolerance: float
    captured_on: list[str]
    checked_on: str
    problems: list[str]

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
        result = {**asdict(self), "ok": self.ok, "excess": self.excess}
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
    checker = _Checker(cache, teacher, None if "tokens" in cache.spec.inputs else data, tolerance)
    with tqdm(total=positions, unit="position", desc="compare", disable=not progress) as bar:
        for index in random.permutation(shards).tolist():
            shard = checker.read(index)
            before = checker.positions
            for number in random.permutation(len(shard.batches)).tolist():
                for segments in shard.batches[number]:
                    compared = checker.positions
                    checker.compare(shard, segments)
                    bar.update(min(checker.positions - compared, positions - bar.n))
                share = positions / min(_SHARDS, len(shards))
                if checker.positions >= positions or checker.positions - before >= share:
                    break
            if checker.positions >= positions:
                break
    return checker.result(seed, len(shards))


@dataclass(frozen=True, eq=False)
class _Shard:
    """A shard of the cache: its arrays, rows, and the segments of the parts of each batch."""

    index: int
    arrays: dict[str, Array]
    rows: ShardRows
    batches: list[list[Ints]]


class _Checker:
    """Compares batches, and collects the result."""

    def __init__(self, cache: Cache, teacher: Teacher, data: Examples | None, tolerance: float | None) -> None:
        self.cache, self.spec, self.teacher, self.data = cache, cache.spec, teacher, data
        self.positions = self.batches = 0
        self._plan, self._draw_seed, self._draws_unknown = _window_plan(cache)
        self._workspace = Workspace()
        self._tolerance = tolerance
        self._least_tolerance = 0.01
        self._shards: list[int] = []
        self._recorded = True
        self._captured_on: set[str] = set()
        kinds = {"top_k": self.spec.k, "rank": self.spec.k, "draws": self.spec.draws, "tail": 1}
        self._differences = {kind: Difference() for kind, used in kinds.items() if used}
        self._outcomes: dict[int, int] = {}  # by shard: rows with another number of outcomes
        self._worst: dict[int, tuple[float, str]] = {}  # by shard: the largest excess, and a description
        self._kl: list[Floats] = []
        self._same_draws: list[NDArray[np.bool_]] = []

    def read(self, index: int) -> _Shard:
        """A shard, with its batches as they were captured; without a record of them, every sequence is a batch."""
        arrays = self.cache.read_shard(index, into=self._workspace)
        record = self.cache.attributes(index).get("record")
        lengths = arrays.get("document_lengths")
        recorded = None
        if isinstance(record, dict) and lengths is not None:
            recorded = _recorded_batches(lengths.astype(np.int64), record)
            if recorded is not None:
                self._captured_on.add(f"{record.get('device')}, torch {record.get('torch')}")
        if recorded is None or lengths is None:
            self._recorded = False
            lengths = arrays["sequence_lengths"]
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
        self._shards.append(index)
        return _Shard(index, arrays, rows, recorded or [[np.array([i])] for i in range(len(lengths))])

    @torch.inference_mode()
    def compare(self, shard: _Shard, segments: Ints) -> None:
        """Run the teacher on some segments of a shard, and compare."""
        rows, flat = shard.rows.counted(segments)
        if not len(rows):
            return
        known = self._draw_seed is not None and (shard.rows.document[segments] >= 0).all()
        stored = Stored(
            **{field.name: shard.arrays[field.name][rows] for field in FIELDS if field.name in shard.arrays},
            numbers=shard.rows.row_numbers(rows) if known else None,
            seed=self._draw_seed or 0,
        )
        inputs = teacher_inputs(shard.rows, self.data, segments).to(self.teacher.device)
        shape = inputs.shape[: 2 if "tokens" in self.spec.inputs else 1]
        try:
            output = full_output(self.teacher(inputs))
            now = recompute(output, flat, shape, stored, self.spec)
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"shard {shard.index}: a batch of {inputs.numel()} positions does not fit into the device's memory, "
                "although it did in the capture. Check on a device with as much memory."
            ) from error
        except KDError as error:
            where = f"row {rows[error.row]}" if error.row is not None else "a batch"
            raise TeacherError(f"shard {shard.index}, {where}: the teacher failed there: {error}.") from error
        dtype = output.states.dtype if isinstance(output, Hidden) else output.values.dtype
        self._least_tolerance = max(self._least_tolerance, 64 * torch.finfo(dtype).eps)
        self.batches += 1
        self._add(shard, rows, stored, now)

    def _add(self, shard: _Shard, rows: Ints, stored: Stored, now: Recomputed) -> None:
        index = shard.index
        self.positions += len(rows)
        documents = shard.rows.inputs.get("document", shard.rows.inputs.get("example"))
        for kind, found in deviations(self.spec, stored, now).items():
            self._differences[kind] += Difference.of(found)
            if len(found.excess) and found.excess.max() > self._worst.get(index, (0.0, ""))[0]:
                at = int(found.excess.argmax())
                row = rows[found.row[at]]
                document = "" if documents is None else f" (document {documents[row]})"
                self._worst[index] = (
                    float(found.excess[at]),
                    f"shard {index}, row {row}{document}: {_KINDS[kind]} {found.distance[at]:.3g} nats from the "
                    f"teacher's; the codec explains {found.bound[at]:.2g}",
                )
        different = int(np.count_nonzero(now.outcomes != stored.outcomes))
        self._outcomes[index] = self._outcomes.get(index, 0) + different
        if self.spec.k:
            self._kl.append(kl_divergence(self.spec, stored, now))
        if now.same_draws is not None:
            self._same_draws.append(now.same_draws)

    def result(self, seed: int, cache_shards: int) -> TeacherCheck:
        """The result, with all problems."""
        expected, teacher = self.spec.teacher, self.teacher.fingerprint
        kl = np.concatenate(self._kl) if self._kl else None
        same_draws = float(np.concatenate(self._same_draws).mean()) if self._same_draws else None
        tolerance = self._least_tolerance if self._tolerance is None else self._tolerance
        return TeacherCheck(
            cache=self.cache.store.describe(),
            teacher=teacher,
            expected=expected,
            fingerprint=teacher == expected if expected else None,
            seed=seed,
            positions=self.positions,
            batches=self.batches,
            shards=sorted(self._shards),
            cache_shards=cache_shards,
            recorded_batches=self._recorded,
            differences=self._differences,
            outcomes=sum(self._outcomes.values()),
            same_draws=same_draws,
            draws_unknown=self._draws_unknown,
            kl=None if kl is None else float(kl.mean()),
            kl_max=None if kl is None else float(kl.max()),
            tolerance=tolerance,
            captured_on=sorted(self._captured_on),
            checked_on=f"{device_name(self.teacher.device)}, torch {torch.__version__}",
            problems=self._problems(teacher, tolerance, same_draws),
        )

    def _problems(self, teacher: str, tolerance: float, same_draws: float | None) -> list[str]:
        problems = []
        if self.spec.teacher and teacher != self.spec.teacher:
            problems.append(f"another teacher: got {teacher!r}; expected {self.spec.teacher!r}, which the spec names")
        for _, (excess, text) in sorted(self._worst.items()):
            if excess > tolerance:
                problems.append(f"{text}, and the tolerance is {tolerance:.2g}")
        for shard, count in sorted(self._outcomes.items()):
            if count:
                problems.append(f"shard {shard}: {count} rows with another number of outcomes than the teacher's")
        excess = max(d.excess for d in self._differences.values())
        if same_draws is not None and same_draws < _MIN_SAME_DRAWS and excess <= _EQUAL:
            problems.append(
                f"only {same_draws:.1%} of the rows have the same draws, although the distributions are the same: they "
                "were drawn with another seed"
            )
        if not self.positions:
            problems.append("no position of the sample has a target: nothing was compared")
        return problems


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
