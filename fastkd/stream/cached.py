"""CachedSource, also named DistillLoader: optimizer steps from a cache, in an exact order, prefetched on threads.

loader = DistillLoader("cache", batch_tokens=2**19, device="cuda")
for step in loader:
    for batch in step.micro_batches:
        hidden = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
        linear_kd_loss(hidden, lm_head, batch.targets, batch.labels, num_items=step.count).loss.backward()
    optimizer.step()
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..data.examples import Examples
from ..errors import StreamError
from ..utils.deprecated import deprecated_decode, renamed
from ..utils.distributed import Reduce, summed_over  # noqa: F401  part of the public `fastkd.stream`
from .batch import LAYOUTS, Step
from .dataset_check import check_data
from .gather import BatchFormat
from .loader_pass import LoaderPass, LoaderSetup
from .mixture import SequenceStream
from .open_caches import check_alike, open_sources, shares_of
from .split import open_split
from .step_plan import LoaderProgress, StepPlan

VERSION = 1  # of the state, and of the order in which it is a position


class CachedSource:
    """An iterable of optimizer steps (`Step`) over one epoch of a cache; `steps()` goes through epochs without end.

    cache: a `Cache`, what `open_cache` takes, or a mixture, [(cache, weight), ...], whose weights are shares of the
        positions. An epoch of a mixture has as many sequences as its caches have together; a cache that is used up
        begins its next epoch, in another order.
    batch_size: sequences per optimizer step, on all ranks; or batch_tokens: positions, on average (see
        `micro_batches.step_end`); exactly one of the two. The last step of an epoch has what is left.
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
        ahead: int | None = None,
    ) -> None:
        if ahead is not None:
            prefetch = renamed("ahead", "prefetch", ahead, stacklevel=2)
        if decode is not None:
            deprecated_decode(decode, StreamError, stacklevel=2)
        _check_integers(1, shards_open=shards_open, world_size=world_size, threads=threads, prefetch=prefetch)
        _check_integers(0, seed=seed, skip=skip, rank=rank)
        _check_integers(1, optional=True, batch_size=batch_size, batch_tokens=batch_tokens, micro_tokens=micro_tokens)
        _check_integers(1, optional=True, micro_batch_size=micro_batch_size, max_positions=max_positions)
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
        part: dict[str, Any] = {"skip": skip, "max_positions": max_positions, "allow_partial": allow_partial}
        tables = [open_split(cache, split, **part) for cache in caches]
        self._shares = shares_of(tables, weights)
        sizes = [t.sequences for t in tables]
        stream = SequenceStream(sizes, self._shares, seed, shards_open=shards_open, shuffle=shuffle)
        if (per_step := min(batch_size or len(stream), len(stream))) < world_size:
            raise StreamError(
                f"world_size: got {world_size} ranks; expected at most {per_step}, the sequences per step. "
                "Use fewer ranks, or larger steps."
            )
        max_shards = sum(min(shards_open if shuffle else 1, len(size)) for size in sizes) + threads
        self._setup = LoaderSetup(
            tables=tables,
            plan=StepPlan(stream, tables, batch_size=batch_size, batch_tokens=batch_tokens, keep=2 * max_shards),
            form=BatchFormat(
                layout=layout,
                tokens=micro_tokens,
                rows=micro_batch_size,
                spec=caches[0].spec,
                width=max(c.spec.width for c in caches),
                draws=any(c.spec.draws > 0 for c in caches),
                device=torch.device("cpu" if device is None else device),
                data=data,
            ),
            rank=rank,
            world_size=world_size,
            reduce=reduce,
            threads=threads,
            prefetch=prefetch,
            max_shards=max_shards,
        )
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

    def __iter__(self) -> Iterator[Step]:
        """The steps from the current position to the end of the epoch; then the position is the start of the next."""
        return self.steps(epochs=1)

    def __len__(self) -> int:
        """Steps per epoch. By batch_tokens for a mixture: about, from the mean lengths of its sequences."""
        return self._setup.plan.steps_per_epoch(self._shares)

    def steps(self, epochs: int | None = None) -> Iterator[Step]:
        """The steps from the current position to the end of its epoch, and of epochs − 1 more (None: without end).

        Only one iterator is active: a new one ends the one before.
        """
        self.close()
        current = self._pass = LoaderPass(self._setup, self._progress, epochs)
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
            self._go_to(LoaderProgress(int(epoch)))

    def seek(self, epoch: int, step: int) -> None:
        """Go to the position before a step of an epoch, both counted from 0; the same steps follow as if the loader had
        been iterated there. Reads the sequence lengths of a few shards at most, and decodes nothing.

        step = the number of steps in the epoch is its end. Raises StreamError beyond that.
        """
        _check_integers(0, epoch=epoch, step=step)
        self.close()
        self._progress = self._setup.plan.seek(int(epoch), int(step))

    def state_dict(self) -> dict[str, Any]:
        """The position, after the step handed out last, in values that JSON can hold. The same on every rank."""
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
        """Go to the position of a state. Raises StreamError, naming the differences, if it is of a loader with other
        settings or another cache."""
        version = state.get("version")
        if version != VERSION:
            raise StreamError(f"state: got version {version!r}; expected {VERSION}. Use the fastkd that wrote it.")
        theirs = state.get("fingerprint")
        if not isinstance(theirs, Mapping):
            raise StreamError("state: got no fingerprint; expected what `state_dict` returned.")
        names = sorted(self.fingerprint.keys() | theirs.keys())
        if others := [n for n in names if self.fingerprint.get(n) != theirs.get(n)]:
            raise StreamError(
                "state: it is of a loader with other settings: "
                + "; ".join(f"{n}: {theirs.get(n)!r} there, {self.fingerprint.get(n)!r} here" for n in others)
                + ". Use the same settings, or start a new run."
            )
        values: dict[str, Any] = {name: state.get(name) for name in ("epoch", "sequences", "positions", "steps")}
        _check_integers(0, **{f"state: {name}": value for name, value in values.items()})
        progress = LoaderProgress(*map(int, values.values()))
        total = len(self._setup.plan.stream)
        if progress.sequences > total:
            raise StreamError(f"state: got {progress.sequences} sequences; expected at most {total}, an epoch.")
        self._go_to(progress)

    @property
    def memory(self) -> int:
        """Maximum bytes of decoded shards, if no step needs more of them by itself: the open ones, and one per thread.

        In memory there are also the encoded shard of every thread that reads, and `prefetch` + 2 steps.
        """
        largest = 0
        for table in self._setup.tables:
            spec = table.cache.spec
            entries = (8 + (4 if spec.draws else 0)) * spec.width
            row = entries + 4 * len(spec.temperatures) + 4 + 8 + 16  # and the input columns
            largest = max(largest, row * int(table.cache.manifest.column("positions").to_numpy().max()))
        return largest * self._setup.max_shards

    def _go_to(self, progress: LoaderProgress) -> None:
        self.close()
        self._progress = progress


DistillLoader = CachedSource
"""The name of `CachedSource` in code that has its own training loop."""


def _check_integers(least: int, *, optional: bool = False, **values: Any) -> None:
    for name, value in values.items():
        if optional and value is None:
            continue
        if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= int(value) < 2**63:
            raise StreamError(f"{name}: got {value!r}; expected an integer of at least {least}.")
