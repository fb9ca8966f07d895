"""Writing shards of any kind: several at a time, each committed whole or not at all, and sealed by a manifest."""

import os
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from enum import StrEnum
from threading import BoundedSemaphore
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
from numpy.typing import NDArray

from .errors import CacheError, NotFound, StoreError
from .manifest import corrupt, listed, read_manifest, read_twice, scan, to_parquet
from .progress import Shown
from .shard.container import TAIL_LENGTH, Compression, Damage, content_hash, pack
from .shard.kind import ShardKind
from .spec import FORMAT
from .stores import Store

Array = NDArray[Any]


class Commit(StrEnum):
    """The result of writing a shard."""

    COMMITTED = "committed"
    ALREADY_THERE = "already there"


class Submission(Future[Commit]):
    """The future of a shard. seen: whether its result, or its error, was read."""

    seen = False

    def result(self, timeout: float | None = None) -> Commit:
        self.seen = True
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.seen = True
        return super().exception(timeout)


class ShardWriter(ABC):
    """Writes shards of one kind. Use as a context manager, or call `close`. Its methods may be called from several
    threads.

    A forked process must create another writer.

    sizes: bytes of each shard that this writer has committed, by its number.
    """

    def __init__(self, store: Store, kind: ShardKind, *, threads: int, queue: int) -> None:
        self.store = store
        self._kind = kind
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastkd-cache")
        self._room = BoundedSemaphore(threads + queue)
        self._pending: set[Future[Commit]] = set()
        self.sizes: dict[int, int] = {}
        self._failed: dict[int, Submission] = {}  # by shard, until the shard is written
        self._closed = False
        self._process = os.getpid()

    @abstractmethod
    def write_shard(self, index: int, *args: Any, **kwargs: Any) -> Commit:
        """Check, encode and commit a shard; returns when it is durable."""

    def _commit(
        self,
        index: int,
        mine: Mapping[str, Any],
        attributes: Mapping[str, Any],
        arrays: Mapping[str, Array],
        codec: Compression,
        record: Mapping[str, Any] | None,
        pages: Mapping[str, int] | None = None,
    ) -> Commit:
        """Pack and create a shard that does not exist.

        mine: the attributes that an existing shard must share. attributes: all others of this kind of shard.
        codec, pages: as in `pack`.
        """
        complete: dict[str, Any] = {
            "format": FORMAT,
            "spec": self._kind.spec_hash,
            "index": index,
            **mine,
            **attributes,
            "content": content_hash(arrays),
            "attempt": uuid.uuid4().hex,
            "written": int(time.time()),
            **({} if record is None else {"record": record}),
        }
        data = pack(arrays, complete, codec, mine["positions"], pages)
        self._kind.check(complete, index)  # never commit what readers would refuse
        key = self._kind.key(index)
        created, failure = False, None
        try:
            created = self.store.create(key, data)
        except StoreError as error:  # the response may be lost, not the object
            failure = error
        if not created:
            # Which attempt created what exists now? The store's client may have repeated a request of this one.
            existing = self._attempt_of(index, mine)
            if failure and existing != complete["attempt"]:
                raise failure
            if existing is None:
                raise StoreError(
                    f"{self.store.describe()}: {key} was there and is gone. Nothing was written; write the shard again."
                )
            if existing != complete["attempt"]:
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

    def seal(self, *, progress: Shown = False) -> pa.Table:
        """Write the manifest of finished shards, and return it. A sealed cache opens with two requests.

        progress: see `Shown`, while the shards are scanned.
        Raises CacheError if there is no shard, if one failed and was not written since, if two hold the same sequences,
        or if a manifest of other shards exists.
        """
        self._check_open()
        wait(self._pending.copy())
        kind, name = self._kind, f"{self._kind.label}{self.store.describe()}"
        if self._failed:
            index, future = next(iter(self._failed.items()))
            raise CacheError(
                f"{name}: {len(self._failed)} shards failed and were not written since; shard "
                f"{index}: {future.exception()} Write them before sealing."
            ) from future.exception()
        table = scan(self.store, kind, listed(self.store, kind.folder), progress=progress)
        if not len(table):
            raise CacheError(f"{name}: there is no shard to seal.")
        self._check_table(table)
        if not self.store.create(kind.manifest_key, to_parquet(table, kind.spec_hash)):
            sealed, columns = read_manifest(self.store, kind), ["shard", "object_sha256"]
            if sealed is None or not sealed.select(columns).equals(table.select(columns)):
                raise CacheError(
                    f"{name}: it was sealed with other shards than the {len(table)} it has now: "
                    f"`fastkd verify` names them. To seal it as it is, delete {kind.manifest_key}; no "
                    f"{kind.noun} is lost by that."
                )
        return table

    def _check_table(self, table: pa.Table) -> None:  # noqa: B027  (few kinds have something to check)
        """CacheError if these shards cannot be sealed together."""

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

    def __enter__(self) -> Self:
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
        key = self._kind.manifest_key
        try:
            self.store.get_tail(key, 8)
        except NotFound:
            return
        raise CacheError(
            f"{self._kind.label}{self.store.describe()}: the {self._kind.whole} is sealed, and shard {index} is not "
            f"there. To write it, delete {key} (no {self._kind.noun} is lost by that), and seal the "
            f"{self._kind.whole} again afterwards."
        )

    def _attempt_of(self, index: int, mine: Mapping[str, Any]) -> str | None:
        """The attempt that committed a shard; None if it does not exist. CacheError if it differs from `mine`."""
        try:
            key = self._kind.key(index)
            attributes = read_twice(
                self.store, lambda: self._kind.attributes(self.store.get_tail(key, TAIL_LENGTH), index)
            )
        except NotFound:
            return None
        except Damage as damage:
            raise corrupt(self.store, self._kind, index, damage) from damage
        if others := [f"{name} {attributes[name]} and {v}" for name, v in mine.items() if attributes[name] != v]:
            raise CacheError(
                f"shard {index} of {self._kind.label}{self.store.describe()}: the existing one is of another plan "
                f"({', '.join(others)}). Write to another cache, or, if it is wrong: delete {key} and write it again."
            )
        return str(attributes["attempt"])
