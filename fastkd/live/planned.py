"""The shards of a capture that is planned and not written: what a live source reads its inputs from."""

import hashlib
import threading
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.spec import CacheSpec
from ..cache.stores import Store
from ..capture.claims import Claims
from ..capture.prepare import prepare
from ..capture.rows import ShardRows, read_shard_rows
from ..capture.window_plan import WindowPlan
from ..data.documents import Documents
from ..data.examples import Examples
from ..data.lengths import LENGTHS_KEY
from ..errors import StreamError
from ..settings import CaptureSettings
from ..stream.split import SPLITS, ShardTable, nothing_left
from ..teachers.protocol import Teacher

Ints = NDArray[np.int64]


class NoTeacher:
    """Stands for the teacher of a source whose micro-batches come unanswered."""

    fingerprint = "none"
    device = torch.device("cpu")

    def __init__(self, vocab_size: int, max_positions: int | None = None) -> None:
        self.vocab_size, self.max_positions = vocab_size, max_positions

    def __call__(self, inputs: Any) -> Any:
        raise AssertionError("there is no teacher to call")


@dataclass(frozen=True, eq=False)
class PlannedShards:
    """Shards by a window plan, as the cache of a capture has them; see `split.ShardOrigin`. `plan_shards` makes one.

    plan, spec: the plan, and the spec of the cache that a capture would write.
    """

    plan: WindowPlan
    spec: CacheSpec
    data: Documents | Examples
    settings: CaptureSettings
    _reading: threading.Lock = field(default_factory=threading.Lock)  # documents are for one thread at a time

    def __repr__(self) -> str:
        return f"the live data ({self.plan.windows:,} sequences)"

    def sequence_lengths(self, index: int) -> Ints:
        """Positions of each sequence of a shard, `[sequences]`."""
        return self.plan.shard(index).window_lengths

    def read(self, index: int) -> ShardRows:
        """The rows of a shard, read from the data. Raises DataError if they have changed since they were planned."""
        with self._reading:
            return read_shard_rows(self.plan, self.data, index)

    def table(
        self, split: str, *, skip: int = 0, max_positions: int | None = None, limit: str = "max_positions"
    ) -> ShardTable:
        """The sequences of a split, as `split.open_split` finds those of a cache. Raises StreamError."""
        if split not in SPLITS:
            raise StreamError(f"split: got {split!r}; expected one of {', '.join(SPLITS)}.")
        plan = self.plan
        begin, end = (0, plan.train_shards) if split == "train" else (plan.train_shards, plan.shards)
        if begin == end:
            raise StreamError("split: got 'held_out', but no documents are held out; expected held_out above 0.")
        shard = np.arange(begin, end)
        sequences, positions = (np.diff(ends)[begin:end] for ends in (plan.shard_windows, plan.shard_rows))
        whole = ShardTable(self, shard, np.zeros(len(shard), np.int64), sequences, positions)
        table = whole.part(skip, max_positions)
        if not len(table.shard):
            raise nothing_left(whole, split, skip, max_positions, limit)
        digest = hashlib.sha256(plan.hash.encode())
        for column in (table.shard, table.first, table.sequences, table.positions):
            digest.update(column.astype("<i8").tobytes())
        return ShardTable(self, table.shard, table.first, table.sequences, table.positions, digest.hexdigest())

    @property
    def has_held_out(self) -> bool:
        """Whether documents are held out."""
        return self.plan.train_shards < self.plan.shards

    def describe(self) -> dict[str, Any]:
        """What decides the inputs and the targets, by name, as JSON: teacher, data and settings."""
        plan = asdict(self.plan.settings)
        kept = {name: value for name, value in self.spec.provenance.texts().items() if name != "dataset"}
        names = ("vocab_size", "k", "draws", "draw_temperature", "mass", "temperatures")
        kept |= {name: getattr(self.spec, name) for name in names}
        kept |= {"data": self.plan.dataset, "data_seed": plan.pop("seed"), **plan}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def plan_shards(
    data: Documents | Examples,
    teacher: Teacher | None,
    settings: CaptureSettings,
    *,
    vocab_size: int | None = None,
    max_positions: int | None = None,
    store: Store | None = None,
    notes: str = "",
    progress: bool = False,
) -> PlannedShards:
    """Plan the shards that `fastkd capture` with these settings would write; nothing is written.

    teacher: None for a source whose micro-batches come unanswered; then vocab_size, that of whatever answers them, and
    max_positions, the longest sequence that it takes (None: no limit).
    store, notes: of the cache that the shards will be written to; the lengths of documents are read from it if they are
    there. Raises CacheError if it holds another capture's cache, naming what differs.
    """
    if teacher is None:
        if vocab_size is None:
            raise StreamError("vocab_size: got None without a teacher; expected the number of outcomes.")
        teacher = NoTeacher(vocab_size, max_positions)
    elif vocab_size not in (None, teacher.vocab_size):
        raise StreamError(f"vocab_size: got {vocab_size}; expected {teacher.vocab_size}, the teacher's.")
    # with claims, lengths would be written
    claims = Claims(store, 0, 1) if store is not None and store.exists(LENGTHS_KEY) else None
    plan, spec = prepare(teacher, data, settings, store, claims, progress=progress, notes=notes)
    return PlannedShards(plan, spec, data, settings)
