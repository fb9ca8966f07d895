"""A slice of a capture, run as capture runs it and timed: some of its batches, and what the teacher said in them."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ...data.documents import Documents
from ...data.examples import Examples
from ...models.protocol import Hidden, Logits, Output
from ...teachers.protocol import Teacher
from ..answers import TopKConfig, flat_rows, full_output
from ..rows import Ints, ShardRows, read_shard_rows
from ..teacher_pass import TeacherPass
from ..window_plan import WindowPlan

Array = NDArray[Any]

_SHARDS = 3  # the slice is taken from
_KEPT_BATCHES = 4  # whose outputs are kept, some rows of each
_KEPT_ROWS, _KEPT_BYTES = 1024, 64 << 20  # of each, at most
_POSITIONS = 2**17  # whose targets are held: more teach little about their size


@dataclass(frozen=True, eq=False)
class Said:
    """Rows, and what the teacher said of them: the arrays of `CacheWriter.write_shard`, `[n, …]` each."""

    some: ShardRows
    arrays: dict[str, Array]

    def part(self, places: Ints) -> "Said":
        """Some pieces of it."""
        at, _ = self.some.rows_of(places)
        return Said(self.some.select(places), {name: array[at] for name, array in self.arrays.items()})


@dataclass(frozen=True, eq=False)
class Kept:
    """Some rows that count, and the teacher's output there, on the host: `[n, D]` or `[n, V]`.

    inputs: the cache's input columns, `[n]` each. numbers: of the rows in the data set, `[n]`.
    """

    inputs: dict[str, Array]
    numbers: Ints
    output: Output

    def every(self, step: int) -> "Kept":
        """One row in so many."""
        inputs = {name: column[::step] for name, column in self.inputs.items()}
        if isinstance(self.output, Hidden):
            return Kept(inputs, self.numbers[::step], Hidden(self.output.states[::step], self.output.lm_head))
        return Kept(inputs, self.numbers[::step], Logits(self.output.values[::step]))


@dataclass(eq=False)
class Slice:
    """What was run. batches: how many; parts: positions and the device's seconds of each, or of its halves where it
    did not fit into memory; halved: how many did not. positions; seconds: by the clock.

    shards: that they are of. device_peak: bytes in use on the device,
    at most; None on a CPU. said: of some 2^17 positions, at most. kept: of a few batches.
    """

    batches: int = 0
    parts: list[tuple[int, float]] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)
    positions: int = 0
    seconds: float = 0.0
    halved: int = 0
    device_peak: int | None = None
    said: list[Said] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)


def run_slice(
    teacher: Teacher,
    data: Documents | Examples,
    plan: WindowPlan,
    ask: TopKConfig,
    *,
    seconds: float,
    least: int = 1,
    progress: bool = False,
) -> Slice:
    """Run batches of a plan for about so many seconds at most, a warm-up included; but `least` batches.

    They come from up to three shards, drawn at random; in each the middle one first, then those between, so that long
    and short pieces have their share whenever time is up. progress: a bar on stderr. Raises as `TeacherPass.run`.
    """
    found = Slice()
    tap = _Tap(teacher)
    runner = TeacherPass(tap, ask, on_batch=lambda positions, busy: found.parts.append((positions, busy)))
    shards = _Shards(plan, data)
    order = shards.order()
    began = time.perf_counter()
    _warm_up(TeacherPass(teacher, ask), shards, data, seconds)
    if teacher.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(teacher.device)

    def run(shard: int, numbers: list[int]) -> ShardRows:
        some, batches = shards.part(shard, numbers)
        begun = time.perf_counter()
        arrays, halved = runner.run(some, batches, data, shard)
        found.seconds += time.perf_counter() - begun
        found.batches += len(numbers)
        found.positions += len(some)
        found.halved += len(halved)
        if sum(len(said.some) for said in found.said) < _POSITIONS:
            found.said.append(Said(some, arrays))
        bar.update(len(numbers))
        return some

    def affordable() -> float:
        """How many batches there is time for: half a one too many, at most."""
        each = max(found.seconds / found.batches, 1e-6)
        return max(least - found.batches, (seconds - (time.perf_counter() - began)) / each + 0.5)

    with tqdm(desc="measure", unit="batch", disable=not progress) as bar:
        for shard, number in order:
            tap.outputs = []
            some = run(shard, [number])
            outputs, tap.outputs = tap.outputs, None
            if len(outputs) == 1:
                found.kept.append(_kept(some, outputs[0], teacher.vocab_size))
            del outputs
            if found.batches >= _KEPT_BATCHES or affordable() < 1:
                break
        while (count := affordable()) >= 1:
            # several at a time, so that the stages overlap as they will
            by_shard = defaultdict(list)
            for shard, number in islice(order, min(int(count), 64)):
                by_shard[shard].append(number)
            if not by_shard:
                break
            for shard, numbers in by_shard.items():
                run(shard, numbers)
    found.shards = shards.read
    if teacher.device.type == "cuda":
        found.device_peak = torch.cuda.max_memory_allocated(teacher.device)
    return found


class _Tap:
    """A teacher whose outputs are also put into a list, where there is one."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.outputs: list[Output] | None = None

    @property
    def vocab_size(self) -> int:
        return self.teacher.vocab_size

    @property
    def fingerprint(self) -> str:
        return self.teacher.fingerprint

    @property
    def device(self) -> torch.device:
        return self.teacher.device

    @property
    def max_positions(self) -> int | None:
        return self.teacher.max_positions

    def __call__(self, inputs: Tensor) -> Output:
        output = full_output(self.teacher(inputs))
        if self.outputs is not None:
            self.outputs.append(output)
        return output


