"""A teacher's pass over the batches of a shard: the targets of every row that counts, as the arrays a cache stores,
and what collectors make of its inner states.

While the device runs one batch, the host writes the targets of the batch before it into the arrays.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.errors import said
from ..data.documents import Documents
from ..data.examples import Examples
from ..errors import TeacherError
from ..kernels import KDError, SparseTargets
from ..models.taps import Taps
from ..settings import CaptureSettings
from ..teachers.protocol import Answer, Teacher, for_targets
from ..utils.signals import Stopped
from .ahead import BatchesAhead, row_of
from .answers import targets_of, topk_config
from .feature_collect import Collector
from .feature_places import network_of
from .rows import ShardRows, teacher_inputs

Array = NDArray[Any]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Shard:
    """A shard's rows, where they come from, and what is made of them. data: None for tokens whose documents are not
    available."""

    rows: ShardRows
    data: Documents | Examples | None
    index: int
    targets: bool = True
    collectors: Sequence[Collector] = ()

    def where(self, document: int) -> str:
        """A document's description, for messages."""
        return f"document {document}" if self.data is None else self.data.where(document)

    def bad_row(self, row: int, problem: str) -> TeacherError:
        """The error for a row that gets no valid target."""
        number = int(self.rows.row_numbers(np.array([row]))[0])
        what, within = ("example", "copy") if "example" in self.rows.inputs else ("document", "position")
        return TeacherError(
            f"{self.where(number >> 31)}, {within} {number & (2**31 - 1)}: the teacher failed there: {said(problem)}. "
            f"Nothing of shard {self.index} was written. Try a wider dtype (float16 overflows where bfloat16 and "
            f"float32 do not), or leave the {what} out."
        )


@dataclass(eq=False)
class _Pending:
    """A batch that was submitted to the device. rows: those of the shard that count. positions: without padding.

    targets: on the host, once `copied`; None for no rows. inner: for each collector, the rows and what it submitted,
    likewise. started, copied: None on devices without events, where seconds is the duration.
    """

    rows: Ints
    positions: int
    targets: SparseTargets | None = None
    inner: list[tuple[Collector, Ints, Any]] = field(default_factory=list)
    started: torch.cuda.Event | None = None
    copied: torch.cuda.Event | None = None
    seconds: float = 0.0


