"""Is a cache what this teacher says? A random sample of its own batches is run again, and compared.

A batch is run as capture ran it: the same pieces, in the same order, halved where it was halved. On equal hardware what
is left is the codec's error alone, which is bounded.
"""

import math
import secrets
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ...cache import Cache, CacheError, CacheSpec, Workspace
from ...data.examples import Examples
from ...data.packing import batches
from ...errors import DataError, TeacherError
from ...kernels import KDError
from ...kernels.targets import FIELDS
from ...models.protocol import Hidden
from ...teachers.protocol import Teacher
from ..answers import full_output
from ..prepare import read_window_plan
from ..rows import Ints, ShardRows, teacher_inputs
from ..window_plan import WindowPlan
from .compare import Difference, Floats, apart, divergence
from .live import Live, Stored, live_rows

Array = NDArray[Any]

_SHARDS = 8  # the sample is spread over so many, where one batch of each does not suffice already
_EQUAL = 1e-4  # nats: where no number exceeds its bound by more, two computations are the same
_LEAST_DRAWN = 0.9  # of the rows: what the same computation draws again, at least


@dataclass(frozen=True)
class TeacherCheck:
    """What `check_teacher` found. Falsy where there is a problem.

    fingerprint: whether the teacher's is the spec's; None where the spec has none. seed: of the sample.
    positions, batches: how many were compared. shards: which, of shards_there. as_recorded: whether all of them say how
    they were run; else they were run sequence by sequence.
    differences: by kind: "head" and "drawn" (log-probabilities), "tail", and "outside": entries of a head that are not
    among as many of the teacher's best, by how much they miss it. outcomes: rows with another number of outcomes.
    drawn_again: the share of the rows in which the same is drawn again; None where that cannot be known, and not_drawn
    says why. kl, kl_largest: KL(teacher now || stored), all outside the head as one outcome; None without heads.
    tolerance: nats by which a number may exceed its bound. captured_on, checked_on: devices and versions of torch.
    """

    cache: str
    teacher: str
    expected: str
    fingerprint: bool | None
    seed: int
    positions: int
    batches: int
    shards: list[int]
    shards_there: int
    as_recorded: bool
    differences: dict[str, Difference]
    outcomes: int
    drawn_again: float | None
    not_drawn: str
    kl: float | None
    kl_largest: float | None
    tolerance: float
    captured_on: list[str]
    checked_on: str
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether the cache is this teacher's, and nothing exceeds its bound by more than the tolerance."""
        return not self.problems

    @property
    def excess(self) -> float:
        """The most that any number exceeds its bound by, in nats. 0: the codec explains every difference."""
        return max(d.excess for d in self.differences.values())

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self) -> dict[str, Any]:
        """The report, for a machine; null for what is infinite."""
        found = {**asdict(self), "ok": self.ok, "excess": self.excess}
        return {name: _finite(value) for name, value in found.items()}


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
    """Run a random sample of a cache's batches again, and compare what the teacher says with what is stored.

    positions: whole batches are run until so many were compared. seed: of the sample; None: a random one.
    data: the examples, where the cache is of such.
    tolerance: nats by which a number may exceed the codec's bound, since another device, or another version of torch,
        computes otherwise; None: 64 units in the last place of the type that the teacher computes in (0.5 for bfloat16,
        0.06 for float16), and at least 0.01. progress: a bar on stderr.

    Raises TeacherError where the teacher cannot have made such a cache, or fails; CacheError where the cache holds
    nothing that it could be given; DataError without the examples that it needs; CorruptShard for a damaged shard.
    """
    spec = cache.spec
    shards = cache.shards
    _check_fits(cache, shards, teacher, data)
    data = None if "tokens" in spec.inputs else data
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise CacheError(f"tolerance: got {tolerance}; expected a number of nats, from 0 on.")
    if positions < 1:
        raise CacheError(f"positions: got {positions}; expected at least one.")
    seed = secrets.randbelow(2**31) if seed is None else seed
    random = np.random.default_rng(seed)
    plan, draw_seed, not_drawn = _planned(cache)
    found = _Found(spec, tolerance)
    workspace = Workspace()
    seen: list[int] = []
    recorded, captured_on = True, set()
    with tqdm(total=positions, unit="position", desc="compare", disable=not progress) as bar:
        for index in random.permutation(shards).tolist():
            arrays = cache.read_shard(index, into=workspace)
            some, parts, record = _as_run(cache, index, arrays, plan)
            _check_inputs(some, index, teacher)
            recorded &= record is not None
            captured_on |= {f"{record.get('device')}, torch {record.get('torch')}"} if record else set()
            seen.append(index)
            before = found.positions
            for number in random.permutation(len(parts)).tolist():
                for places in parts[number]:
                    compared = found.positions
                    _compare(found, teacher, data, index, some, places, arrays, draw_seed)
                    bar.update(min(found.positions - compared, positions - bar.n))
                enough = found.positions >= positions
                if enough or found.positions - before >= positions / min(_SHARDS, len(shards)):
                    break
            if found.positions >= positions:
                break
    same = teacher.fingerprint == spec.teacher if spec.teacher else None
    return found.report(
        cache=cache.store.describe(),
        teacher=teacher.fingerprint,
        fingerprint=same,
        seed=seed,
        shards=sorted(seen),
        shards_there=len(shards),
        as_recorded=recorded,
        not_drawn=not_drawn,
        captured_on=sorted(captured_on),
        checked_on=f"{_device_name(teacher.device)}, torch {torch.__version__}",
    )


