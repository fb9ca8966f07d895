"""Inputs of the training split of a cache, for formats that choose the scales of activations by them."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..data.examples import Examples
from ..stream.cached import CachedSource
from .segments import rows_of

POSITIONS = 8192
EXAMPLES = 512


class Calibration:
    """An iterable of input batches: ids `[1, L]` int64, each a document (or the part of one in a window) without pads;
    or of a cache of examples, inputs `[B, ...]`.

    The same each time that it is iterated: the sequences of the first steps of a shuffled epoch, of `positions`
    positions in all at most (a sequence is whole; there is at least one).
    """

    def __init__(self, cache: Any, data: Examples | None = None, *, positions: int | None = None) -> None:
        self._cache, self._data = cache, data
        self._positions = positions or (POSITIONS if data is None else EXAMPLES)

    def __iter__(self) -> Iterator[Tensor]:
        source = CachedSource(
            self._cache, split="train", batch_size=1 if self._data is None else 32, data=self._data, threads=1,
            prefetch=1, allow_partial=True,
        )  # fmt: skip
        left = self._positions
        try:
            for step in source.steps(epochs=1):
                for batch in step.micro_batches:
                    yield from rows_of(batch)
                left -= step.positions
                if left <= 0:
                    return
        finally:
            source.close()
