"""Numbers of the rows that count, as a signal: what seeds the draws of targets that are made from a micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.reader import Cache
from ..cache.workspace import Workspace
from ..errors import StreamError
from ..kernels.fields import Field, TensorFields
from .split import ShardTable

Ints = NDArray[np.int64]
NUMBERS = "rows/numbers"
"""The name of the signal."""


@dataclass(frozen=True, eq=False)
class RowNumbers(TensorFields):
    """numbers int64 `[m]`: of the m positions that count, in the order of `targets.index`: document · 2^31 + offset in
    the document (example · 2^31 + copy). A capture draws the same entries for the same number."""

    numbers: Tensor

    FIELDS: ClassVar[tuple[Field, ...]] = (Field("numbers", torch.int64, 0, "N"),)
    NAME: ClassVar[str] = "rows"

    def __len__(self) -> int:
        return len(self.numbers)


class RowNumbersSignal:
    """The numbers of the rows that count; see `signals.Signal`."""

    name = NUMBERS

    def describe(self) -> str:
        return NUMBERS

    def open(self, source: int, shard: int, workspace: Workspace, inputs: Any) -> Ints:
        """Of each row, `[n]`; −1 for one that does not count."""
        found: Ints = np.where(inputs.counted, inputs.numbers, -1)
        return found

    def gather(self, parts: Sequence[tuple[Ints, Ints, Ints]]) -> RowNumbers:
        numbers = np.concatenate([np.zeros(0, np.int64), *(shard[here] for shard, here, _ in parts)])
        return RowNumbers(torch.from_numpy(numbers[numbers >= 0]))

    def row_bytes(self) -> int:
        return 8


def open_rows(name: str, tables: Sequence[ShardTable], device: torch.device) -> RowNumbersSignal:
    """The signal of rows/numbers. StreamError for another name, and for a cache, which does not have them."""
    if f"rows/{name}" != NUMBERS:
        raise StreamError(f"rows: got {name!r}; expected numbers.")
    for table in tables:
        if isinstance(table.origin, Cache):
            raise StreamError(
                f"rows: got {table.origin!r}, which does not have the numbers of its rows; expected a live source."
            )
    return RowNumbersSignal()
