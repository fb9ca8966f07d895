"""A teacher's pass over the batches of a shard: the targets of every row that counts, as the arrays a cache stores.

While the device runs one batch, the host writes the targets of the batch before it into the arrays.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.documents import Documents
from ..data.examples import Examples
from ..errors import TeacherError
from ..kernels import KDError, SparseTargets
from ..settings import CaptureSettings
from ..teachers.protocol import Answer, Teacher
from ..utils.signals import Stopped
from .answers import targets_of, topk_config
from .rows import ShardRows, teacher_inputs

Array = NDArray[Any]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Shard:
    """A shard's rows, and where they come from. data: None for tokens whose documents are not available."""

    rows: ShardRows
    data: Documents | Examples | None
    index: int

    def where(self, document: int) -> str:
        """A document's description, for messages."""
        return f"document {document}" if self.data is None else self.data.where(document)

    def bad_row(self, row: int, problem: str) -> TeacherError:
        """The error for a row that gets no valid target."""
        number = int(self.rows.row_numbers(np.array([row]))[0])
        return TeacherError(
            f"{self.where(number >> 31)}, position {number & (2**31 - 1)}: the teacher failed there: {problem}. "
            f"Nothing of shard {self.index} was written. Try a wider dtype (float16 overflows where bfloat16 and "
            "float32 do not), or leave the document out."
        )


@dataclass(eq=False)
class _Pending:
    """A batch that was submitted to the device. rows: those of the shard that count. positions: without padding.

    targets: on the host, once `copied`; None for no rows. started, copied: None on devices without events, where
    seconds is the duration.
    """

    rows: Ints
    positions: int
    targets: SparseTargets | None = None
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

    def run(
        self, rows: ShardRows, batches: list[Ints], data: Documents | Examples | None, shard: int
    ) -> tuple[dict[str, Array], dict[str, list[int]]]:
        """The targets of a shard, as the arrays of `CacheWriter.write_shard`; and for each batch that did not fit into
        memory, by its number, how many segments each of its parts had.

        batches: the segments of each batch. Raises TeacherError for NaN or infinity, naming document and position.
        """
        source = _Shard(rows, data, shard)
        arrays = SparseTargets.empty(
            len(rows),
            topk_config(self.settings).width(self.teacher.vocab_size),
            vocab_size=self.teacher.vocab_size,
            temperatures=self.settings.temperatures,
            draws=self.settings.draws > 0,
            device="cpu",
        ).arrays()
        halved: dict[str, list[int]] = {}
        pending: _Pending | None = None
        for number, segments in enumerate(batches):
            sizes = []
            for size, submitted in self._submit_parts(source, segments):
                sizes.append(size)
                if pending is not None:
                    self._collect(pending, arrays, source)
                pending = submitted
            if len(sizes) > 1:
                halved[str(number)] = sizes
        if pending is not None:
            self._collect(pending, arrays, source)
        return arrays, halved

    def _submit_parts(self, source: _Shard, segments: Ints) -> Iterator[tuple[int, _Pending]]:
        """Submit a batch, or if it does not fit into memory its halves, their halves and so on: for each the number of
        segments, and the submitted batch."""
        if self.should_stop():
            raise Stopped
        padded = len(segments) * int(source.rows.document_lengths[segments].max())
        if len(segments) == 1 or self._too_large is None or padded < self._too_large:
            try:
                pending = self._submit(source, segments)
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
            if self.teacher.device.type == "cuda":
                torch.cuda.empty_cache()
        middle = (len(segments) + 1) // 2
        yield from self._submit_parts(source, segments[:middle])
        yield from self._submit_parts(source, segments[middle:])

    @torch.inference_mode()
    def _submit(self, source: _Shard, segments: Ints) -> _Pending:
        """Submit a batch to the device, and the copy of its targets to the host."""
        rows, flat = source.rows.counted(segments)
        pending = _Pending(rows, int(source.rows.document_lengths[segments].sum(dtype=np.int64)))
        if not len(rows):
            return pending
        device = self.teacher.device
        inputs, flat_M, numbers_M = (
            _to(tensor, device)
            for tensor in (
                teacher_inputs(source.rows, source.data, segments),
                torch.from_numpy(flat),
                torch.from_numpy(source.rows.row_numbers(rows)),
            )
        )
        clock = time.perf_counter()
        pending.started = _event(device)
        answer = self.teacher(inputs)
        self.on_answer(answer)
        try:
            shape = inputs.shape[: 2 if "tokens" in source.rows.inputs else 1]
            targets = targets_of(answer, flat_M, numbers_M, self.settings, shape, self.teacher.vocab_size)
        except KDError as error:
            if error.row is None:
                raise TeacherError(f"teacher: no targets can be made of its answer ({error}).") from error
            raise source.bad_row(int(rows[error.row]), str(error)) from error
        pending.targets = targets.to("cpu", non_blocking=device.type == "cuda")  # into page-locked memory
        pending.copied = _event(device)
        pending.seconds = time.perf_counter() - clock
        return pending

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
