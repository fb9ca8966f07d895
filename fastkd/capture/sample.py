"""A sample of a capture: some of its batches, run and timed as capture runs them, some of them for several k; and the
size of shards, from the sample encoded like one.

Most arrays grow with the positions. Some bytes of a shard do not (the order of the vocabulary, grids, headers, tables
of a compressor), so the bytes per position of a small sample are too high. They show when two halves of the sample are
encoded separately: what the halves take beyond the whole does not grow. With the codec's contexts, which improve with
size, the result is an upper bound.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..cache import CacheSpec, create_cache, open_cache
from ..cache.manifest import listed
from ..cache.stores import MemoryStore
from ..data.documents import Documents
from ..data.examples import Examples
from ..data.packing import pack
from ..settings import CaptureSettings
from ..teachers.protocol import Answer, Teacher
from ..utils.progress import counting
from .feature_collect import States
from .feature_places import Place
from .features.sample import eligible
from .rows import Ints, ShardRows, read_shard_rows
from .teacher_pass import TeacherPass
from .window_plan import WindowPlan

_SHARDS = 3  # that batches are taken from
_KEPT_POSITIONS = 2**17  # whose targets are kept; more would not improve the estimate of their size
_STATES = 2**14  # positions whose states are kept
_PARTS = 4  # shards that are encoded at most, of a sample larger than a shard
OTHER = "other"  # names, shapes and headers, as in `inspect`
_ONCE = ("head/classes", "draws/classes", "head/grid", "draws/grid", OTHER)  # do not grow with a shard's positions
_NEAR_ONE = (1 / 1.02, 1.0, 1 / 0.98)  # temperatures, for a derivative in 1/T
_TABLE_POSITIONS = 1024  # run for every k, at most, unless one segment is longer


@dataclass(eq=False)
class Sample:
    """The batches that were run.

    batches: their number; halved: those that did not fit into memory and were halved. shards: the shards they are from.
    positions, seconds: of all of them; counted: positions with a target. captured: rows of up to 2^17 positions, with
    their targets among the inputs. by_k: a few rows with the targets of each k; empty if none of them counts. kl: for
    each of these k what its entries lose of the teacher, in nats; see `lost_nats`. Empty if the teacher gives no more
    than its best tokens.
    states: at each place, of up to 2^14 positions that may be stored, `[m · P, W]`. stored: positions among all of them
    that may be stored.
    """

    batches: int = 0
    halved: int = 0
    shards: list[int] = field(default_factory=list)
    positions: int = 0
    counted: int = 0
    seconds: float = 0.0
    captured: list[ShardRows] = field(default_factory=list)
    by_k: dict[int, ShardRows] = field(default_factory=dict)
    kl: dict[int, float] = field(default_factory=dict)
    states: list[list[NDArray[np.float32]]] = field(default_factory=list)
    stored: int = 0


def run_sample(
    teacher: Teacher,
    data: Documents | Examples,
    plan: WindowPlan,
    settings: CaptureSettings,
    *,
    ks: list[int],
    seconds: float,
    min_batches: int = 1,
    places: Sequence[Place] = (),
    progress: bool = False,
) -> Sample:
    """Run batches of a plan for about that many seconds, and at least `min_batches`.

    The batches come from up to three random shards, the middle one of each shard first and then those between, so that
    short and long segments are represented whenever the time is up. Before them a part of the first batch is run, for
    every k of `ks`, which also warms up the device. places: of features, whose states are recorded. progress: a bar on
    stderr. Raises as `TeacherPass.run`.
    """
    began = time.perf_counter()
    random = np.random.default_rng(plan.settings.seed)
    share = np.diff(plan.shard_rows) / plan.shard_rows[-1]
    chosen = random.choice(plan.shards, min(_SHARDS, plan.shards), replace=False, p=share).tolist()
    batches = {shard: plan.batches(shard) for shard in chosen}
    turns = zip_longest(*([(shard, n) for n in middle_first(len(batches[shard]))] for shard in chosen))
    order = (item for turn in turns for item in turn if item is not None)
    rows: dict[int, ShardRows] = {}
    sample = Sample(states=[[] for _ in places])

    def part_of(shard: int, parts: list[Ints]) -> tuple[ShardRows, list[Ints]]:
        """The rows of some batches of a shard, and the indices of each batch's segments among them."""
        if shard not in rows:
            rows[shard] = read_shard_rows(plan, data, shard)
        ends = np.cumsum([len(segments) for segments in parts])
        return rows[shard].select(np.concatenate(parts)), np.split(np.arange(ends[-1]), ends[:-1])

    first = batches[chosen[0]][next(middle_first(len(batches[chosen[0]])))]
    some, parts = part_of(chosen[0], [first])
    few = max(1, int(np.searchsorted(np.cumsum(some.document_lengths), _TABLE_POSITIONS, side="right")))
    some, parts = part_of(chosen[0], [first[:few]])
    remembering = cast(Teacher, _Remembering(teacher))
    for k in ks:
        arrays, _ = TeacherPass(remembering, replace(settings, k=k)).run(some, parts, data, chosen[0])
        if some.counts.any():
            sample.by_k[k] = replace(some, inputs=some.inputs | arrays)
            if k and not hasattr(teacher, "max_k"):
                plain = replace(settings, k=k, draws=0, temperatures=_NEAR_ONE)
                arrays, _ = TeacherPass(remembering, plain).run(some, parts, data, chosen[0])
                sample.kl[k] = float(lost_nats(arrays, teacher.vocab_size)[some.counts].mean())

    run = TeacherPass(teacher, settings).run
    count = float(min_batches)
    with counting(math.ceil(seconds), "second", "measure", shown=progress) as bar:
        while count >= 1 and (due := list(islice(order, min(int(count), 64)))):
            for shard in dict.fromkeys(shard for shard, _ in due):
                some, parts = part_of(shard, [batches[shard][n] for s, n in due if s == shard])
                mask = eligible(some, settings.feature_positions)
                kept = sum(map(len, sample.states[0])) // places[0].vectors if places else 0
                states = [States(place, some, mask if kept < _STATES else mask & False) for place in places]
                begun = time.perf_counter()
                arrays, halved = run(some, parts, data, shard, collectors=states)
                sample.seconds += time.perf_counter() - begun
                sample.batches += len(parts)
                sample.positions += len(some)
                sample.counted += int(some.counts.sum())
                sample.halved += len(halved)
                sample.stored += int(mask.sum())
                for found, one in zip(sample.states, states, strict=True):
                    found.append(one.vectors())
                if sum(map(len, sample.captured)) < _KEPT_POSITIONS:
                    sample.captured.append(replace(some, inputs=some.inputs | arrays))
                bar.figure("batches", sample.batches, f"{sample.batches:,} batches")
                bar.add(int(min(time.perf_counter() - began, bar.total)) - bar.done)
            each = max(sample.seconds / sample.batches, 1e-6)
            count = (seconds - (time.perf_counter() - began)) / each + 0.5  # rounded
    sample.shards = sorted(rows)
    return sample


