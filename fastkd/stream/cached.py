"""CachedSource, also named DistillLoader: optimizer steps from a cache, in an exact order, prefetched on threads."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..cache.spec import CacheSpec
from ..cache.workspace import Workspace
from ..data.examples import Examples, as_examples
from ..errors import StreamError
from ..utils.distributed import Reduce, in_group, summed_over  # noqa: F401  part of the public `fastkd.stream`
from .gather import BatchFormat, OpenShard, open_shard
from .shard_source import LoaderPass, ShardSource, SourceOptions  # noqa: F401  LoaderPass was here
from .signals import open_signals
from .split import ShardTable, check_alike, check_data, open_sources, open_split, shares_of


class CachedSource(ShardSource):
    """An iterable of optimizer steps (`Step`) over one epoch of a cache; `steps()` goes through epochs without end.

    cache: a `Cache`, what `open_cache` takes, or a mixture, [(cache, weight), ...], whose weights are shares of the
        positions, or [cache, ...] for each sequence once an epoch. An epoch of a mixture has as many sequences as its
        caches have together; a cache that is used up begins its next epoch, in another order.
    batch_size: sequences per optimizer step, on all ranks; or batch_tokens: positions, on average (see
        `step_plan.step_end`); exactly one of the two. The last step of an epoch has what is left.
    micro_tokens: maximum positions per micro-batch, pads included (a longer row is alone). micro_batch_size: maximum
        rows. None: no limit. layout: "padded", a row for each segment, or "packed"; see `MicroBatch`.
    micro_batches: the exact number of micro-batches in every step of every rank, about equal in positions, instead of
        micro_tokens; those at the end are empty if there are too few sequences.
    buckets: lengths that micro-batches of text are padded to, for `torch.compile`: (128, 256, 512), and multiples of
        the last one beyond it; or True for `fastkd.stream.buckets.BUCKETS`. Losses are the same. None: no padding.
    seed, shuffle, shards_open: the order; see `epoch_order.py`. The number of open shards bounds `memory`.
    rank, world_size: this process's share of every step; both None: as torch.distributed says, if it is initialized
        (all processes then make the source at the same point). reduce: sums lists of integers over all ranks (a
        `Reduce`; `summed_over` makes one from a process group); required for several ranks that are given. It is called
        by the thread that iterates, once per step, in the same order on all ranks, one step ahead.
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
        micro_batches: int | None = None,
        layout: str = "padded",
        seed: int = 0,
        shuffle: bool = True,
        shards_open: int = 8,
        rank: int | None = 0,
        world_size: int | None = 1,
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
        buckets: Any = None,
        ahead: int | None = None,
    ) -> None:
        if ahead is not None:
            prefetch = ahead
            warnings.warn("ahead: this argument is now named prefetch.", DeprecationWarning, stacklevel=2)
        if decode not in (None, "host"):
            raise StreamError(f"decode: got {decode!r}; expected no value. Targets are always decoded on the host now.")
        if decode is not None:
            warnings.warn("decode: targets are always decoded on the host now.", DeprecationWarning, stacklevel=2)
        if rank is None or world_size is None:
            if (rank, world_size) != (None, None):
                raise StreamError(f"rank, world_size: got {rank} and {world_size}; expected both, or None for both.")
            rank, world_size, reduce = in_group(reduce)
        options = SourceOptions(
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            micro_tokens=micro_tokens,
            micro_batch_size=micro_batch_size,
            micro_batches=micro_batches,
            layout=layout,
            seed=seed,
            shuffle=shuffle,
            shards_open=shards_open,
            rank=rank,
            world_size=world_size,
            reduce=reduce,
            split=split,
            skip=skip,
            max_positions=max_positions,
            device=device,
            threads=threads,
            prefetch=prefetch,
            buckets=buckets,
        )
        caches, weights = open_sources(cache)
        if len(caches) > 1 and (skip or max_positions is not None):
            raise StreamError("skip, max_positions: got a mixture; expected one cache. Leave them out.")
        data = as_examples(data)
        check_data(caches, data)
        check_alike(caches)
        tables = [
            open_split(cache, split, skip=skip, max_positions=max_positions, allow_partial=allow_partial)
            for cache in caches
        ]
        signals = open_signals([f"features/{name}" for name in features], tables, options.where)
        shares = shares_of(tables, weights)
        form = BatchFormat(
            layout=layout,
            tokens=micro_tokens,
            rows=micro_batch_size,
            micro_batches=micro_batches,
            spec=caches[0].spec,
            width=max(c.spec.width for c in caches),
            draws=any(c.spec.draws > 0 for c in caches),
            device=options.where,
            data=data,
            signals=signals,
            buckets=options.buckets,
        )
        described = {"caches": [t.describe() for t in tables], "weights": [str(share) for share in shares]}
        super().__init__(tables, shares, form, options, described)
        if data is not None:  # the specs identify the examples, not their labels
            self.fingerprint["labels"] = data.labels_fingerprint()
        if signals:
            self.fingerprint["signals"] = {signal.name: signal.describe() for signal in signals}

    def _open(self, source: int, row: int, workspaces: list[Workspace]) -> OpenShard:
        table = self._tables[source]
        return open_shard(table.cache, int(table.shard[row]), workspaces, self._form.signals, source)

    def _shard_bytes(self, table: ShardTable) -> int:
        return row_bytes(table.origin.spec) * int(table.cache.manifest.column("positions").to_numpy().max())


def row_bytes(spec: CacheSpec) -> int:
    """Bytes of a row of a decoded shard with the input columns, at most."""
    return (8 + (4 if spec.draws else 0)) * spec.width + 4 * len(spec.temperatures) + 4 + 8 + 16


DistillLoader = CachedSource
"""The name of `CachedSource` in code that has its own training loop."""
