"""One pass of a loader: steps made ahead of time, handed out with the counts of all ranks."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..cache.spec import CacheSpec
from ..cache.workspace import Workspace
from ..data.examples import Examples
from ..utils.distributed import Reduce
from .batch import AnyBatch, Step, example_filler, filler
from .compact import Shape, no_targets
from .gather import gather
from .gather_examples import gather_examples
from .mixture import Stream
from .prefetch import Needs, Prefetcher
from .shards import OpenShard, open_shard
from .split import Table
from .step_plan import Batch, Lengths, Progress, Share, shares


@dataclass(frozen=True, eq=False)
class Setup:
    """What a pass is made with; see `DistillLoader`. spec: of the first cache. most_shards: in memory, decoded.
    spaces: the memory they lie in. data: what the examples of a cache of such are read from."""

    tables: Sequence[Table]
    stream: Stream
    batch: Batch
    spec: CacheSpec
    shape: Shape
    device: torch.device
    rank: int
    world_size: int
    reduce: Reduce | None
    threads: int
    ahead: int
    most_shards: int
    spaces: list[Workspace]
    data: Examples | None = None


class _Made(NamedTuple):
    """A rank's share of a step, put together. copied: when it is on the device."""

    share: Share
    batches: Sequence[AnyBatch]
    copied: torch.cuda.Event | None


class _Fetched(NamedTuple):
    """The same, with what waits for the sums over ranks: positions that count, positions, micro-batches by rank."""

    share: Share
    batches: Sequence[AnyBatch]
    copied: torch.cuda.Event | None
    total: Callable[[], list[int]]


class Run:
    """One iteration: what runs ahead, and the sums over ranks, one step ahead. `close` it when done."""

    def __init__(self, setup: Setup, progress: Progress, epochs: int | None) -> None:
        self._setup = setup
        # memory that was touched before is much faster to decode into: it is kept for the next pass
        self._free = list(setup.spaces)
        # what is done on a GPU ahead of time is done beside what the student does there
        self._stream: Any = None
        if setup.device.type == "cuda":
            self._stream = torch.cuda.Stream(setup.device)  # type: ignore[no-untyped-call]
        lengths = Lengths(setup.tables, 2 * setup.most_shards)
        plans = shares(
            setup.stream,
            setup.tables,
            setup.batch,
            progress,
            rank=setup.rank,
            world_size=setup.world_size,
            epochs=epochs,
            lengths=lengths,
        )
        self._ahead: Prefetcher[Share, OpenShard[Any], _Made] = Prefetcher(
            (Needs(s, [key for key, _ in s.shards], set(s.still_open)) for s in plans),
            self._read,
            self._assemble,
            self._release,
            shards=setup.most_shards,
            steps=setup.ahead,
            threads=setup.threads,
        )
        self._fetched: deque[_Fetched | BaseException | None] = deque()

    def next(self) -> tuple[Step, Progress] | None:
        """The next step, and the progress once it is taken; None after the last."""
        setup = self._setup
        if not self._fetched:
            self._fetched.append(self._fetch())
        item = self._fetched[0]
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return None
        self._fetched.popleft()
        if setup.reduce is not None:
            # the sum for the next step is under way while this one is trained on
            self._fetched.append(self._fetch())
        count, positions, *numbers = item.total()
        batches = item.batches
        if item.copied is not None:
            current = torch.cuda.current_stream(setup.device)
            current.wait_event(item.copied)
            for tensor in (tensor for batch in batches for tensor in batch.tensors()):
                tensor.record_stream(current)
        if spare := max(numbers) - len(batches):
            batches = [*batches, *[self._filler()] * spare]
        share = item.share
        return Step(list(batches), count, positions, share.sequences, share.epoch, share.number), share.after

    def close(self) -> None:
        """End the threads, and drop what they made."""
        self._ahead.close()
        self._fetched.clear()

    def _fetch(self) -> "_Fetched | BaseException | None":
        """The next step of this rank, its sums begun; or the error that hindered it, to be raised in its turn."""
        try:
            made = self._ahead.next()
        except Exception as error:
            return error
        if made is None:
            return None
        setup = self._setup
        numbers = [0] * setup.world_size
        numbers[setup.rank] = len(made.batches)
        mine = [sum(b.count for b in made.batches), sum(b.positions for b in made.batches), *numbers]
        total = (lambda: mine) if setup.reduce is None else setup.reduce(mine)
        return _Fetched(made.share, made.batches, made.copied, total)

    def _filler(self) -> AnyBatch:
        setup = self._setup
        nothing = no_targets(setup.spec, setup.shape, setup.device)
        if setup.data is None:
            return filler(nothing, setup.device, setup.shape.layout)
        return example_filler(nothing, setup.device, setup.data.first())

    def _read(self, key: Any) -> OpenShard[Any]:
        """On a reading thread."""
        source, place = key
        table = self._setup.tables[source]
        index = int(table.shard[place])
        try:
            space = self._free.pop()
        except IndexError:
            space = Workspace()
            self._setup.spaces.append(space)
        return open_shard(table.cache, index, space)

    def _assemble(self, share: Share, shards: Mapping[Any, OpenShard[Any]]) -> "_Made":
        """On a thread of its own."""
        setup = self._setup
        if not share.shards:
            return _Made(share, [], None)
        with torch.cuda.stream(self._stream):
            some = [(shards[key], sequences) for key, sequences in share.shards]
            batches: Sequence[AnyBatch]
            if setup.data is None:
                batches = gather(some, setup.spec, setup.shape, setup.device)
            else:
                batches = gather_examples(some, setup.spec, setup.shape, setup.device, setup.data)
            if setup.device.type == "cpu":
                return _Made(share, batches, None)
            batches = [batch.to(setup.device, non_blocking=True) for batch in batches]
            if self._stream is None:
                return _Made(share, batches, None)
            copied = self._stream.record_event()
        return _Made(share, batches, copied)

    def _release(self, shard: OpenShard[Any]) -> None:
        self._free.append(shard.space)
