"""Signals: what the micro-batches of a cache have beside inputs, labels and soft targets.

A signal is named KIND/NAME, as in "features/20". Its kind is one file of this room and one line of `KINDS`: it says how
a signal is opened for a shard, on a thread of the loader, and gathered for a micro-batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.workspace import Workspace
from ..errors import StreamError
from .features import open_feature
from .rows import open_rows
from .split import ShardTable

Ints = NDArray[np.int64]


class Signal(Protocol):
    """A signal of one loader, of all its caches. Called from several threads at once."""

    @property
    def name(self) -> str:
        """KIND/NAME: of `AnyBatch.signals` and `AnyBatch.counts`."""

    def describe(self) -> Any:
        """What decides its values, for the loader's fingerprint, as JSON."""

    def open(self, source: int, shard: int, workspace: Workspace, inputs: Any) -> Any:
        """A shard's signal, decoded as far as batches need it. source: the number of the cache. workspace: memory that
        belongs to the shard while it is open, and to another one after that. inputs: the shard's `TextInputs` or
        `ExampleInputs`."""

    def gather(self, parts: Sequence[tuple[Any, Ints, Ints]]) -> Any:
        """The signal of a micro-batch, on the host: an object with `len`, `to`, `pin_memory`, `map` and `tensors`.

        parts: for each stretch of rows of one shard, what `open` returned, the rows `[m]` in the shard, and their
        flattened positions `[m]` in the micro-batch, ascending over all parts. No parts: of an empty micro-batch.
        """

    def row_bytes(self) -> int:
        """Bytes of a row of an open shard, at most."""


KINDS: dict[str, Callable[[str, Sequence[ShardTable], torch.device], Signal]] = {
    "features": open_feature,
    "rows": open_rows,
}
"""Functions from a name, the shards to read of each cache, and the device of the micro-batches to a signal. They raise
StreamError if a cache lacks the signal, or some of it."""


def open_signals(names: Sequence[str], tables: Sequence[ShardTable], device: torch.device) -> tuple[Signal, ...]:
    """The signals of these names. Raises StreamError for an unknown kind, a name given twice, and what a kind
    refuses."""
    found: list[Signal] = []
    for name in names:
        kind, _, rest = name.partition("/")
        if kind not in KINDS or not rest:
            raise StreamError(f"signals: got {name!r}; expected KIND/NAME, with a kind of {', '.join(KINDS)}.")
        if name in (signal.name for signal in found):
            raise StreamError(f"{kind}: got {rest!r} twice; expected each name once.")
        found.append(KINDS[kind](rest, tables, device))
    return tuple(found)
