"""A shard's rows, from its documents: what the teacher sees, and what goes into the cache beside the targets."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.documents import Documents
from ..errors import DataError
from .plan import Plan


@dataclass(frozen=True, eq=False)
class Rows:
    """The n rows of a shard, window by window. Row i is what the teacher says after its piece's tokens up to the i-th.

    tokens: int32 `[n]`. loss_mask: bool `[n]`, whether the row counts: the document says so, and it is no context.
    sequence_lengths: uint32 `[windows]`. document_lengths: uint32 `[pieces]`, of the pieces (context included) that may
        not see each other.
    positions: int32 `[n]`, position ids. They restart at 0 with every piece, so with every document, and with every
        part of a cut one too: the model sees nothing from before it.
    document: int64 `[pieces]`, start: int64 `[pieces]`: which document a piece is of, from which of its tokens on.
    first_sequence: the number of the first window.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    positions: NDArray[np.int32]
    sequence_lengths: NDArray[np.uint32]
    document_lengths: NDArray[np.uint32]
    document: NDArray[np.int64]
    start: NDArray[np.int64]
    first_sequence: int


def rows(plan: Plan, documents: Documents, shard: int) -> Rows:
    """The rows of a shard. DataError where a document is not as long as when it was planned."""
    here = plan.shard(shard)
    numbers, which = np.unique(here.document, return_inverse=True)
    read = documents.read(numbers)
    planned = plan.lengths[numbers]
    if len(changed := np.flatnonzero(read.lengths != planned)):
        first = changed[0]
        raise DataError(
            f"{documents.where(int(numbers[first]))}: found {read.lengths[first]} tokens where the plan has "
            f"{planned[first]}: the dataset, the tokenizer or the template has changed. Bring back what was planned, "
            "or plan anew, for another cache."
        )
    lengths = here.stop - here.start
    begins = np.cumsum(lengths) - lengths
    row = np.arange(int(lengths.sum()))
    position = row - np.repeat(begins, lengths)
    # where each piece's first token lies among those that were read
    source = (np.cumsum(read.lengths) - read.lengths)[which] + here.start
    taken = position + np.repeat(source, lengths)
    return Rows(
        tokens=read.tokens[taken],
        loss_mask=read.loss_mask[taken] & (position >= np.repeat(here.context, lengths)),
        positions=position.astype(np.int32),
        sequence_lengths=here.window_lengths.astype(np.uint32),
        document_lengths=lengths.astype(np.uint32),
        document=here.document,
        start=here.start,
        first_sequence=here.first_window,
    )
