"""CachedSource, also named DistillLoader: optimizer steps from a cache, in an exact order, prefetched on threads."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..cache.workspace import Workspace
from ..data.examples import Examples
from ..errors import StreamError
from ..utils.distributed import Reduce, summed_over  # noqa: F401  part of the public `fastkd.stream`
from .batch import LAYOUTS, AnyBatch, Step
from .gather import BatchFormat, OpenShard, gather, gather_examples, open_shard
from .mixture import SequenceStream
from .prefetch import Prefetcher
from .signals import open_signals
from .split import ShardTable, check_alike, check_data, open_sources, open_split, shares_of
from .step_plan import LoaderProgress, RankShare, ShardKey, StepPlan

VERSION = 1  # of the state, and of the order in which it is a position


class _RankStep(NamedTuple):
    """A rank's share of a step, assembled. copied: an event after the copy to the GPU."""

    share: RankShare
    batches: Sequence[AnyBatch]
    copied: torch.cuda.Event | None


# waits for the sums over ranks: positions, targets and vectors of each signal, and the micro-batches of each rank
Total = Callable[[], list[int]]


class LoaderPass:
    """One iteration over a loader: prefetches, and sums counts over the ranks one step ahead. `close` it when done."""

    def __init__(self, source: "CachedSource", progress: LoaderProgress, epochs: int | None) -> None:
        self._source = source
        self._free = list(source._workspaces)
        # a stream of its own, so that copies overlap with the student's work on the GPU
        self._stream: Any = None
        if source._form.device.type == "cuda":
            self._stream = torch.cuda.Stream(source._form.device)  # type: ignore[no-untyped-call]
        shares = source._plan.shares(progress, rank=source._rank, world_size=source._world_size, epochs=epochs)
        self._prefetcher = Prefetcher(
            shares, self._read, self._assemble, self._release, shards=source._max_shards, steps=source._prefetch,
            threads=source._threads,
        )  # fmt: skip
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
        if self._source._reduce is not None:
            # the sums of the next step are computed while this one is trained on
            self._fetched.append(self._fetch())
        (share, batches, copied), total = item
        names = self._source.counted
        found = total()
        positions, counts, numbers = found[0], found[1 : 1 + len(names)], found[1 + len(names) :]
        if copied is not None:
            current = torch.cuda.current_stream(self._source._form.device)
            current.wait_event(copied)
            for tensor in (tensor for batch in batches for tensor in batch.tensors()):
                tensor.record_stream(current)
        if missing := max(numbers) - len(batches):
            batches = [*batches, *[self._source._form.empty()] * missing]
        by_name = dict(zip(names, counts, strict=True))
        batches = [replace(batch, counts=by_name) for batch in batches]
        after = share.after
        return Step(batches, counts[0], positions, share.sequences, after.epoch, after.number - 1), after

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
        numbers = [0] * self._source._world_size
        numbers[self._source._rank] = len(step.batches)
        own = [batch.own_counts() for batch in step.batches]
        counts = [sum(one[name] for one in own) for name in self._source.counted]
        mine = [sum(b.positions for b in step.batches), *counts, *numbers]
        return step, ((lambda: mine) if self._source._reduce is None else self._source._reduce(mine))

    def _read(self, key: ShardKey) -> OpenShard:
        source, row = key
        table = self._source._tables[source]
        signals = self._source._form.signals
        try:
            workspaces = self._free.pop()
        except IndexError:
            workspaces = [Workspace() for _ in range(1 + len(signals))]
            self._source._workspaces.append(workspaces)
        return open_shard(table.cache, int(table.shard[row]), workspaces, signals, source)

    def _assemble(self, share: RankShare, shards: Mapping[Any, OpenShard]) -> _RankStep:
        if not share.shards:
            return _RankStep(share, [], None)
        form = self._source._form
        with torch.cuda.stream(self._stream):
            sequences = [(shards[key], numbers) for key, numbers in share.shards.items()]
            batches: Sequence[AnyBatch] = (gather if form.data is None else gather_examples)(sequences, form)
            if form.device.type != "cpu":
                batches = [batch.to(form.device, non_blocking=True) for batch in batches]
            return _RankStep(share, batches, None if self._stream is None else self._stream.record_event())

    def _release(self, shard: OpenShard) -> None:
        self._free.append(shard.workspaces)