@dataclass(eq=False)
class TeacherPass:
    """Runs a teacher over the batches of shards. Remembers the batch size that did not fit into memory.

    on_batch: called with each batch's positions, and the seconds that the device was busy with it.
    on_answer: called with each of the teacher's answers.
    should_stop: called before each batch; if it returns True, `Stopped` is raised.
    """

    teacher: Teacher
    settings: CaptureSettings
    on_batch: Callable[[int, float], None] = lambda positions, seconds: None
    on_answer: Callable[[Answer], None] = lambda answer: None
    should_stop: Callable[[], bool] = lambda: False
    _too_large: int | None = None

    def __post_init__(self) -> None:
        self.teacher = for_targets(self.teacher, self.settings)

    def run(
        self,
        rows: ShardRows,
        batches: list[Ints],
        data: Documents | Examples | None,
        shard: int,
        *,
        targets: bool = True,
        collectors: Sequence[Collector] = (),
    ) -> tuple[dict[str, Array], dict[str, list[int]]]:
        """The targets of a shard, as the arrays of `CacheWriter.write_shard`; and for each batch that did not fit into
        memory, by its number, how many segments each of its parts had.

        batches: the segments of each batch. targets: whether to make targets; without them, there are no arrays.
        collectors: take the teacher's inner states. Raises TeacherError for NaN or infinity, naming document and
        position, and the layer for a state.
        """
        source = _Shard(rows, data, shard, targets, collectors)
        arrays = self._empty(len(rows)) if targets else {}
        halved: dict[str, list[int]] = {}
        pending: _Pending | None = None
        taps = None
        if collectors:
            taps = Taps(network_of(self.teacher), [collector.place.tap for collector in collectors])
        with nullcontext() if taps is None else taps, self._ahead(source, batches) as ahead:
            try:
                for number, segments in enumerate(batches):
                    sizes = []
                    parts = self._submit_parts(source, segments, taps) if ahead is None else ahead(number, segments)
                    for size, submitted in parts:
                        sizes.append(size)
                        if pending is not None:
                            self._collect(pending, arrays, source)
                        pending = submitted
                    if len(sizes) > 1:
                        halved[str(number)] = sizes
            except Stopped:
                if pending is not None:  # it was answered, and is lost with the others
                    self.on_batch(pending.positions, pending.seconds)
                raise
            if pending is not None:
                self._collect(pending, arrays, source)
        return arrays, halved

    def _empty(self, rows: int) -> dict[str, Array]:
        """Arrays of targets without entries."""
        return SparseTargets.empty(
            rows,
            topk_config(self.settings).width(self.teacher.vocab_size),
            vocab_size=self.teacher.vocab_size,
            temperatures=self.settings.temperatures,
            draws=self.settings.draws > 0,
            device="cpu",
        ).arrays()

    @contextmanager
    def _ahead(self, source: _Shard, batches: list[Ints]) -> Iterator[Callable[[int, Ints], Any] | None]:
        """For a teacher that answers several batches at a time, what `_submit_parts` does for others, by number."""
        teacher: Any = self.teacher
        if not hasattr(teacher, "submit"):
            yield None
            return

        def inputs(segments: Ints) -> tuple[Tensor, Ints] | None:
            rows, _ = source.rows.placed(segments)
            if not source.targets or not source.rows.counts[rows].any():
                return None
            lengths = source.rows.document_lengths[segments].astype(np.int64)
            return teacher_inputs(source.rows, source.data, segments), lengths

        def waiting() -> None:
            if self.should_stop():
                raise Stopped
            self.on_batch(0, 0.0)

        ahead = BatchesAhead(teacher, batches, inputs, waiting)

        def submit(number: int, segments: Ints) -> list[tuple[int, _Pending]]:
            if self.should_stop():
                raise Stopped
            try:
                return [(len(segments), self._submit(source, segments, ask=lambda: ahead.take(number)))]
            except TeacherError as error:
                if (row := row_of(error)) is None:
                    raise
                raise type(error)(f"{source.where(int(source.rows.document[segments[row]]))}: {error}") from error

        try:
            yield submit
        finally:
            ahead.cancel()

    def _submit_parts(self, source: _Shard, segments: Ints, taps: Taps | None) -> Iterator[tuple[int, _Pending]]:
        """Submit a batch, or if it does not fit into memory its halves, their halves and so on: for each the number of
        segments, and the submitted batch."""
        if self.should_stop():
            raise Stopped
        padded = len(segments) * int(source.rows.document_lengths[segments].max())
        if len(segments) == 1 or self._too_large is None or padded < self._too_large:
            try:
                pending = self._submit(source, segments, taps)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(segments) == 1:
                    where = source.where(int(source.rows.document[segments[0]]))
                    raise TeacherError(
                        f"{where}: one segment of {padded} positions does not fit into the device's memory beside the "
                        "teacher. Use a smaller context, another dtype, or --teacher-parallel."
                    ) from error
                self._too_large = padded
            else:
                yield len(segments), pending
                return
            # outside the handler, as the error's frames hold the memory to free
            if taps is not None:
                taps.values.clear()
            if self.teacher.device.type == "cuda":
                torch.cuda.empty_cache()
        middle = (len(segments) + 1) // 2
        yield from self._submit_parts(source, segments[:middle], taps)
        yield from self._submit_parts(source, segments[middle:], taps)

    @torch.inference_mode()
    def _submit(
        self, source: _Shard, segments: Ints, taps: Taps | None = None, ask: Callable[[], Answer] | None = None
    ) -> _Pending:
        """Submit a batch to the device, and the copy of its targets and inner states to the host. ask: returns the
        answer to a batch that was submitted before."""
        rows, flat = source.rows.placed(segments)
        counts = source.rows.counts[rows] if source.targets else np.zeros(len(rows), np.bool_)
        wanted = [collector.mask[rows] for collector in source.collectors]
        pending = _Pending(rows[counts], int(source.rows.document_lengths[segments].sum(dtype=np.int64)))
        if not any(mask.any() for mask in (counts, *wanted)):
            return pending
        device = self.teacher.device
        flat_N = _to(torch.from_numpy(flat), device)
        if ask is None:
            inputs = _to(teacher_inputs(source.rows, source.data, segments), device)
            shape = inputs.shape[: 2 if "tokens" in source.rows.inputs else 1]
        else:
            shape = torch.Size([len(segments), int(source.rows.document_lengths[segments].max())])
        clock = time.perf_counter()
        pending.started = _event(device)
        answer = self.teacher(inputs) if ask is None else ask()
        self.on_answer(answer)
        if taps is not None:
            self._submit_inner(source, taps, rows, flat_N, wanted, shape, pending)
        if counts.any():
            numbers_M = _to(torch.from_numpy(source.rows.row_numbers(pending.rows)), device)
            flat_M = flat_N if counts.all() else flat_N[_to(torch.from_numpy(counts), device)]
            try:
                targets = targets_of(answer, flat_M, numbers_M, self.settings, shape, self.teacher.vocab_size)
            except KDError as error:
                if error.row is None:
                    raise TeacherError(f"teacher: no targets can be made of its answer ({error}).") from error
                raise source.bad_row(int(pending.rows[error.row]), str(error)) from error
            pending.targets = targets.to("cpu", non_blocking=device.type == "cuda")  # into page-locked memory
        pending.copied = _event(device)
        pending.seconds = time.perf_counter() - clock
        return pending

    def _submit_inner(
        self,
        source: _Shard,
        taps: Taps,
        rows: Ints,
        flat_N: Tensor,
        wanted: list[NDArray[np.bool_]],
        shape: torch.Size,
        pending: _Pending,
    ) -> None:
        """Hand the batch's inner states to the collectors, and submit the copies of what they return to the host.

        rows, flat_N: of the batch, in the shard and in the teacher's flattened output. wanted: of these, by collector.
        """
        values = taps.take()
        for collector, mask in zip(source.collectors, wanted, strict=True):
            place, value = collector.place, values[collector.place.tap.name]
            place.check(value, shape)
            if not mask.any():
                continue
            flat_M = flat_N if mask.all() else flat_N[_to(torch.from_numpy(mask), flat_N.device)]
            try:
                made = collector.submit(place.vectors_of(value, flat_M))
            except KDError as error:
                if error.row is None:
                    raise TeacherError(f"feature {place.name}: cannot be coded ({error}).") from error
                row = int(rows[mask][error.row // place.vectors])
                raise source.bad_row(row, f"{place.what} has NaN or infinity") from error
            pending.inner.append((collector, rows[mask], made.to("cpu", non_blocking=flat_N.is_cuda)))

    def _collect(self, pending: _Pending, arrays: dict[str, Array], source: _Shard) -> None:
        """Write a batch's targets into the arrays."""
        if pending.copied is not None and pending.started is not None:
            pending.copied.synchronize()
            pending.seconds = pending.started.elapsed_time(pending.copied) / 1e3
        if pending.targets is not None:
            columns = pending.targets.arrays()
            bad = np.isnan(columns["tail"]).any(1) | np.isnan(columns["logprobs"]).any(1)
            if bad.any():
                row = int(pending.rows[int(bad.argmax())])
                raise source.bad_row(row, "its logits have NaN, +inf, or no finite number")
            for name, values in columns.items():
                arrays[name][pending.rows] = values
        for collector, rows, made in pending.inner:
            collector.collect(rows, made)
        self.on_batch(pending.positions, pending.seconds)


def device_name(device: torch.device) -> str:
    """The name of a GPU; of other devices, the type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _event(device: torch.device) -> torch.cuda.Event | None:
    """A recorded event; None on devices without events."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
