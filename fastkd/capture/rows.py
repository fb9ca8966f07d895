"""The rows of a shard, read from its documents or examples: the teacher's inputs, and the cache's input columns."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.documents import Documents
from ..data.examples import Examples
from ..errors import DataError
from .window_plan import ShardPlan, WindowPlan

Ints = NDArray[np.int64]
TEXT = ("tokens", "loss_mask", "document")


@dataclass(frozen=True, eq=False)
class ShardRows:
    """The n rows of a shard, window by window and segment by segment. A row is one example, or one position of text:
    its target is the teacher's distribution after the tokens of the segment up to and including it.

    inputs: the cache's input columns, `[n]` each: tokens int32, loss_mask bool, document int64; or example int64 and
        augmentation_seed int64.
    counts: bool `[n]`, whether the row gets a target: the loss mask includes it, and it is not repeated context.
    sequence_lengths: uint32 `[windows]`. document_lengths: uint32 `[segments]`, context included; segments do not
        attend to each other.
    document, start: int64 `[segments]`: the document of each segment, and its first token there.
    first_sequence: the number of the first window.
    """

    inputs: dict[str, NDArray[Any]]
    counts: NDArray[np.bool_]
    sequence_lengths: NDArray[np.uint32]
    document_lengths: NDArray[np.uint32]
    document: Ints
    start: Ints
    first_sequence: int

    def __len__(self) -> int:
        return len(self.counts)

    def rows_of(self, segments: Ints) -> tuple[Ints, Ints]:
        """The rows of some segments, one segment after the other, `[m]`, and their offsets in their segments, `[m]`."""
        lengths = self.document_lengths.astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        offsets = _offsets(lengths[segments])
        return np.repeat(starts[segments], lengths[segments]) + offsets, offsets

    def placed(self, segments: Ints) -> tuple[Ints, Ints]:
        """The rows of some segments, `[m]`, and the index of each in the teacher's flattened output for these segments,
        `[segments · L]` (see `teacher_inputs`) or `[examples]`."""
        rows, offsets = self.rows_of(segments)
        flat = np.arange(len(rows))
        if "tokens" in self.inputs:
            lengths = self.document_lengths[segments].astype(np.int64)
            flat = np.repeat(np.arange(len(segments)) * int(lengths.max()), lengths) + offsets
        return rows, flat

    def select(self, segments: Ints) -> "ShardRows":
        """The rows of some segments alone, each segment a window."""
        rows, _ = self.rows_of(segments)
        return ShardRows(
            inputs={name: column[rows] for name, column in self.inputs.items()},
            counts=self.counts[rows],
            sequence_lengths=self.document_lengths[segments],
            document_lengths=self.document_lengths[segments],
            document=self.document[segments],
            start=self.start[segments],
            first_sequence=0,
        )

    def row_numbers(self, rows: Ints) -> Ints:
        """A number for each row that does not depend on the plan, `[m]`: document · 2^31 + offset in the document."""
        ends = np.cumsum(self.document_lengths, dtype=np.int64)
        segment = np.searchsorted(ends, rows, side="right")
        offset = rows - (ends[segment] - self.document_lengths[segment]) + self.start[segment]
        return (self.document[segment] << 31) + offset


def read_shard_rows(plan: WindowPlan, data: Documents | Examples, shard: int) -> ShardRows:
    """The rows of a shard. DataError if the length of a document has changed since it was planned."""
    here = plan.shard(shard)
    lengths = here.stop - here.start
    offsets = _offsets(lengths)
    counts = offsets >= np.repeat(here.context, lengths)
    document = np.repeat(here.document, lengths)
    if isinstance(data, Examples):
        copy = offsets + np.repeat(here.start, lengths)
        inputs: dict[str, NDArray[Any]] = {"example": document, "augmentation_seed": data.seeds(document, copy)}
    else:
        tokens, loss_mask = _tokens(plan, data, here, offsets)
        counts &= loss_mask
        inputs = {"tokens": tokens, "loss_mask": counts, "document": document}
    return ShardRows(
        inputs=inputs,
        counts=counts,
        sequence_lengths=here.window_lengths.astype(np.uint32),
        document_lengths=lengths.astype(np.uint32),
        document=here.document,
        start=here.start,
        first_sequence=here.first_window,
    )


def teacher_inputs(rows: ShardRows, data: Documents | Examples | None, segments: Ints) -> Tensor:
    """The teacher's inputs for some segments: token ids int64 `[segments, L]`, or examples `[m, ...]`.

    Padding, with id 0, comes last, so that a causal teacher needs no mask.
    """
    chosen, offsets = rows.rows_of(segments)
    if isinstance(data, Examples):
        return data.read(rows.inputs["example"][chosen], rows.inputs["augmentation_seed"][chosen])
    lengths = rows.document_lengths[segments].astype(np.int64)
    padded = np.zeros((len(segments), int(lengths.max())), np.int64)
    padded[np.repeat(np.arange(len(segments)), lengths), offsets] = rows.inputs["tokens"][chosen]
    return torch.from_numpy(padded)


def _offsets(lengths: Ints) -> Ints:
    """0 to length − 1 for each length, one after the other."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _tokens(
    plan: WindowPlan, documents: Documents, shard: ShardPlan, offsets: Ints
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokens and loss mask of a shard's rows, `[n]` each. offsets: of the rows in their segments."""
    numbers, which = np.unique(shard.document, return_inverse=True)
    read = documents.read(numbers)
    planned = plan.lengths[numbers]
    if len(changed := np.flatnonzero(read.lengths != planned)):
        first = changed[0]
        raise DataError(
            f"{documents.where(int(numbers[first]))}: got {read.lengths[first]} tokens; expected {planned[first]}, as "
            "planned: the dataset, tokenizer or template has changed. Restore it, or capture into a new cache."
        )
    # the first token of each segment in what was read
    starts = (np.cumsum(read.lengths) - read.lengths)[which] + shard.start
    chosen = offsets + np.repeat(starts, shard.stop - shard.start)
    return read.tokens[chosen], read.loss_mask[chosen]
