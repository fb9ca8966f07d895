"""CachedSource, also named DistillLoader: optimizer steps from a cache, in an exact order, prefetched on threads.

loader = DistillLoader("cache", batch_tokens=2**19, device="cuda")
for step in loader:
    for batch in step.micro_batches:
        hidden = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
        linear_kd_loss(hidden, head, batch.targets, batch.labels, num_items=step.count).loss.backward()
    optimizer.step()
"""

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch

from ..data.examples import Examples
from ..errors import StreamError
from ..utils.deprecated import deprecated_decode
from ..utils.distributed import Reduce, summed_over  # noqa: F401  part of the public `fastkd.stream`
from .batch import LAYOUTS, Step
from .compact import Shape
from .dataset_check import check_data
from .loader_pass import Run, Setup
from .mixture import Stream
from .open_caches import check_alike, open_sources, shares_of
from .split import describe, open_split
from .step_plan import Batch, Lengths, Progress, seek

VERSION = 1  # of the state, and of the order that it is a place in


class CachedSource:
    """An iterable of optimizer steps (`Step`) over one epoch of a cache; `steps()` goes on through epochs.

    cache: a `Cache`, what `open_cache` takes, or a mixture, [(cache, weight), ...]: weights are shares of the
        positions. An epoch of a mixture has as many sequences as its caches have together; a cache that has had all of
        its own begins anew, in another order.
    batch_size: sequences an optimizer step, on all ranks; or batch_tokens: positions, on the average (see
        `steps.step_end`); one of the two. The last step of an epoch is what is left.
    micro_tokens: positions a micro-batch, pads included, at most (a longer row is alone); micro_batch_size: rows. None:
        no limit. layout: "padded", a row for each document piece, or "packed"; see `MicroBatch`.
    seed, shuffle, shards_open: the order; see `order.py`. Shards open bound the memory: see `memory`.
    rank, world_size: this process's share of every step. reduce: sums lists of integers over all ranks (a `Reduce`;
        `summed_over` makes one of a process group), needed where there are several. It is called by who iterates, once
        a step, in the same order on all ranks, one step ahead of the step that it is for.
    split: "train" or "held_out", as fixed at capture. skip, max_positions: of one cache, leave out so many sequences at
        the start, and take the first whole sequences of the rest up to so many positions.
    device: where micro-batches are. decode: deprecated; targets are always decoded on the host.
    threads: that read and decode. ahead: steps that are made ahead of time.
    allow_partial: read a cache of which shards are missing.
    data: of a cache of examples, the labelled `Examples` that it was captured from (of a mixture, each of its caches).
        Micro-batches are then `ExampleBatch`es: the inputs are augmented by the stored seeds, so that the student sees
        what the teacher saw. A sequence is an example, its copies are its positions; layout is of no account.

    State: how far all ranks together are (`state_dict`). Any number of ranks, of threads and other micro-batches go
    on from it with the same steps.

    Raises StreamError where an argument or a cache is not one that can be read so; while iterating, CacheError and
    whatever else a thread met.
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
        ahead: int = 2,
        allow_partial: bool = False,
        data: Examples | None = None,
    ) -> None:
        whole = {"shards_open": shards_open, "world_size": world_size, "threads": threads, "ahead": ahead}
        limits = {"batch_size": batch_size, "batch_tokens": batch_tokens, "micro_tokens": micro_tokens}
        limits |= {"micro_batch_size": micro_batch_size, "max_positions": max_positions}
        for name, value in {**whole, **{n: v for n, v in limits.items() if v is not None}}.items():
            _check_integer(name, value, 1)
        for name, value in {"seed": seed, "skip": skip, "rank": rank}.items():
            _check_integer(name, value, 0)
        if layout not in LAYOUTS:
            raise StreamError(f"layout: got {layout!r}; expected one of {', '.join(LAYOUTS)}.")
        if decode is not None:
            deprecated_decode(decode, StreamError, stacklevel=3)
        if (batch_size is None) == (batch_tokens is None):
            raise StreamError(
                f"batch_size, batch_tokens: got {batch_size} and {batch_tokens}; expected one of the two."
            )
        if rank >= world_size:
            raise StreamError(f"rank: got {rank} of {world_size}; ranks are numbered from 0.")
        if world_size > 1 and reduce is None:
            raise StreamError(
                f"reduce: found None for {world_size} ranks; no rank reads all of a step, so their counts have to be "
                "summed. Pass fastkd.stream.summed_over(group)."
            )
        caches, weights = open_sources(cache)
        if len(caches) > 1 and (skip or max_positions is not None):
            raise StreamError("skip, max_positions: found with a mixture; they are of one cache. Leave them out.")
        check_data(caches, data)
        check_alike(caches)
        tables = [
            open_split(c, split, skip=skip, max_positions=max_positions, allow_partial=allow_partial) for c in caches
        ]
        shares = shares_of(tables, weights)
        sizes = [t.sequences for t in tables]
        stream = Stream(sizes, shares, seed, shards_open=shards_open, shuffle=shuffle)
        least = min(batch_size or len(stream), len(stream))
        if least < world_size:
            raise StreamError(
                f"world_size: got {world_size} ranks for {len(stream)} sequences in the split, {least} a step at "
                "most. Use fewer ranks, or larger steps."
            )
        specs = [c.spec for c in caches]
        width, draws = max(s.width for s in specs), any(s.draws for s in specs)
        self._setup = Setup(
            tables=tables,
            stream=stream,
            batch=Batch(batch_size, batch_tokens),
            spec=specs[0],
            shape=Shape(layout, micro_tokens, micro_batch_size, width, draws),
            device=torch.device("cpu" if device is None else device),
            rank=rank,
            world_size=world_size,
            reduce=reduce,
            threads=threads,
            ahead=ahead,
            most_shards=sum(min(shards_open if shuffle else 1, len(size)) for size in sizes) + threads,
            spaces=[],
            data=data,
        )
        self._progress = Progress()
        self._run: Run | None = None
        # all that decides which sequences a step is made of, under the names that a person knows
        self.fingerprint: dict[str, Any] = {
            "caches": [describe(t) for t in tables],
            "weights": [str(share) for share in shares],
            "batch_size": batch_size,
            "batch_tokens": batch_tokens,
            "seed": seed,
            "shuffle": shuffle,
            "shards_open": shards_open,
            "split": split,
            "skip": skip,
            "max_positions": max_positions,
        }
        if data is not None:  # the caches' specs say which examples, but not which labels
            self.fingerprint["labels"] = data.labels_fingerprint()

    def __iter__(self) -> Iterator[Step]:
        """The steps from where the loader is to the end of the epoch; it is then at the start of the next."""
        return self.steps(epochs=1)

    def __len__(self) -> int:
        """Steps an epoch. Of a mixture that is cut by batch_tokens: about, by the mean lengths of its sequences."""
        if self._setup.batch.sequences is not None:
            return -(-len(self._setup.stream) // self._setup.batch.sequences)
        assert self._setup.batch.positions is not None
        return math.ceil(self._positions() / self._setup.batch.positions)

    def steps(self, epochs: int | None = None) -> Iterator[Step]:
        """The steps from where the loader is through so many epochs (None: without end), with no pause between them.

        A loader is iterated by one at a time: this ends what was begun before.
        """
        self.close()
        run = self._run = Run(self._setup, self._progress, epochs)
        try:
            while (item := run.next()) is not None:
                step, self._progress = [item[0]], item[1]
                del item
                yield step.pop()  # whoever asked holds it alone, so that its memory is free when it is dropped
            if self._run is run:  # it came to its end, and was not ended by another
                self._progress = Progress(self._progress.epoch + 1)
        finally:
            run.close()

    def close(self) -> None:
        """End the threads of whoever iterates. Leaving the loop does it too."""
        if self._run is not None:
            self._run.close()
            self._run = None

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; stay where the loader is if it is in that epoch already."""
        _check_integer("epoch", epoch, 0)
        if epoch != self._progress.epoch:
            self.close()
            self._progress = Progress(int(epoch))

    def seek(self, epoch: int, step: int) -> None:
        """Go to the position before a step of an epoch, both counted from 0; the steps that follow are the same as if
        the loader had been iterated there. Reads the sequence lengths of a few shards at most, and decodes nothing.

        step = the number of steps in the epoch is its end. Raises StreamError beyond that.
        """
        _check_integer("epoch", epoch, 0)
        _check_integer("step", step, 0)
        self.close()
        setup = self._setup
        lengths = Lengths(setup.tables, 2 * setup.most_shards)
        self._progress = seek(setup.stream, setup.tables, setup.batch, int(epoch), int(step), lengths)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: after the step that was handed out last. The same on every rank; JSON can hold it."""
        at = self._progress
        return {
            "version": VERSION,
            "epoch": at.epoch,
            "sequences": at.sequences,
            "positions": at.positions,
            "steps": at.number,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where a loader was. Raises StreamError, naming them, where its settings or its cache are others."""
        version = state.get("version")
        if version != VERSION:
            raise StreamError(
                f"state: found version {version!r}, this fastkd reads {VERSION}; use the fastkd that wrote it."
            )
        theirs = state.get("fingerprint")
        if not isinstance(theirs, Mapping):
            raise StreamError("state: got no fingerprint; expected what `state_dict` returned.")
        names = sorted(self.fingerprint.keys() | theirs.keys())
        if others := [n for n in names if self.fingerprint.get(n) != theirs.get(n)]:
            raise StreamError(
                "state: it is of a loader with other settings: "
                + "; ".join(f"{n}: {theirs.get(n)!r} there, {self.fingerprint.get(n)!r} here" for n in others)
                + ". Use those, or start anew."
            )
        names = ["epoch", "sequences", "positions", "steps"]
        values = [state.get(name) for name in names]
        for name, value in zip(names, values, strict=True):
            _check_integer(f"state: {name}", value, 0)
        epoch, sequences, positions, number = (int(value) for value in values if value is not None)
        if sequences > len(self._setup.stream):
            raise StreamError(f"state: got {sequences} sequences of an epoch of {len(self._setup.stream)}.")
        self.close()
        self._progress = Progress(epoch, sequences, positions, number)

    @property
    def memory(self) -> int:
        """Bytes that decoded shards take at most, where no step alone needs more of them: those that are open, and one
        a thread. Beside them a thread that reads has one shard's streams, and `ahead` + 2 steps are in memory."""
        largest = 0
        for table in self._setup.tables:
            spec = table.cache.spec
            entries = (8 + (4 if spec.draws else 0)) * spec.width
            row = entries + 4 * len(spec.temperatures) + 4 + 8 + 16  # and tokens, labels, places; or examples, seeds
            largest = max(largest, row * int(table.cache.manifest.column("positions").to_numpy().max()))
        return largest * self._setup.most_shards

    def _positions(self) -> Fraction:
        """Positions an epoch: of one cache, exactly."""
        means = [Fraction(int(t.positions.sum()), int(t.sequences.sum())) for t in self._setup.tables]
        parts = zip(means, self.fingerprint["weights"], strict=True)
        return sum((mean * Fraction(share) for mean, share in parts), Fraction(0)) * len(self._setup.stream)


DistillLoader = CachedSource
"""The name of `CachedSource` in code that builds its own training loop."""


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= int(value) < 2**63:
        raise StreamError(f"{name}: got {value!r}; expected an integer from {least} on.")
