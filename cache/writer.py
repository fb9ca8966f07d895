"""Writing a cache: several shards at a time, each committed whole or not at all."""

import os
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import StrEnum
from threading import BoundedSemaphore
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .checks import check_inputs, check_lengths, check_record, check_sorted, check_targets
from .encoding.ragged import BLOCK
from .encoding.targets import Targets, encode_targets
from .errors import CacheError, NotFound, ReadOnly, StoreError
from .manifest import (
    KEY,
    SPEC_KEY,
    corrupt,
    listed,
    read_manifest,
    read_spec,
    read_twice,
    refuse_overlaps,
    scan,
    shard_key,
    to_parquet,
)
from .shard.container import TAIL_LENGTH, Damage, content_hash, pack
from .shard.layout import check_attributes, shard_attributes
from .spec import FORMAT, CacheSpec, differences, integer
from .stores import Store, open_store

Array = NDArray[Any]


class Commit(StrEnum):
    """The result of writing a shard."""

    COMMITTED = "committed"
    ALREADY_THERE = "already there"


@dataclass(frozen=True)
class ShardLayout:
    """The keyword arguments of `write_shard` beside inputs and targets.

    sequence_lengths: of consecutive sequences that make up the shard (default: one). document_lengths: of the documents
    in them, likewise. first_sequence: the number of the first sequence in the whole cache (default: 0).
    record: how the shard was made, for people and tools: JSON of up to 16 KiB, kept in its attributes, not covered by
    the hash of its contents.
    """

    sequence_lengths: Sequence[int] | Array | None = None
    document_lengths: Sequence[int] | Array | None = None
    first_sequence: int = 0
    record: Mapping[str, Any] | None = None


def create_cache(path_or_store: Any, spec: CacheSpec, *, threads: int = 1, queue: int = 2) -> "CacheWriter":
    """A writer for a cache of these settings: a new one, or an existing one of the same settings.

    path_or_store: a folder, a URL (s3://, gs://, az://, memory://), an obstore store, or a `Store`.
    threads: how many shards are encoded at a time. queue: how many more can be submitted before `submit_shard` waits.

    Raises CacheError for an existing cache of other settings (of another teacher, for example), naming what differs.
    """
    if not isinstance(spec, CacheSpec):
        raise CacheError(f"spec: got {type(spec).__name__}; expected a CacheSpec.")
    threads, queue = integer("threads", threads, 1), integer("queue", queue, 0)
    store = open_store(path_or_store, create=True)
    if not store.create(SPEC_KEY, spec.to_json()):
        existing = read_spec(store)
        if existing.hash != spec.hash:
            raise CacheError(
                f"{store.describe()}: a cache of other settings exists ({'; '.join(differences(existing, spec))}). "
                "Write to another place, or with the settings it has."
            )
        spec = existing
    store.sweep()
    return CacheWriter(store, spec, threads=threads, queue=queue)


def open_writer(path_or_store: Any, *, threads: int = 1, queue: int = 2) -> "CacheWriter":
    """A writer for an existing cache, with its settings. Arguments as in `create_cache`.

    Raises CacheError if there is no cache, and ReadOnly if the store cannot be written.
    """
    store = open_store(path_or_store)
    spec = read_spec(store)
    if store.readonly:
        raise ReadOnly(f"{store.describe()}: this cache can only be read here. Write to it where it was created.")
    return create_cache(store, spec, threads=threads, queue=queue)


class Submission(Future[Commit]):
    """The future of a shard. seen: whether its result, or its error, was read."""

    seen = False

    def result(self, timeout: float | None = None) -> Commit:
        self.seen = True
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.seen = True
        return super().exception(timeout)


