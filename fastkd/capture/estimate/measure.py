"""A sample of a capture: some of its batches, run as capture runs them, and timed."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ...data.documents import Documents
from ...data.examples import Examples
from ...settings import CaptureSettings
from ...teachers.protocol import Answer, Teacher
from ..rows import Ints, ShardRows, read_shard_rows
from ..teacher_pass import TeacherPass
from ..window_plan import WindowPlan

Array = NDArray[Any]

_SHARDS = 3  # that batches are taken from
_ALONE = 4  # batches run one at a time, before they overlap
_KEPT_POSITIONS = 2**17  # whose targets are kept; more would not improve the estimate of their size


@dataclass(frozen=True, eq=False)
class CapturedRows:
    """Rows of some segments, with their targets. lengths: positions of each segment. columns: the inputs of
    `CacheWriter.write_shard` and its other arrays, by name, `[n, …]` each."""

    lengths: NDArray[np.uint32]
    columns: dict[str, Array]

    def select(self, segments: Ints) -> "CapturedRows":
        """The rows of some segments."""
        lengths = self.lengths.astype(np.int64)
        starts = (np.cumsum(lengths) - lengths)[segments]
        lengths = lengths[segments]
        rows = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))
        return CapturedRows(self.lengths[segments], {name: column[rows] for name, column in self.columns.items()})

    @classmethod
    def cat(cls, parts: list["CapturedRows"]) -> "CapturedRows":
        """The rows of all parts, one after the other."""
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
        return cls(np.concatenate([part.lengths for part in parts]), columns)


@dataclass(eq=False)
class Sample:
    """The batches that were run.

    batches: their number; halved: those that did not fit into memory and were halved. shards: the shards they are from.
    positions, seconds: of all of them, by the clock; counted: positions with a target. parts: positions and device
    seconds of each batch (or half). captured: rows of up to 2^17 positions. device_peak: peak memory on the device,
    bytes; None on a CPU.
    """

    batches: int = 0
    halved: int = 0
    shards: list[int] = field(default_factory=list)
    positions: int = 0
    counted: int = 0
    seconds: float = 0.0
    parts: list[tuple[int, float]] = field(default_factory=list)
    captured: list[CapturedRows] = field(default_factory=list)
    device_peak: int | None = None


def run_sample(
    teacher: Teacher,
    data: Documents | Examples,
    plan: WindowPlan,
    settings: CaptureSettings,
    *,
    seconds: float,
    min_batches: int = 1,
    on_answer: Callable[[ShardRows, Answer], None] = lambda rows, answer: None,
    progress: bool = False,
) -> Sample:
    """Run batches of a plan for about that many seconds, warm-up included, and at least `min_batches`.

    The batches come from up to three random shards, the middle one of each shard first and then those between, so that
    short and long segments are represented whenever the time is up. on_answer: called with the rows of each of the
    first batches that fits into memory, and the teacher's answer. progress: a bar on stderr. Raises as
    `TeacherPass.run`.
    """
    sample = Sample()
    recorder = _Recorder(teacher)
    runner = TeacherPass(cast(Teacher, recorder), settings, on_batch=lambda *part: sample.parts.append(part))
    shards = _Shards(plan, data)
    order = shards.order()
    began = time.perf_counter()
    _warm_up(TeacherPass(teacher, settings), shards, data, seconds)
    if teacher.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(teacher.device)

    def run(shard: int, numbers: list[int]) -> ShardRows:
        some, batches = shards.batch_rows(shard, numbers)
        begun = time.perf_counter()
        arrays, halved = runner.run(some, batches, data, shard)
        sample.seconds += time.perf_counter() - begun
        sample.batches += len(numbers)
        sample.positions += len(some)
        sample.halved += len(halved)
        if sum(int(part.lengths.sum()) for part in sample.captured) < _KEPT_POSITIONS:
            sample.captured.append(CapturedRows(some.document_lengths, some.inputs | arrays))
        sample.counted += int(some.counts.sum())
        bar.update(len(numbers))
        return some

    def affordable() -> float:
        """Number of batches there is time for, rounded."""
        each = max(sample.seconds / sample.batches, 1e-6)
        return max(min_batches - sample.batches, (seconds - (time.perf_counter() - began)) / each + 0.5)

    with tqdm(desc="measure", unit="batch", disable=not progress) as bar:
        for shard, number in islice(order, _ALONE):
            recorder.answers = []
            some = run(shard, [number])
            if len(recorder.answers) == 1:
                on_answer(some, recorder.answers[0])
            if affordable() < 1:
                break
        recorder.answers = None
        while (count := affordable()) >= 1:
            # several at a time, so that device and host overlap as in a capture
            by_shard = defaultdict(list)
            for shard, number in islice(order, min(int(count), 64)):
                by_shard[shard].append(number)
            if not by_shard:
                break
            for shard, numbers in by_shard.items():
                run(shard, numbers)
    sample.shards = shards.used
    if teacher.device.type == "cuda":
        sample.device_peak = torch.cuda.max_memory_allocated(teacher.device)
    return sample


class _Recorder:
    """A teacher whose answers are also put into a list, if there is one."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self.answers: list[Answer] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def __call__(self, inputs: Tensor) -> Answer:
        answer = self._teacher(inputs)
        if self.answers is not None:
            self.answers.append(answer)
        return answer