class _Found:
    """What has been found so far. For one check."""

    def __init__(self, spec: CacheSpec, tolerance: float | None) -> None:
        self.spec = spec
        self.positions = self.batches = 0
        self._given = tolerance
        self._tolerance = 0.01
        kinds = {"head": spec.k, "outside": spec.k, "drawn": spec.draws, "tail": 1}
        self._differences = {kind: Difference() for kind, there in kinds.items() if there}
        self._outcomes: dict[int, int] = {}  # rows by shard
        self._worst: dict[int, tuple[float, str]] = {}  # by shard: the excess, and where
        self._kl: list[Floats] = []
        self._same: list[NDArray[np.bool_]] = []

    @property
    def tolerance(self) -> float:
        """What is tolerated of a teacher that computes in the types seen so far."""
        return self._tolerance if self._given is None else self._given

    def saw(self, dtype: torch.dtype) -> None:
        """The type that a teacher's output has."""
        self._tolerance = max(self._tolerance, 64 * torch.finfo(dtype).eps)

    def add(self, shard: int, rows: Ints, stored: Stored, live: Live, documents: Array | None) -> None:
        """Rows of a shard, compared."""
        self.positions += len(rows)
        for kind, numbers in apart(self.spec, stored, live).items():
            self._differences[kind] += Difference.of(numbers)
            excess = numbers.excess
            if len(excess) and excess.max() > self._worst.get(shard, (0.0, ""))[0]:
                at = int(excess.argmax())
                row = numbers.row[at]
                document = "" if documents is None else f" (document {documents[row]})"
                self._worst[shard] = (
                    float(excess[at]),
                    f"shard {shard}, row {rows[row]}{document}: {_KINDS[kind]} {numbers.difference[at]:.3g} nats from "
                    f"what the teacher says; the codec explains {numbers.bound[at]:.2g}",
                )
        others = int(np.count_nonzero(live.outcomes != stored.outcomes))
        self._outcomes[shard] = self._outcomes.get(shard, 0) + others
        if self.spec.k:
            self._kl.append(divergence(self.spec, stored, live))
        if live.same_draws is not None:
            self._same.append(live.same_draws)

    def report(self, *, teacher: str, fingerprint: bool | None, not_drawn: str, **known: Any) -> TeacherCheck:
        """The report, with all that is wrong."""
        problems = []
        if fingerprint is False:
            problems.append(f"the cache is of another teacher: {self.spec.teacher!r}, and this is {teacher!r}")
        for _, (excess, text) in sorted(self._worst.items()):
            if excess > self.tolerance:
                problems.append(f"{text}, and {self.tolerance:.2g} more is tolerated")
        for shard, count in sorted(self._outcomes.items()):
            if count:
                problems.append(f"shard {shard}: {count} rows with another number of outcomes than the teacher's")
        drawn = float(np.concatenate(self._same).mean()) if self._same else None
        worst = max(d.excess for d in self._differences.values())
        if drawn is not None and drawn < _LEAST_DRAWN and worst <= _EQUAL:
            problems.append(
                f"only {drawn:.1%} of the rows are drawn again from the same distributions: the draws are not those of "
                "this seed"
            )
        if not self.positions:
            problems.append("no position counts in what was looked at: nothing was compared")
        kl = np.concatenate(self._kl) if self._kl else None
        return TeacherCheck(
            teacher=teacher,
            expected=self.spec.teacher,
            fingerprint=fingerprint,
            positions=self.positions,
            batches=self.batches,
            differences=self._differences,
            outcomes=sum(self._outcomes.values()),
            drawn_again=drawn,
            not_drawn=not_drawn,
            kl=None if kl is None else float(kl.mean()),
            kl_largest=None if kl is None else float(kl.max()),
            tolerance=self.tolerance,
            problems=problems,
            **known,
        )


_KINDS = {
    "head": "an entry of the head is",
    "drawn": "a drawn entry is",
    "tail": "a tail is",
    "outside": "an entry of the head is not among the best, and",
}


def _as_run(
    cache: Cache, index: int, arrays: dict[str, Array], plan: WindowPlan | None
) -> tuple[ShardRows, list[list[Ints]], dict[str, Any] | None]:
    """A shard's rows, the pieces of the parts of each of its batches, and its record; None where it says too little:
    then every sequence is a batch."""
    record = cache.attributes(index).get("record")
    lengths = arrays.get("document_lengths")
    parts = None
    if isinstance(record, dict) and lengths is not None:
        parts = _recorded(lengths.astype(np.int64), record)
    if parts is None or lengths is None:
        record, lengths = None, arrays["sequence_lengths"]
        parts = [[np.array([i])] for i in range(len(lengths))]
    start = np.zeros(len(lengths), np.int64)
    document = np.full(len(lengths), -1, np.int64)
    if plan is not None and record is not None and index < plan.shards:
        here = plan.shard(index)
        if np.array_equal(here.stop - here.start, lengths):
            document, start = here.document, here.start
    some = ShardRows(
        inputs={name: arrays[name] for name in cache.spec.inputs},
        counts=arrays["logprobs"][:, 0] > -np.inf,
        sequence_lengths=arrays["sequence_lengths"],
        document_lengths=lengths,
        document=document,
        start=start,
        first_sequence=int(arrays["first_sequence"]),
    )
    return some, parts, record