class CacheWriter:
    """Writes shards. Use as a context manager, or call `close`. Its methods may be called from several threads.

    A forked process must create another writer.

    sizes: bytes of each shard that this writer has committed, by its number.
    """

    def __init__(self, store: Store, spec: CacheSpec, *, threads: int, queue: int) -> None:
        self.store = store
        self.spec = spec
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastkd-cache")
        self._room = BoundedSemaphore(threads + queue)
        self._pending: set[Future[Commit]] = set()
        self.sizes: dict[int, int] = {}
        self._failed: dict[int, Submission] = {}  # by shard, until the shard is written
        self._closed = False
        self._process = os.getpid()

    def write_shard(
        self,
        index: int,
        inputs: Mapping[str, Array],
        ids: Array,
        logprobs: Array,
        tail: Array,
        draws: Array | None = None,
        outcomes: Array | int | None = None,
        **layout: Any,
    ) -> Commit:
        """Check, encode and commit a shard of n positions; returns when it is durable.

        index: the shard's number. inputs: the columns that the spec names, `[n]` each.
        ids, logprobs, tail, draws, outcomes: `[n, K]`, `[n, K]`, `[n, M]`, `[n, K]`, `[n]` or one for all, as in
            SparseTargets (NumPy arrays); a position that does not count has no entries (log-probability −inf and id 0
            throughout). outcomes defaults to all of the vocabulary outside the top-k entries.
        layout: sequence_lengths, document_lengths, first_sequence and record; see `ShardLayout`.

        Log-probabilities and tails are rounded to the steps of the spec's codec; entries that round to the same step
        may be reordered.

        Returns COMMITTED, or ALREADY_THERE for a shard that was committed before and stays as it is. Raises CacheError,
        before anything is written, for arrays that cannot be a teacher's.
        """
        self._check_open()
        index = integer("index", index, 0, 10**18 - 1)
        targets = check_targets(self.spec, ids, logprobs, tail, draws, outcomes)
        check_sorted(targets)
        n = len(targets.ids)
        given = ShardLayout(**layout)
        first = integer("first_sequence", given.first_sequence, 0, 10**18 - 1)
        columns = check_inputs(self.spec, inputs, n)
        sequences = [n] if given.sequence_lengths is None else given.sequence_lengths
        lengths = check_lengths("sequence_lengths", sequences, n)
        arrays: dict[str, Array] = {f"inputs/{name}": column for name, column in columns.items()}
        arrays["sequence_lengths"] = lengths
        if given.document_lengths is not None:
            arrays["document_lengths"] = check_lengths("document_lengths", given.document_lengths, n)
        mine: dict[str, Any] = {"first_sequence": first, "sequences": len(lengths), "positions": n}
        recorded = {} if given.record is None else {"record": check_record(given.record)}
        commit = Commit.ALREADY_THERE
        if self._attempt_of(index, mine) is None:
            commit = self._commit(index, mine, targets, arrays, recorded)
        self._failed.pop(index, None)
        return commit

    def _commit(
        self,
        index: int,
        mine: Mapping[str, Any],
        targets: Targets,
        arrays: dict[str, Array],
        recorded: Mapping[str, Any],
    ) -> Commit:
        """Encode, pack and create a shard that does not exist. arrays: the inputs and the lengths."""
        self._check_unsealed(index)
        arrays |= encode_targets(self.spec, targets, arrays.get("inputs/tokens"))
        attributes: dict[str, Any] = {
            "format": FORMAT,
            "spec": self.spec.hash,
            "index": index,
            **mine,
            "counted": int(((targets.head_counts + targets.draw_counts) > 0).sum()),
            "head_entries": int(targets.head_counts.sum()),
            "draw_entries": int(targets.draw_counts.sum()),
            "statistics": _statistics(targets, self.spec),
            "content": content_hash(arrays),
            "attempt": uuid.uuid4().hex,
            "written": int(time.time()),
            **recorded,
        }
        data = pack(arrays, attributes, self.spec.settings, mine["positions"])
        check_attributes(attributes, self.spec, index)  # never commit what readers would refuse
        created, failure = False, None
        try:
            created = self.store.create(shard_key(index), data)
        except StoreError as error:  # the response may be lost, not the object
            failure = error
        if not created:
            # Which attempt created what exists now? The store's client may have repeated a request of this one.
            existing = self._attempt_of(index, mine)
            if failure and existing != attributes["attempt"]:
                raise failure
            if existing is None:
                raise StoreError(
                    f"{self.store.describe()}: {shard_key(index)} was there and is gone. Nothing was written; "
                    "write the shard again."
                )
            if existing != attributes["attempt"]:
                return Commit.ALREADY_THERE
        self.sizes[index] = len(data)
        return Commit.COMMITTED

    def submit_shard(self, index: int, *args: Any, **kwargs: Any) -> "Future[Commit]":
        """`write_shard` on a thread of the writer; waits while its queue is full.

        The arrays must not be changed before the future is done. An error that is not read from the future is raised
        by `close`.
        """
        self._check_open()
        self._room.acquire()
        future = Submission()
        self._pending.add(future)
        future.add_done_callback(self._done)
        try:
            self._pool.submit(self._run, future, index, [args, kwargs])
        except BaseException:
            future.cancel()
            raise
        return future

    def seal(self, *, progress: bool = False) -> pa.Table:
        """Write the manifest of a finished cache, and return it. A sealed cache opens with two requests.

        progress: a bar on stderr while the shards are scanned.
        Raises CacheError if there is no shard, if one failed and was not written since, if two hold the same sequences,
        or if a manifest of other shards exists.
        """
        self._check_open()
        wait(self._pending.copy())
        if self._failed:
            index, future = next(iter(self._failed.items()))
            raise CacheError(
                f"{self.store.describe()}: {len(self._failed)} shards failed and were not written since; shard "
                f"{index}: {future.exception()} Write them before sealing."
            ) from future.exception()
        table = scan(self.store, self.spec, listed(self.store), progress=progress)
        if not len(table):
            raise CacheError(f"{self.store.describe()}: there is no shard to seal.")
        refuse_overlaps(self.store, table)
        if not self.store.create(KEY, to_parquet(table, self.spec.hash)):
            sealed, columns = read_manifest(self.store, self.spec), ["shard", "object_sha256"]
            if sealed is None or not sealed.select(columns).equals(table.select(columns)):
                raise CacheError(
                    f"{self.store.describe()}: it was sealed with other shards than the {len(table)} it has now: "
                    f"`fastkd verify` names them. To seal it as it is, delete {KEY}; no target is lost by that."
                )
        return table

    def close(self) -> None:
        """Wait for everything submitted; raise the first error that was not read, with the others as notes."""
        if self._closed or self._process != os.getpid():
            return
        try:
            wait(self._pending.copy())
        finally:  # after an interrupt, shards that have not begun are dropped
            self._closed = True
            self._pool.shutdown(cancel_futures=True)
        errors = [error for f in self._failed.values() if not f.seen and (error := f.exception()) is not None]
        for other in errors[1:]:
            errors[0].add_note(f"and: {other}")
        if errors:
            raise errors[0]

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._closed = True
            self._pool.shutdown(cancel_futures=True)

    def _run(self, future: Submission, index: int, call: list[Any]) -> None:
        """On a thread of the pool: `write_shard`, into its future."""
        try:
            if not future.set_running_or_notify_cancel():
                return
            args, kwargs = call
            call.clear()
            future.set_result(self.write_shard(index, *args, **kwargs))
        except BaseException as error:
            # An error keeps its frames, and the frames that called them: none of them must keep the shard's arrays.
            traceback.clear_frames(error.__traceback__)
            args = kwargs = None
            self._failed[index] = future
            future.set_exception(error)

    def _done(self, future: "Future[Commit]") -> None:
        self._pending.discard(future)
        self._room.release()

    def _check_open(self) -> None:
        if self._process != os.getpid():
            raise CacheError(f"{self.store.describe()}: this writer belongs to another process; open one here.")
        if self._closed:
            raise CacheError(f"{self.store.describe()}: this writer is closed; open another.")

    def _check_unsealed(self, index: int) -> None:
        # checked for every shard: another process may seal the cache at any time
        try:
            self.store.get_tail(KEY, 8)
        except NotFound:
            return
        raise CacheError(
            f"{self.store.describe()}: the cache is sealed, and shard {index} is not there. To write it, delete {KEY} "
            "(no target is lost by that), and seal the cache again afterwards."
        )

    def _attempt_of(self, index: int, mine: Mapping[str, Any]) -> str | None:
        """The attempt that committed a shard; None if it does not exist. CacheError if it differs from `mine`."""
        try:
            key = shard_key(index)
            attributes = read_twice(
                self.store, lambda: shard_attributes(self.store.get_tail(key, TAIL_LENGTH), self.spec, index)
            )
        except NotFound:
            return None
        except Damage as damage:
            raise corrupt(self.store, index, damage) from damage
        if others := [f"{name} {attributes[name]} and {v}" for name, v in mine.items() if attributes[name] != v]:
            raise CacheError(
                f"shard {index} of {self.store.describe()}: the existing one is of another plan ({', '.join(others)}). "
                f"Write to another cache, or, if it is wrong: delete {shard_key(index)} and write it again."
            )
        return str(attributes["attempt"])


def _statistics(targets: Targets, spec: CacheSpec) -> dict[str, list[float | None]]:
    """Mean and quantiles over the counted positions: mass of the top-k entries, entropy (nats) with the tail as one."""
    head = np.arange(targets.ids.shape[1]) < targets.head_counts[:, None]
    mass, entropy = np.empty(len(head)), np.empty(len(head))
    tail = targets.tail[:, spec.temperatures.index(1.0)].astype(np.float64)
    for start in range(0, len(head), BLOCK):
        some = slice(start, start + BLOCK)
        x = np.where(head[some], targets.logprobs[some], -np.inf)
        p = np.exp(x)
        mass[some] = p.sum(1)
        entropy[some] = -np.einsum("nk,nk->n", p, np.where(head[some], x, 0))
    rest = np.exp(tail)
    entropy -= rest * np.where(rest > 0, tail, 0)
    counted = (targets.head_counts + targets.draw_counts) > 0
    if not counted.any():
        return {"mass": [None] * 4, "entropy": [None] * 4}
    found = {"mass": mass[counted], "entropy": entropy[counted]}
    return {name: [float(x.mean()), *np.quantile(x, (0.05, 0.5, 0.95)).tolist()] for name, x in found.items()}