class _Shards:
    """Random shards of a plan, each read when it is first used."""

    def __init__(self, plan: WindowPlan, data: Documents | Examples) -> None:
        self._plan, self._data = plan, data
        random = np.random.default_rng(plan.settings.seed)
        share = np.diff(plan.shard_rows) / plan.shard_rows[-1]
        chosen = random.choice(plan.shards, min(_SHARDS, plan.shards), replace=False, p=share).tolist()
        self._batches = {shard: plan.batches(shard) for shard in chosen}
        self._rows: dict[int, ShardRows] = {}

    @property
    def used(self) -> list[int]:
        return sorted(self._rows)

    def batch_rows(self, shard: int, numbers: list[int]) -> tuple[ShardRows, list[Ints]]:
        """The rows of some batches of a shard, and the indices of each batch's segments among them."""
        if shard not in self._rows:
            self._rows[shard] = read_shard_rows(self._plan, self._data, shard)
        segments = [self._batches[shard][number] for number in numbers]
        ends = np.cumsum([len(batch) for batch in segments])
        return self._rows[shard].select(np.concatenate(segments)), np.split(np.arange(ends[-1]), ends[:-1])

    def order(self) -> Iterator[tuple[int, int]]:
        """Shard and number of every batch, the shards in turn."""
        by_shard = [[(shard, n) for n in middle_first(len(batches))] for shard, batches in self._batches.items()]
        return (item for turn in zip_longest(*by_shard) for item in turn if item is not None)


def middle_first(count: int) -> Iterator[int]:
    """0 to count − 1, each once: the middle, then the middles of both halves, and so on."""
    ranges = deque([(0, count)])
    while ranges:
        start, stop = ranges.popleft()
        if start < stop:
            middle = (start + stop - 1) // 2
            yield middle
            ranges += [(start, middle), (middle + 1, stop)]


def _warm_up(runner: TeacherPass, shards: _Shards, data: Documents | Examples, seconds: float) -> None:
    """Run one segment of the first batch, once more if there is time (the first may compile), and then the batch."""
    shard, number = next(shards.order())
    some, (segments,) = shards.batch_rows(shard, [number])
    one = _timed(runner, some, segments[:1], data, shard)
    if one < seconds / 8:
        one = _timed(runner, some, segments[:1], data, shard)
    if one * len(segments) < seconds / 4:
        _timed(runner, some, segments, data, shard)


def _timed(runner: TeacherPass, some: ShardRows, segments: Ints, data: Documents | Examples, shard: int) -> float:
    begun = time.perf_counter()
    runner.run(some, [segments], data, shard)
    return time.perf_counter() - begun
