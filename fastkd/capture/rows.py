"""A shard's rows, from its documents or examples: what the teacher is run on, and what lies beside the targets."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.documents import Documents
from ..data.examples import Examples
from ..errors import DataError
from .window_plan import Plan, Shard

Ints = NDArray[np.int64]
TEXT = ("tokens", "loss_mask", "document")


@dataclass(frozen=True, eq=False)
class Rows:
    """The n rows of a shard, window by window, each window piece by piece. Of text, row i is what the teacher says
    after its piece's tokens up to the i-th; of examples, what it says of one.

    inputs: the cache's input columns, `[n]` each: tokens int32, loss_mask bool, document int64; or example int64 and
        augmentation_seed int64.
    counts: bool `[n]`, whether the row counts: the document says so, and it is no context.
    sequence_lengths: uint32 `[windows]`. document_lengths: uint32 `[pieces]`, of the pieces (context included), which
        may not see each other.
    document, start: int64 `[pieces]`: which document a piece is of, from which of its tokens on.
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

    def of_pieces(self, places: Ints) -> tuple[Ints, Ints]:
        """The rows of some pieces, one piece after the other: `[m]`, and each one's place in its piece: `[m]`."""
        lengths = self.document_lengths.astype(np.int64)
        begins = np.cumsum(lengths) - lengths
        some = lengths[places]
        within = np.arange(int(some.sum())) - np.repeat(np.cumsum(some) - some, some)
        return np.repeat(begins[places], some) + within, within

    def counted(self, places: Ints) -> tuple[Ints, Ints]:
        """The rows of some pieces that count, `[m]`, and where the teacher speaks of each when it is given these pieces
        as `teacher_inputs` has them: `[m]`, among all places of `[pieces, L]`, or of examples."""
        at, within = self.of_pieces(places)
        flat = np.arange(len(at))
        if "tokens" in self.inputs:
            lengths = self.document_lengths[places].astype(np.int64)
            flat = np.repeat(np.arange(len(places)) * int(lengths.max()), lengths) + within
        counts = self.counts[at]
        return at[counts], flat[counts]

    def part(self, places: Ints) -> "Rows":
        """The rows of some pieces alone, each piece a window."""
        at, _ = self.of_pieces(places)
        return Rows(
            inputs={name: column[at] for name, column in self.inputs.items()},
            counts=self.counts[at],
            sequence_lengths=self.document_lengths[places],
            document_lengths=self.document_lengths[places],
            document=self.document[places],
            start=self.start[places],
            first_sequence=0,
        )

    def numbers(self, rows: Ints) -> Ints:
        """The number of each row in the data set, `[m]`, whatever the plan: document · 2^31 + place in the document."""
        ends = np.cumsum(self.document_lengths, dtype=np.int64)
        piece = np.searchsorted(ends, rows, side="right")
        place = rows - (ends[piece] - self.document_lengths[piece]) + self.start[piece]
        return (self.document[piece] << 31) + place


def rows(plan: Plan, data: Documents | Examples, shard: int) -> Rows:
    """The rows of a shard. DataError where a document is not as long as when it was planned."""
    here = plan.shard(shard)
    lengths = here.stop - here.start
    place = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    counts = place >= np.repeat(here.context, lengths)
    document = np.repeat(here.document, lengths)
    if isinstance(data, Examples):
        copy = place + np.repeat(here.start, lengths)
        inputs: dict[str, NDArray[Any]] = {"example": document, "augmentation_seed": data.seeds(document, copy)}
    else:
        tokens, loss_mask = _tokens(plan, data, here, lengths, place)
        counts &= loss_mask
        inputs = {"tokens": tokens, "loss_mask": counts, "document": document}
    return Rows(
        inputs=inputs,
        counts=counts,
        sequence_lengths=here.window_lengths.astype(np.uint32),
        document_lengths=lengths.astype(np.uint32),
        document=here.document,
        start=here.start,
        first_sequence=here.first_window,
    )


def teacher_inputs(some: Rows, data: Documents | Examples | None, places: Ints) -> Tensor:
    """What the teacher is given for these pieces: tokens int64 `[pieces, L]`, padded with 0; or examples `[m, ...]`.

    Pads come last, so that a causal teacher needs no mask.
    """
    at, within = some.of_pieces(places)
    if isinstance(data, Examples):
        return data.read(some.inputs["example"][at], some.inputs["augmentation_seed"][at])
    lengths = some.document_lengths[places].astype(np.int64)
    padded = np.zeros((len(places), int(lengths.max())), np.int64)
    padded[np.repeat(np.arange(len(places)), lengths), within] = some.inputs["tokens"][at]
    return torch.from_numpy(padded)


def _tokens(
    plan: Plan, documents: Documents, here: Shard, lengths: Ints, place: Ints
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokens and loss mask of the rows, `[n]` each."""
    numbers, which = np.unique(here.document, return_inverse=True)
    read = documents.read(numbers)
    planned = plan.lengths[numbers]
    if len(changed := np.flatnonzero(read.lengths != planned)):
        first = changed[0]
        raise DataError(
            f"{documents.where(int(numbers[first]))}: got {read.lengths[first]} tokens where the plan has "
            f"{planned[first]}: the dataset, the tokenizer or the template has changed. Bring back what was planned, "
            "or plan anew, for another cache."
        )
    # where each piece's first token lies among those that were read
    source = (np.cumsum(read.lengths) - read.lengths)[which] + here.start
    taken = place + np.repeat(source, lengths)
    return read.tokens[taken], read.loss_mask[taken]
