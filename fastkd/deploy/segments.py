"""The rows of a micro-batch as a deployed model sees them: a document at a time, without pads."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def rows_of(batch: Any) -> Iterator[Tensor]:
    """Of a `MicroBatch`, the ids of each segment in order, `[1, L]`; of an `ExampleBatch`, its inputs at once."""
    for rows, _ in segments_of(batch):
        yield rows


def segments_of(batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The same, and with each the flattened positions of the micro-batch that its outputs are at, `[L]` or `[B]`
    int64. Segments without tokens of a document (pads) are left out."""
    if hasattr(batch, "inputs"):
        yield batch.inputs, _range(0, len(batch.inputs), batch.labels)
        return
    ids, bounds, known = batch.input_ids, batch.cu_seqlens.tolist(), (batch.sequences >= 0).tolist()
    for row, (begin, end) in enumerate(pairwise(bounds)):
        if not known[row]:
            continue
        if batch.layout == "padded":
            yield ids[row : row + 1, : end - begin], _range(row * ids.shape[1], end - begin, ids)
        else:
            yield ids[:, begin:end], _range(begin, end - begin, ids)


def _range(begin: int, count: int, like: Tensor) -> Tensor:
    return torch.arange(begin, begin + count, device=like.device)