class CachedSource:
    """An iterable of optimizer steps (`Step`) over one epoch of a cache; `steps()` goes through epochs without end.

    cache: a `Cache`, what `open_cache` takes, or a mixture, [(cache, weight), ...], whose weights are shares of the
        positions. An epoch of a mixture has as many sequences as its caches have together; a cache that is used up
        begins its next epoch, in another order.
    batch_size: sequences per optimizer step, on all ranks; or batch_tokens: positions, on average (see
        `step_plan.step_end`); exactly one of the two. The last step of an epoch has what is left.
    micro_tokens: maximum positions per micro-batch, pads included (a longer row is alone). micro_batch_size: maximum
        rows. None: no limit. layout: "padded", a row for each segment, or "packed"; see `MicroBatch`.
    seed, shuffle, shards_open: the order; see `epoch_order.py`. The number of open shards bounds `memory`.
    rank, world_size: this process's share of every step. reduce: sums lists of integers over all ranks (a `Reduce`;
        `summed_over` makes one from a process group); required for several ranks. It is called by the thread that
        iterates, once per step, in the same order on all ranks, one step ahead.
    split: "train" or "held_out", as fixed at capture. skip, max_positions: for one cache, leave out the first
        sequences, and then take the first whole sequences with at most this many positions.
    device: of the micro-batches. threads: for reading and decoding. prefetch: steps assembled ahead of time.
    allow_partial: accept a cache with missing shards.
    data: for a cache of examples, the labelled `Examples` that it (every cache of a mixture) was captured from.
        Micro-batches are then `ExampleBatch`es, with inputs augmented by the stored seeds: the student sees what the
        teacher saw. A sequence is an example, its copies are its positions, and layout has no effect.
    features: names of inner states of the teacher that the cache has (every cache of a mixture, of equal settings); the
        micro-batches then have them as `features`.
    decode: deprecated; targets are always decoded on the host. ahead: deprecated name of prefetch.

    The state (`state_dict`) is the position of all ranks together. Another number of ranks or threads, or other
    micro-batches, resume from it with the same steps.

    Raises StreamError for an invalid argument, or a cache that cannot be read this way; while iterating, CacheError and
    any other error of a thread.
    """

    def __init__(
        self,
        cache: Any,
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        micro_tokens: int | None = 8192,
        micro_batch_size: int | None = None,
        layout: str = "padded",
        seed: int = 0,
        shuffle: bool = True,
        shards_open: int = 8,
        rank: int = 0,
        world_size: int = 1,
        reduce: Reduce | None = None,
        split: str = "train",
        skip: int = 0,
        max_positions: int | None = None,
        device: torch.device | str | None = None,
        decode: str | None = None,
        threads: int = 2,
        prefetch: int = 2,
        allow_partial: bool = False,
        data: Examples | None = None,
        features: Sequence[str] = (),
        ahead: int | None = None,
    ) -> None:
        if ahead is not None:
            prefetch = ahead
            warnings.warn("ahead: this argument is now named prefetch.", DeprecationWarning, stacklevel=2)
        if decode not in (None, "host"):
            raise StreamError(f"decode: got {decode!r}; expected no value. Targets are always decoded on the host now.")
        if decode is not None:
            warnings.warn("decode: targets are always decoded on the host now.", DeprecationWarning, stacklevel=2)
        _check_integers(1, shards_open=shards_open, world_size=world_size, threads=threads, prefetch=prefetch)
        _check_integers(0, seed=seed, skip=skip, rank=rank)
        limits = {"micro_tokens": micro_tokens, "micro_batch_size": micro_batch_size, "max_positions": max_positions}
        limits |= {"batch_size": batch_size, "batch_tokens": batch_tokens}
        _check_integers(1, **{name: limit for name, limit in limits.items() if limit is not None})
        if layout not in LAYOUTS:
            raise StreamError(f"layout: got {layout!r}; expected one of {', '.join(LAYOUTS)}.")
        if (batch_size is None) == (batch_tokens is None):
            raise StreamError(
                f"batch_size, batch_tokens: got {batch_size} and {batch_tokens}; expected exactly one of the two."
            )
        if rank >= world_size:
            raise StreamError(f"rank: got {rank}; expected 0 to {world_size - 1}, with {world_size} ranks.")
        if world_size > 1 and reduce is None:
            raise StreamError(
                f"reduce: got None; expected a function for {world_size} ranks, whose counts have to be summed. Pass "
                "fastkd.stream.summed_over(group)."
            )
        caches, weights = open_sources(cache)
        if len(caches) > 1 and (skip or max_positions is not None):
            raise StreamError("skip, max_positions: got a mixture; expected one cache. Leave them out.")
        check_data(caches, data)
        check_alike(caches)
        tables = [
            open_split(cache, split, skip=skip, max_positions=max_positions, allow_partial=allow_partial)
            for cache in caches
        ]
        device = torch.device("cpu" if device is None else device)
        signals = open_signals([f"features/{name}" for name in features], tables, device)
        self._shares = shares_of(tables, weights)
        sizes = [t.sequences for t in tables]
        stream = SequenceStream(sizes, self._shares, seed, shards_open=shards_open, shuffle=shuffle)
        if (per_step := min(batch_size or len(stream), len(stream))) < world_size:
            raise StreamError(
                f"world_size: got {world_size} ranks; expected at most {per_step}, the sequences per step. "
                "Use fewer ranks, or larger steps."
            )
        max_shards = sum(min(shards_open if shuffle else 1, len(size)) for size in sizes) + threads
        self._form = BatchFormat(
            layout=layout,
            tokens=micro_tokens,
            rows=micro_batch_size,
            spec=caches[0].spec,
            width=max(c.spec.width for c in caches),
            draws=any(c.spec.draws > 0 for c in caches),
            device=device,
            data=data,
            signals=signals,
        )
        self.counted = ("targets", *(signal.name for signal in signals))
        self._tables = tables
        self._plan = StepPlan(stream, tables, batch_size=batch_size, batch_tokens=batch_tokens, keep=2 * max_shards)
        self._rank, self._world_size, self._reduce = rank, world_size, reduce
        self._threads, self._prefetch, self._max_shards = threads, prefetch, max_shards
        # the memory that shards are decoded into, kept: memory that was touched before is much faster
        self._workspaces: list[list[Workspace]] = []
        self._progress = LoaderProgress()
        self._pass: LoaderPass | None = None
        # all that decides which sequences a step has, under the names of the arguments
        self.fingerprint: dict[str, Any] = {
            "caches": [table.describe() for table in tables],
            "weights": [str(share) for share in self._shares],
            "batch_size": batch_size,
            "batch_tokens": batch_tokens,
            "seed": seed,
            "shuffle": shuffle,
            "shards_open": shards_open,
            "split": split,
            "skip": skip,
            "max_positions": max_positions,
        }
        if data is not None:  # the specs identify the examples, not their labels
            self.fingerprint["labels"] = data.labels_fingerprint()
        if signals:
            self.fingerprint["signals"] = {signal.name: signal.describe() for signal in signals}

    def __iter__(self) -> Iterator[Step]:
        """The steps from the current position to the end of the epoch; then the position is the start of the next."""
        return self.steps(epochs=1)

    def __len__(self) -> int:
        """Steps per epoch. By batch_tokens for a mixture: about, from the mean lengths of its sequences."""
        return self._plan.steps_per_epoch(self._shares)

    def steps(self, epochs: int | None = None) -> Iterator[Step]:
        """The steps from the current position to the end of its epoch, and of epochs − 1 more (None: without end).

        Only one iterator is active: a new one ends the one before.
        """
        self.close()
        current = self._pass = LoaderPass(self, self._progress, epochs)
        try:
            while (item := current.next()) is not None:
                step, self._progress = [item[0]], item[1]
                del item
                yield step.pop()  # the caller holds the only reference, so dropping it frees the memory
            if self._pass is current:  # at its end, and not ended by another iterator
                self._progress = LoaderProgress(self._progress.epoch + 1)
        finally:
            current.close()

    def close(self) -> None:
        """End the active iterator and its threads. Leaving the loop does it too."""
        if self._pass is not None:
            self._pass.close()
            self._pass = None

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; stay at the current position if it is in that epoch already."""
        _check_integers(0, epoch=epoch)
        if epoch != self._progress.epoch:
            self.close()
            self._progress = LoaderProgress(int(epoch))

    def seek(self, epoch: int, step: int) -> None:
        """Go to the position before a step of an epoch, both counted from 0; the same steps follow as if the loader had
        been iterated there. Reads the sequence lengths of a few shards at most, and decodes nothing.

        step = the number of steps in the epoch is its end. Raises StreamError beyond that.
        """
        _check_integers(0, epoch=epoch, step=step)
        self.close()
        self._progress = self._plan.seek(int(epoch), int(step))

    def state_dict(self) -> dict[str, Any]:
        """The position, after the step handed out last, in values that JSON can hold. The same on every rank."""
        at = self._progress
        values = {"epoch": at.epoch, "sequences": at.sequences, "positions": at.positions, "steps": at.number}
        return {"version": VERSION, **values, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a state. Raises StreamError, naming the differences, if it is of a loader with other
        settings or another cache."""
        version = state.get("version")
        if version != VERSION:
            raise StreamError(f"state: got version {version!r}; expected {VERSION}. Use the fastkd that wrote it.")
        theirs = state.get("fingerprint")
        if not isinstance(theirs, Mapping):
            raise StreamError("state: got no fingerprint; expected what `state_dict` returned.")
        ours = self.fingerprint
        if others := [n for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n)]:
            listed = "; ".join(f"{n}: {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in others)
            raise StreamError(
                f"state: it is of a loader with other settings: {listed}. Use the same settings, or start a new run."
            )
        values: dict[str, Any] = {name: state.get(name) for name in ("epoch", "sequences", "positions", "steps")}
        _check_integers(0, **{f"state: {name}": value for name, value in values.items()})
        progress = LoaderProgress(*map(int, values.values()))
        total = len(self._plan.stream)
        if progress.sequences > total:
            raise StreamError(f"state: got {progress.sequences} sequences; expected at most {total}, an epoch.")
        self.close()
        self._progress = progress

    @property
    def memory(self) -> int:
        """Maximum bytes of decoded shards, if no step needs more of them by itself: the open ones, and one per thread.

        In memory there are also the encoded shard of every thread that reads, and `prefetch` + 2 steps.
        """

        def largest(table: ShardTable) -> int:
            spec = table.cache.spec
            entries = (8 + (4 if spec.draws else 0)) * spec.width
            row = entries + 4 * len(spec.temperatures) + 4 + 8 + 16  # and the input columns
            row += sum(signal.row_bytes() for signal in self._form.signals)
            return row * int(table.cache.manifest.column("positions").to_numpy().max())

        return max(map(largest, self._tables)) * self._max_shards


DistillLoader = CachedSource
"""The name of `CachedSource` in code that has its own training loop."""


def _check_integers(least: int, **values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= int(value) < 2**63:
            raise StreamError(f"{name}: got {value!r}; expected an integer of at least {least}.")
