"""One pass of a loader: prefetched steps, handed out with the counts of all ranks."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..cache.workspace import Workspace
from ..utils.distributed import Reduce
from .batch import AnyBatch, Step
from .gather import BatchFormat, gather, gather_examples
from .prefetch import PlannedStep, Prefetcher
from .shards import OpenShard, open_shard
from .split import ShardTable
from .step_plan import LoaderProgress, RankShare, StepPlan


@dataclass(frozen=True, eq=False)
class LoaderSetup:
    """What every pass of a loader is made with; see `CachedSource`.

    max_shards: decoded shards in memory. workspaces: the memory that they are decoded into, kept from pass to pass,
    since memory that was touched before is much faster.
    """

    tables: Sequence[ShardTable]
    plan: StepPlan
    form: BatchFormat
    rank: int
    world_size: int
    reduce: Reduce | None
    threads: int
    prefetch: int
    max_shards: int
    workspaces: list[Workspace] = field(default_factory=list)


class _RankStep(NamedTuple):
    """A rank's share of a step, assembled. copied: an event after the copy to the GPU."""

    share: RankShare
    batches: Sequence[AnyBatch]
    copied: torch.cuda.Event | None


Total = Callable[[], list[int]]
"""Waits for the sums over ranks: positions that count, positions, and the micro-batches of each rank."""


class LoaderPass:
    """One iteration over a loader: prefetches, and sums counts over the ranks one step ahead. `close` it when done."""

    def __init__(self, setup: LoaderSetup, progress: LoaderProgress, epochs: int | None) -> None:
        self._setup = setup
        self._free = list(setup.workspaces)
        # a stream of its own, so that copies overlap with the student's work on the GPU
        self._stream: Any = None
        if setup.form.device.type == "cuda":
            self._stream = torch.cuda.Stream(setup.form.device)  # type: ignore[no-untyped-call]
        shares = setup.plan.shares(progress, rank=setup.rank, world_size=setup.world_size, epochs=epochs)
        self._prefetcher: Prefetcher[RankShare, OpenShard, _RankStep] = Prefetcher(
            (PlannedStep(share, list(share.shards), set(share.still_open)) for share in shares),
            self._read,
            self._assemble,
            self._release,
            shards=setup.max_shards,
            steps=setup.prefetch,
            threads=setup.threads,
        )
        self._fetched: deque[tuple[_RankStep, Total] | Exception | None] = deque()

    def next(self) -> tuple[Step, LoaderProgress] | None:
        """The next step, and the progress once it is taken; None after the last."""
        if not self._fetched:
            self._fetched.append(self._fetch())
        item = self._fetched[0]
        if isinstance(item, Exception):
            raise item
        if item is None:
            return None
        self._fetched.popleft()
        if self._setup.reduce is not None:
            # the sums of the next step are computed while this one is trained on
            self._fetched.append(self._fetch())
        (share, batches, copied), total = item
        count, positions, *numbers = total()
        if copied is not None:
            current = torch.cuda.current_stream(self._setup.form.device)
            current.wait_event(copied)
            for tensor in (tensor for batch in batches for tensor in batch.tensors()):
                tensor.record_stream(current)
        if missing := max(numbers) - len(batches):
            batches = [*batches, *[self._setup.form.empty()] * missing]
        after = share.after
        return Step(list(batches), count, positions, share.sequences, after.epoch, after.number - 1), after

    def close(self) -> None:
        """End the threads, and drop the steps that are ready."""
        self._prefetcher.close()
        self._fetched.clear()

    def _fetch(self) -> tuple[_RankStep, Total] | Exception | None:
        """The next step of this rank, its sums begun; or the error that prevented it, to be raised when it is due."""
        try:
            step = self._prefetcher.next()
        except Exception as error:
            return error
        if step is None:
            return None
        numbers = [0] * self._setup.world_size
        numbers[self._setup.rank] = len(step.batches)
        mine = [sum(b.count for b in step.batches), sum(b.positions for b in step.batches), *numbers]
        return step, ((lambda: mine) if self._setup.reduce is None else self._setup.reduce(mine))

    def _read(self, key: Any) -> OpenShard:
        """On a reading thread."""
        source, row = key
        table = self._setup.tables[source]
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = Workspace()
            self._setup.workspaces.append(workspace)
        return open_shard(table.cache, int(table.shard[row]), workspace)

    def _assemble(self, share: RankShare, shards: Mapping[Any, OpenShard]) -> _RankStep:
        """On the thread that assembles."""
        if not share.shards:
            return _RankStep(share, [], None)
        form = self._setup.form
        with torch.cuda.stream(self._stream):
            sequences = [(shards[key], numbers) for key, numbers in share.shards.items()]
            batches: Sequence[AnyBatch] = (
                gather(sequences, form) if form.data is None else gather_examples(sequences, form, form.data)
            )
            if form.device.type != "cpu":
                batches = [batch.to(form.device, non_blocking=True) for batch in batches]
            return _RankStep(share, batches, None if self._stream is None else self._stream.record_event())

    def _release(self, shard: OpenShard) -> None:
        self._free.append(shard.workspace)