def _recorded(lengths: Ints, record: dict[str, Any]) -> list[list[Ints]] | None:
    """The parts of each batch, as a record has them; None where it does not fit the pieces."""
    most, halved = record.get("batch_tokens"), record.get("halved")
    if type(most) is not int or most < 1 or not isinstance(halved, dict):
        return None
    found = []
    for number, places in enumerate(batches(lengths, most)):
        sizes = halved.get(str(number), [len(places)])
        if not isinstance(sizes, list) or not all(type(n) is int and n > 0 for n in sizes) or sum(sizes) != len(places):
            return None
        found.append(np.split(places, np.cumsum(sizes)[:-1]))
    return found


@torch.inference_mode()
def _compare(
    found: _Found,
    teacher: Teacher,
    data: Examples | None,
    shard: int,
    some: ShardRows,
    places: Ints,
    arrays: dict[str, Array],
    draw_seed: int | None,
) -> None:
    """Run some pieces, and compare."""
    rows, flat = some.counted(places)
    if not len(rows):
        return
    numbers = None
    if draw_seed is not None and (some.document[places] >= 0).all():
        numbers = some.row_numbers(rows)
    fields = {field.name: arrays[field.name][rows] for field in FIELDS if field.name in arrays}
    stored = Stored(**fields, numbers=numbers, seed=draw_seed or 0)
    inputs = teacher_inputs(some, data, places).to(teacher.device)
    try:
        output = full_output(teacher(inputs))
        live = live_rows(output, flat, inputs.shape[: 2 if "tokens" in some.inputs else 1], stored, found.spec)
    except torch.OutOfMemoryError as error:
        raise TeacherError(
            f"shard {shard}: a batch of {inputs.numel()} positions does not fit into the device's memory, and capture "
            "ran it. Check on a device as large as capture's."
        ) from error
    except KDError as error:
        where = f"row {rows[error.row]}" if error.row is not None else "a batch"
        raise TeacherError(f"shard {shard}, {where}: the teacher failed there: {error}.") from error
    found.saw(output.states.dtype if isinstance(output, Hidden) else output.values.dtype)
    found.batches += 1
    documents = some.inputs.get("document", some.inputs.get("example"))
    found.add(shard, rows, stored, live, None if documents is None else documents[rows])


def _check_fits(cache: Cache, shards: list[int], teacher: Teacher, data: Examples | None) -> None:
    spec, name = cache.spec, cache.store.describe()
    if not shards:
        raise CacheError(f"{name}: there are no shards yet; there is nothing to compare.")
    if teacher.vocab_size != spec.vocab_size:
        raise TeacherError(
            f"teacher: found a vocabulary of {teacher.vocab_size} where the cache's has {spec.vocab_size}: it is of "
            f"another teacher ({spec.teacher!r}). Nothing was compared."
        )
    if "tokens" in spec.inputs:
        return
    if "example" not in spec.inputs or "augmentation_seed" not in spec.inputs:
        raise CacheError(
            f"{name}: its inputs are {', '.join(spec.inputs) or 'none'}; with neither tokens nor examples there is "
            "nothing to give to a teacher."
        )
    if data is None:
        raise DataError(f"data: {name} is of examples, which it does not hold; give them, as they were captured.")


def _check_inputs(some: ShardRows, shard: int, teacher: Teacher) -> None:
    """What the teacher cannot be given is named before a device meets it."""
    if "tokens" not in some.inputs:
        return
    tokens, longest = some.inputs["tokens"], int(some.document_lengths.max())
    if len(bad := np.flatnonzero((tokens < 0) | (tokens >= teacher.vocab_size))):
        raise CacheError(
            f"shard {shard}, row {bad[0]}: found token {tokens[bad[0]]} in a vocabulary of {teacher.vocab_size}, which "
            "no teacher can be given. Delete the shard and capture again."
        )
    if teacher.max_positions is not None and longest > teacher.max_positions:
        raise TeacherError(
            f"shard {shard}: found a piece of {longest} positions; this teacher takes {teacher.max_positions} at most. "
            "It cannot have made this cache."
        )


def _planned(cache: Cache) -> tuple[WindowPlan | None, int | None, str]:
    """The plan and the seed of the draws, or why they are not to be had."""
    if not cache.spec.draws:
        return None, None, "the cache has no draws"
    try:
        return *read_window_plan(cache.store, cache.spec), ""
    except DataError as error:
        return None, None, str(error)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _finite(value: Any) -> Any:
    """What JSON can say."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
