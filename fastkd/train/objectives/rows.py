"""Rows of a micro-batch that have a feature: the student's, their segments, and their number in the whole step."""

from torch import Tensor

from ...errors import TrainError
from ...kernels.features.segments import Segments
from ...stream.batch import AnyBatch, MicroBatch


def rows_at(value: Tensor, index: Tensor | None) -> Tensor:
    """A student's states `[B, L, D]` at some flattened positions, `[N, D]`."""
    flat = value.flatten(0, -2)
    return flat if index is None or len(index) == len(flat) else flat[index]


def segments_of(batch: AnyBatch, index: Tensor | None) -> Segments | None:
    """The rows of each segment of text, which are compared with one another and with no others; None for examples."""
    if not isinstance(batch, MicroBatch):
        return None
    rows, length = batch.input_ids.shape
    padded = batch.layout == "padded"
    return Segments.of(index, range(0, rows * length + 1, length) if padded else batch.cu_seqlens)


def count_of(batch: AnyBatch, signal: str) -> int:
    """The vectors of a signal in the whole optimizer step, of all ranks."""
    if signal not in batch.counts:
        raise TrainError(
            f"objective: got a micro-batch without the count of {signal} in the whole step; expected it in "
            "MicroBatch.counts, as CachedSource gives it."
        )
    return batch.counts[signal]
