"""A teacher over a shard's batches: what it says of every row that counts, as the arrays that a cache takes.

While the device works on one batch, what it said of the one before is copied to the host and put in place.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.documents import Documents
from ..data.examples import Examples
from ..errors import TeacherError
from ..kernels import KDError, SparseTargets, linear_topk_targets, topk_targets
from ..kernels.lm_head import LMHead
from ..models.protocol import Hidden, Output
from ..teachers.protocol import Teacher
from ..utils.signals import Stopped
from .rows import Rows, teacher_inputs

Array = NDArray[Any]
Ints = NDArray[np.int64]
FIELDS = ("ids", "logprobs", "tail", "outcomes", "draws")
ROWS_AT_ONCE = 1024  # of logits that are gathered, or projected, at a time


@dataclass(frozen=True)
class TopKConfig:
    """What is kept of each row: see `topk_targets`."""

    k: int
    draws: int = 0
    draw_temperature: float = 1.0
    mass: float | None = None
    temperatures: tuple[float, ...] = (1.0, 1.5, 2.0, 4.0)
    seed: int = 0


@dataclass(eq=False)
class _Pending:
    """A batch that was given to the device."""

    rows: Ints  # of the shard, those that count
    positions: int  # of the batch, without pads
    targets: dict[str, Tensor]  # on the host, once `copied`
    copied: torch.cuda.Event | None
    begun: torch.cuda.Event | None
    seconds: float  # where there are no events


@dataclass(eq=False)
class Runner:
    """Runs a teacher. Keeps, from shard to shard, how large a batch did not fit into memory.

    on_batch: told of each batch's positions, and of the seconds that the device was busy with it.
    should_stop: asked before each batch; where it says so, `Stopped` is raised.
    """

    teacher: Teacher
    ask: TopKConfig
    on_batch: Callable[[int, float], None] = lambda positions, seconds: None
    should_stop: Callable[[], bool] = lambda: False
    _too_large: int | None = None
    _stream: Any = field(default=None, repr=False)

    def run(
        self, some: Rows, batches: list[Ints], data: Documents | Examples | None, shard: int
    ) -> tuple[dict[str, Array], dict[str, list[int]]]:
        """What the teacher says of a shard: the arrays of `CacheWriter.write_shard`; and of each batch that did not
        fit, by its number, the pieces of each part that it was halved into.

        Raises TeacherError where it says NaN or infinity, naming document and position.
        """
        arrays = self._room(len(some))
        halved: dict[str, list[int]] = {}
        waiting: _Pending | None = None
        for number, places in enumerate(batches):
            parts = []
            for pending in self._parts(some, places, data, shard):
                parts.append(pending[0])
                if waiting is not None:
                    self._collect(waiting, arrays, some, data, shard)
                waiting = pending[1]
            if len(parts) > 1:
                halved[str(number)] = parts
        if waiting is not None:
            self._collect(waiting, arrays, some, data, shard)
        return arrays, halved

    def _room(self, n: int) -> dict[str, Array]:
        """The arrays of a shard of which no row counts yet."""
        ask, width = self.ask, min(self.ask.k, self.teacher.vocab_size) + self.ask.draws
        arrays: dict[str, Array] = {
            "ids": np.zeros((n, width), np.int32),
            "logprobs": np.full((n, width), -np.inf, np.float32),
            "tail": np.full((n, len(ask.temperatures)), -np.inf, np.float32),
            "outcomes": np.zeros(n, np.int32),
        }
        if ask.draws:
            arrays["draws"] = np.zeros((n, width), np.int32)
        return arrays

    def _parts(
        self, some: Rows, places: Ints, data: Documents | Examples | None, shard: int
    ) -> Iterator[tuple[int, _Pending]]:
        """A batch, or its halves, their halves and so on where it does not fit: how many pieces, and what comes."""
        if self.should_stop():
            raise Stopped
        padded = len(places) * int(some.document_lengths[places].max())
        if len(places) == 1 or self._too_large is None or padded < self._too_large:
            try:
                pending = self._issue(some, places, data, shard)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(places) == 1:
                    where = data.where(int(some.document[places[0]])) if data is not None else f"shard {shard}"
                    raise TeacherError(
                        f"{where}: one piece of {padded} positions does not fit into the device's memory beside the "
                        "teacher. Use a smaller context, another dtype, or --teacher-parallel."
                    ) from error
                self._too_large = padded
            else:
                yield len(places), pending
                return
            # outside of the handler: the error's frames hold what is to be freed
            if self.teacher.device.type == "cuda":
                torch.cuda.empty_cache()
        middle = (len(places) + 1) // 2
        yield from self._parts(some, places[:middle], data, shard)
        yield from self._parts(some, places[middle:], data, shard)

    @torch.inference_mode()
    def _issue(self, some: Rows, places: Ints, data: Documents | Examples | None, shard: int) -> _Pending:
        """Give a batch to the device; what it says is on its way to the host when this returns."""
        rows, flat = some.counted(places)
        positions = int(some.document_lengths[places].sum(dtype=np.int64))
        if not len(rows):
            return _Pending(rows, positions, {}, None, None, 0.0)
        device = self.teacher.device
        inputs, flat_M, numbers_M = (
            _to(tensor, device)
            for tensor in (
                teacher_inputs(some, data, places),
                torch.from_numpy(flat),
                torch.from_numpy(some.numbers(rows)),
            )
        )
        begun = time.perf_counter()
        start = _event(device)
        output = self.teacher(inputs)
        try:
            leading = inputs.shape[: 2 if "tokens" in some.inputs else 1]
            targets = targets_of(output, flat_M, numbers_M, self.ask, leading, self.teacher.vocab_size)
        except KDError as error:
            if error.row is None:
                raise
            raise _bad_row(some, int(rows[error.row]), data, shard, str(error)) from error
        host = {name: t for name in FIELDS if (t := getattr(targets, name)) is not None}
        if device.type != "cuda":
            return _Pending(rows, positions, host, None, None, time.perf_counter() - begun)
        done = _event(device)
        assert done is not None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(done)
            for name, tensor in host.items():
                host[name] = torch.empty_like(tensor, device="cpu", pin_memory=True)
                host[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)
            copied = _event(device, self._stream)
        return _Pending(rows, positions, host, copied, start, 0.0)

    def _collect(
        self, pending: _Pending, arrays: dict[str, Array], some: Rows, data: Documents | Examples | None, shard: int
    ) -> None:
        """Put what was said of a batch into its rows."""
        seconds = pending.seconds
        if pending.copied is not None and pending.begun is not None:
            pending.copied.synchronize()
            seconds = pending.begun.elapsed_time(pending.copied) / 1e3
        if pending.targets:
            said = {name: tensor.numpy() for name, tensor in pending.targets.items()}
            bad = np.isnan(said["tail"]).any(1) | np.isnan(said["logprobs"]).any(1)
            if bad.any():
                row = int(pending.rows[int(bad.argmax())])
                raise _bad_row(some, row, data, shard, "its logits have NaN, +inf, or no finite number")
            for name, values in said.items():
                arrays[name][pending.rows] = values
        self.on_batch(pending.positions, seconds)


def targets_of(
    output: Output, flat_M: Tensor, numbers_M: Tensor, ask: TopKConfig, shape: torch.Size, vocab_size: int
) -> SparseTargets:
    """The targets of some rows of a teacher's output.

    flat_M: int64 `[m]`, the rows, among all of `[B, L]` (or `[B]`). numbers_M: int64 `[m]`, their numbers in the data
    set, which the draws depend on. shape: `[B, L]` or `[B]`. Raises TeacherError where the output is of another shape,
    and KDError (with `row`, of the m) where a row is not finite, on the CPU.
    """
    options: dict[str, Any] = {
        "temperatures": ask.temperatures,
        "mass": ask.mass,
        "draws": ask.draws,
        "draw_temperature": ask.draw_temperature,
        "seed": ask.seed,
    }
    rows_MX = rows_of(output, shape, vocab_size)
    if isinstance(output, Hidden) and isinstance(output.lm_head, LMHead):
        head = output.lm_head
        return linear_topk_targets(
            rows_MX[flat_M],
            head.weight,
            ask.k,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            positions=numbers_M,
            **options,
        )
    parts = []
    for start in range(0, len(flat_M), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        chunk = rows_MX[flat_M[some]]
        if isinstance(output, Hidden):
            assert not isinstance(output.lm_head, LMHead)
            chunk = output.lm_head(chunk)
        try:
            parts.append(topk_targets(chunk, ask.k, positions=numbers_M[some], **options))
        except KDError as error:
            if error.row is None:
                raise
            raise KDError(str(error), row=start + error.row) from error
    return joined(parts)


def rows_of(output: Output, shape: torch.Size, vocab_size: int) -> Tensor:
    """All rows of a teacher's output, `[B·L, D or V]`. shape: `[B, L]` of text, `[B]` of examples. TeacherError where
    the output has not a row for each."""
    values = output.states if isinstance(output, Hidden) else output.values
    if tuple(values.shape[:-1]) != tuple(shape):
        needed = ", ".join(map(str, shape))
        raise TeacherError(
            f"teacher: found an output of shape {tuple(values.shape)}; ({needed}, V), a row for each "
            f"{'position' if len(shape) == 2 else 'example'}, is needed."
        )
    width = values.shape[-1]
    if isinstance(output, Hidden) and isinstance(output.lm_head, LMHead):
        width = output.lm_head.weight.shape[0]
    if width != vocab_size and not (isinstance(output, Hidden) and not isinstance(output.lm_head, LMHead)):
        raise TeacherError(f"teacher: found logits of {width} tokens; vocab_size is {vocab_size}.")
    return values.reshape(-1, values.shape[-1])


def joined(parts: list[SparseTargets]) -> SparseTargets:
    """Targets one after the other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    found = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in FIELDS if getattr(first, name) is not None
    }
    return SparseTargets(
        **found,
        vocab_size=first.vocab_size,
        temperatures=first.temperatures,
        draw_temperature=first.draw_temperature,
    )


def _bad_row(some: Rows, row: int, data: Documents | Examples | None, shard: int, found: str) -> TeacherError:
    """The error for a row of which the teacher says what no teacher can."""
    number = int(some.numbers(np.array([row]))[0])
    document, place = number >> 31, number & (2**31 - 1)
    where = data.where(document) if data is not None else f"document {document}"
    return TeacherError(
        f"{where}, position {place}: the teacher failed there: {found}. Nothing of shard {shard} was written. Try a "
        "wider dtype (float16 overflows where bfloat16 and float32 do not), or leave the document out."
    )


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _event(device: torch.device, stream: Any = None) -> torch.cuda.Event | None:
    """The device's present moment; None where it has no events."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream if stream is not None else torch.cuda.current_stream(device))
    return event