def lost_nats(arrays: Mapping[str, NDArray[Any]], vocab_size: int) -> NDArray[np.float64]:
    """KL(teacher ‖ what its top-k entries say) at T = 1 of each row, `[N]`, in nats: the entries are exact, and the
    mass outside them is spread evenly over the other tokens. arrays: targets with the temperatures _NEAR_ONE.

    It is Σ p·ln(p·n / t) over the n other tokens, of mass t. The derivative of ln Σ p^β at β = 1 is Σ p·ln(p) / t.
    """
    tail = arrays["tail"].astype(np.float64)
    outcomes = vocab_size - np.isfinite(arrays["logprobs"]).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = (tail[:, 0] - tail[:, 2]) / (1 / _NEAR_ONE[0] - 1 / _NEAR_ONE[2])
        lost = np.exp(tail[:, 1]) * (slope - tail[:, 1] + np.log(outcomes))
    return np.where(np.isfinite(lost), np.maximum(lost, 0.0), 0.0)


class _Remembering:
    """A teacher that runs once on the same inputs."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._answers: dict[bytes, Answer] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def __call__(self, inputs: Tensor) -> Answer:
        key = inputs.cpu().numpy().tobytes()
        if key not in self._answers:
            self._answers[key] = self._teacher(inputs)
        return self._answers[key]


def middle_first(count: int) -> Iterator[int]:
    """0 to count − 1, each once: the middle, then the middles of both halves, and so on."""
    ranges = deque([(0, count)])
    while ranges:
        start, stop = ranges.popleft()
        if start < stop:
            middle = (start + stop - 1) // 2
            yield middle
            ranges += [(start, middle), (middle + 1, stop)]


@dataclass(frozen=True)
class Sizes:
    """Bytes of a shard by array: `fixed`, and `slope` for each position. seconds: of one core to encode a position."""

    fixed: dict[str, float]
    slope: dict[str, float]
    seconds: float

    def of(self, shards: NDArray[np.int64]) -> dict[str, float]:
        """Total bytes, by array, of shards with these numbers of positions, `[shards]`."""
        positions = float(shards.sum())
        return {n: max(self.fixed[n] * len(shards) + slope * positions, 0.0) for n, slope in self.slope.items()}


def measure_sizes(
    spec: CacheSpec, captured: list[ShardRows], shard_positions: float, context: int | None = None
) -> Sizes:
    """Encode rows with their targets, and each half of them.

    captured: rows whose inputs include the targets. shard_positions: of a shard of the capture; more rows are divided
    into parts of that size, of which up to four are used. context: positions of the windows that segments are packed
    into; None: each segment is a window.
    """
    step = max(1, -(-sum(map(len, captured)) // max(int(shard_positions), 1)))
    count = min(step, _PARTS)
    whole, halves = Counter[str](), Counter[str]()
    positions, seconds = 0, 0.0
    for part in range(count):
        chosen = [_every(rows, part, step) for rows in captured]
        positions += sum(map(len, chosen))
        seconds += _add_encoded(whole, spec, chosen, context)
        for half in (0, 1):
            _add_encoded(halves, spec, [_every(rows, half, 2) for rows in chosen], context)
    fixed = {n: (size if n in _ONCE else halves[n] - size) / count for n, size in whole.items()}
    slope = {n: (size - fixed[n] * count) / positions for n, size in whole.items()}
    return Sizes(fixed, slope, seconds / positions)


def _every(rows: ShardRows, first: int, step: int) -> ShardRows:
    """Every `step`-th segment from the first on."""
    return rows.select(np.arange(first, len(rows.document), step))


def _add_encoded(total: Counter[str], spec: CacheSpec, parts: list[ShardRows], context: int | None) -> float:
    """Encode rows as a shard, and add its bytes by array to the total; the seconds that encoding took."""
    lengths = windows = np.concatenate([part.document_lengths for part in parts])
    if not len(lengths):
        return 0.0
    if context is not None:
        window, count = pack(lengths.astype(np.int32), context)
        windows = np.bincount(window, lengths, count).astype(np.uint32)
    arrays: dict[str, Any] = {n: np.concatenate([part.inputs[n] for part in parts]) for n in parts[0].inputs}
    inputs = {name: arrays.pop(name) for name in spec.inputs}
    store = MemoryStore()
    with create_cache(store, replace(spec, shard_positions=max(spec.shard_positions, int(lengths.sum())))) as writer:
        begun = time.perf_counter()
        writer.write_shard(0, inputs, **arrays, sequence_lengths=windows, document_lengths=lengths)
        seconds = time.perf_counter() - begun
    sizes: dict[str, int] = open_cache(store).attributes(0)["bytes"]
    total.update(sizes)
    total[OTHER] += listed(store)[0] - sum(sizes.values())
    return seconds