class _Shards:
    """Some shards of a plan, drawn at random, each read when it is first needed."""

    def __init__(self, plan: WindowPlan, data: Documents | Examples) -> None:
        self._plan, self._data = plan, data
        random = np.random.default_rng(plan.settings.seed)
        share = np.diff(plan.shard_rows) / plan.shard_rows[-1]
        self.chosen: list[int] = random.choice(plan.shards, min(_SHARDS, plan.shards), replace=False, p=share).tolist()
        self._rows: dict[int, ShardRows] = {}
        self._batches: dict[int, list[Ints]] = {}

    @property
    def read(self) -> list[int]:
        """Those that were needed."""
        return sorted(self._rows)

    def batches(self, shard: int) -> list[Ints]:
        """Its batches."""
        if shard not in self._batches:
            self._batches[shard] = self._plan.batches(shard)
        return self._batches[shard]

    def part(self, shard: int, numbers: list[int]) -> tuple[ShardRows, list[Ints]]:
        """The rows of some batches alone, and the places of each one's pieces among them."""
        if shard not in self._rows:
            self._rows[shard] = read_shard_rows(self._plan, self._data, shard)
        places = [self.batches(shard)[number] for number in numbers]
        ends = np.cumsum([len(some) for some in places])
        return self._rows[shard].select(np.concatenate(places)), np.split(np.arange(ends[-1]), ends[:-1])

    def order(self) -> Iterator[tuple[int, int]]:
        """All batches, the shards by turns."""
        left = [(shard, halvings(len(self.batches(shard)))) for shard in self.chosen]
        while left:
            for item in list(left):
                shard, numbers = item
                if (number := next(numbers, None)) is None:
                    left.remove(item)
                else:
                    yield shard, number


def halvings(count: int) -> Iterator[int]:
    """0 to count − 1, each once: the middle, the middles of both halves, and so on."""
    seen: set[int] = set()
    bits = 1
    while len(seen) < count:
        for odd in range(1, 2**bits, 2):
            number = (odd * count - 1) >> bits
            if number not in seen:
                seen.add(number)
                yield number
        bits += 1


def _warm_up(runner: TeacherPass, shards: _Shards, data: Documents | Examples, seconds: float) -> None:
    """One piece of the first batch, twice, and all of it; as far as there is time to spare."""
    shard, number = next(shards.order())
    some, (places,) = shards.part(shard, [number])
    begun = time.perf_counter()
    runner.run(some, [places[:1]], data, shard)
    one = time.perf_counter() - begun
    if one < seconds / 8:
        begun = time.perf_counter()
        runner.run(some, [places[:1]], data, shard)
        one = time.perf_counter() - begun
    if one * len(places) < seconds / 4:
        runner.run(some, [places], data, shard)


@torch.inference_mode()
def _kept(some: ShardRows, output: Output, vocab_size: int) -> Kept:
    """Evenly chosen rows of a batch that was all of `some`, run at once."""
    places = np.arange(len(some.document_lengths))
    at, flat = some.counted(places)
    lengths = some.document_lengths.astype(np.int64)
    values = output.states if isinstance(output, Hidden) else output.values
    shape = values.shape[:2] if "tokens" in some.inputs else torch.Size([int(lengths.sum())])
    rows_MX = flat_rows(output, shape, vocab_size)
    size = rows_MX.shape[1] * rows_MX.element_size()
    most = max(1, min(len(at), _KEPT_ROWS, _KEPT_BYTES // size))
    pick = np.unique(np.linspace(0, len(at) - 1, most).round().astype(np.int64))
    chosen = rows_MX[torch.from_numpy(flat[pick]).to(rows_MX.device)].cpu()
    rows_ = at[pick]
    inputs = {name: column[rows_] for name, column in some.inputs.items()}
    output = Hidden(chosen, output.lm_head) if isinstance(output, Hidden) else Logits(chosen)
    return Kept(inputs, some.row_numbers(rows_), output)
