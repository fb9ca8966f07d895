"""A teacher's forwards for a micro-batch: which inputs it is called with, and where its answers belong.

A padded micro-batch is one forward as it stands. A packed one is divided into its segments again, since a teacher takes
rows that are padded at the end; and a micro-batch with more positions than a teacher batch may have is divided, too.
That is decided on the host, where the micro-batch is assembled, so that nothing waits for the device later.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, overload

import numpy as np
import torch
from torch import Tensor

from ..data.packing import batches
from ..kernels.fields import Field, TensorFields
from ..stream.batch import AnyBatch, ExampleBatch, MicroBatch
from ..stream.gather import ranges

FORWARDS = "teacher/forwards"
"""The name under which a micro-batch carries them to the device."""


@dataclass(frozen=True, eq=False)
class Forward(TensorFields):
    """inputs: `[b, L]` or `[b, ...]`. flat `[m]`: indices of the rows that count in the flattened answer. rows `[m]`:
    which of the micro-batch's rows that count they are. there, here `[n]`: of all rows, the indices in the flattened
    answer and in the flattened micro-batch."""

    inputs: Tensor
    flat: Tensor
    rows: Tensor
    there: Tensor
    here: Tensor

    FIELDS: ClassVar[tuple[Field, ...]] = (
        Field("inputs", torch.int64, 0, "BL"), Field("flat", torch.int64, 0, "M"), Field("rows", torch.int64, 0, "M"),
        Field("there", torch.int64, 0, "N"), Field("here", torch.int64, 0, "N"),
    )  # fmt: skip
    NAME: ClassVar[str] = "forward"


@dataclass(frozen=True, eq=False)
class Forwards:
    """The forwards of a micro-batch. order `[m]`: of each row that counts, its place among the rows of all forwards."""

    parts: Sequence[Forward]
    order: Tensor

    def __len__(self) -> int:
        return len(self.parts)

    def tensors(self) -> list[Tensor]:
        return [self.order, *(tensor for part in self.parts for tensor in part.tensors())]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, parts=[part.map(function) for part in self.parts], order=function(self.order))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self.map(lambda x: x.pin_memory())


def inputs_of(batch: AnyBatch) -> Tensor:
    """What a model is called with: token ids `[B, L]`, or examples `[B, ...]`."""
    return batch.inputs if isinstance(batch, ExampleBatch) else batch.input_ids  # type: ignore[attr-defined]


def lengths_of(of: AnyBatch | Forward) -> list[int]:
    """The tokens of each row of a padded micro-batch or a forward of text, without padding. It waits for the device."""
    if isinstance(of, Forward):
        rows, width = of.inputs.shape
        found = torch.bincount(of.there // width, minlength=rows)
    else:
        assert isinstance(of, MicroBatch)
        found = of.cu_seqlens.diff()
    lengths: list[int] = found.tolist()
    return lengths


def with_forwards(batch: AnyBatch, tokens: int, *, all_rows: bool = False) -> AnyBatch:
    """A micro-batch on the host with its forwards, unless it is one as it stands. tokens: positions of a forward, pads
    included, at most; a longer segment is alone. all_rows: also forwards without a row that counts."""
    if not batch.count and not all_rows:
        return batch
    inputs, index = inputs_of(batch).numpy(), batch.targets.index.numpy()  # type: ignore[union-attr]
    if isinstance(batch, MicroBatch) and batch.layout == "packed":
        bounds, real = batch.cu_seqlens.numpy().astype(np.int64), batch.sequences.numpy() >= 0
        inputs, begins, lengths = inputs.reshape(-1), bounds[:-1][real], np.diff(bounds)[real]
    elif isinstance(batch, MicroBatch):
        if inputs.size <= tokens or len(inputs) == 1:
            return batch
        begins, lengths = np.arange(len(inputs)) * inputs.shape[1], np.diff(batch.cu_seqlens.numpy()).astype(np.int64)
        inputs = inputs.reshape(-1)
    else:
        if len(inputs) <= tokens:
            return batch
        begins, lengths = np.arange(len(inputs)), np.ones(len(inputs), np.int64)
    parts = []
    for some in batches(lengths, tokens):
        longest = int(lengths[some].max())
        there = ranges(np.arange(len(some)) * longest, lengths[some])  # in the flattened [b, L] of the forward
        here = ranges(begins[some], lengths[some])  # in the micro-batch
        at = np.minimum(np.searchsorted(index, here), max(len(index) - 1, 0))
        counted = index[at] == here if len(index) else np.zeros(len(here), bool)
        if not counted.any() and not all_rows:
            continue
        if isinstance(batch, MicroBatch):
            made = np.zeros((len(some), longest), np.int64)
            made.reshape(-1)[there] = inputs[here]
        else:
            made = inputs[here]
        parts.append(Forward(*map(torch.from_numpy, (made, there[counted], at[counted], there, here))))
    order = torch.argsort(torch.cat([part.rows for part in parts]))
    forwards = Forwards(parts, order)
    if batch.labels.is_pinned():
        forwards = forwards.pin_memory()
    return replace(batch, signals={**batch.signals, FORWARDS: forwards})


class AnsweredBatches(Sequence[AnyBatch]):
    """Micro-batches that are answered when they are taken, and again when they are taken again. plain: unanswered."""

    def __init__(self, plain: Sequence[AnyBatch], answer: Callable[[AnyBatch], AnyBatch]) -> None:
        self.plain, self._answer = plain, answer

    def __len__(self) -> int:
        return len(self.plain)

    @overload
    def __getitem__(self, at: int) -> AnyBatch: ...
    @overload
    def __getitem__(self, at: slice) -> "AnsweredBatches": ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return AnsweredBatches(self.plain[at], self._answer)
        return self._answer(self.plain[at])

    def __iter__(self) -> Iterator[AnyBatch]:
        return map(self._answer, self.plain)
