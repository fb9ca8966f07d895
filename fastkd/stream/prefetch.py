"""Prefetching of steps: shards are read on some threads, and steps are assembled from them on another.

    plan (a thread)  ─ shards, in the order of their first use ─▶  read (threads)
                     └ steps ─▶  assemble (a thread): waits for a step's shards ─▶  steps that are ready ─▶  `next`

Memory is bounded: by `shards` that are read or being read (one step alone may need more), by `steps` that are ready,
and by `MAX_PLANNED`. An error of any thread is raised unchanged by `next` when the step that it prevented is due.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

# Steps that are planned and not yet assembled, at most: enough for shards to be read in time. Without a limit, and with
# few shards that hold everything for epochs without end, planning would take a core and the memory.
MAX_PLANNED = 1024

Share = TypeVar("Share")
Shard = TypeVar("Shard")
Assembled = TypeVar("Assembled")


@dataclass(frozen=True)
class PlannedStep(Generic[Share]):
    """A step to be assembled: the keys of its shards, and of those that later steps may need."""

    share: Share
    shards: list[Hashable]
    still_open: set[Hashable]


@dataclass(frozen=True)
class _ReadingStep(Generic[Share, Shard]):
    share: Share
    shards: "dict[Hashable, Future[Shard]]"
    done_with: "list[Future[Shard]]"


class _Stopped(Exception):
    """`close` was called."""


class Prefetcher(Generic[Share, Shard, Assembled]):
    """Assembles the steps of `planned` in order, ahead of time. `close` it when done.

    read: from a shard's key to the shard. assemble: from a share and its shards to a step. release: called with a shard
    that no step needs any more. threads: for reading.
    """

    def __init__(
        self,
        planned: Iterator[PlannedStep[Share]],
        read: Callable[[Hashable], Shard],
        assemble: Callable[[Share, dict[Hashable, Shard]], Assembled],
        release: Callable[[Shard], None],
        *,
        shards: int,
        steps: int,
        threads: int,
    ) -> None:
        self._planned, self._read, self._assemble, self._release = planned, read, assemble, release
        self._max_shards, self._max_steps = shards, steps
        self._changed = threading.Condition()  # one lock for everything: held for moments
        self._reading: deque[_ReadingStep[Share, Shard] | BaseException | None] = deque()
        self._ready: deque[Assembled | BaseException | None] = deque()
        self._unassembled = self._held = 0  # steps planned and not yet assembled; shards read or being read
        self._stopped = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastkd-read")
        self._threads = [
            threading.Thread(target=self._run, args=(work, out), name=f"fastkd-{name}", daemon=True)
            for name, work, out in (
                ("plan", self._submit_reads, self._reading),
                ("assemble", self._assemble_steps, self._ready),
            )
        ]
        for thread in self._threads:
            thread.start()

    def next(self) -> Assembled | None:
        """The next step; None after the last. Raises the error that prevented it."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._stopped)
            if self._stopped:
                return None
            item = self._ready[0]
            if isinstance(item, BaseException):
                raise item
            if item is not None:  # None and errors are last, and stay
                self._ready.popleft()
                self._changed.notify_all()
        return item

    def close(self) -> None:
        """Stop. Reads that have begun are finished, no others are started, and no thread is left."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown(cancel_futures=True)
        for thread in self._threads:
            thread.join()
        self._reading.clear()
        self._ready.clear()

    def _run(self, work: Callable[[], None], out: "deque[object]") -> None:
        """On a thread: the work, and then its end or its error."""
        end: BaseException | None = None
        try:
            work()
        except _Stopped:
            return
        except BaseException as error:
            end = error
        with self._changed:
            out.append(end)
            self._changed.notify_all()

    def _wait_for(self, condition: Callable[[], object]) -> None:
        """With the lock held. Raises _Stopped."""
        self._changed.wait_for(lambda: self._stopped or condition())
        if self._stopped:
            raise _Stopped

    def _submit_reads(self) -> None:
        live: dict[Hashable, Future[Shard]] = {}
        for step in self._planned:
            for key in step.shards:
                if key not in live:
                    live[key] = self._submit_read(key)
            shards = {key: live[key] for key in step.shards}
            done_with = [live.pop(key) for key in live.keys() - step.still_open]
            with self._changed:
                self._wait_for(lambda: self._unassembled < MAX_PLANNED)
                self._reading.append(_ReadingStep(step.share, shards, done_with))
                self._unassembled += 1
                self._changed.notify_all()

    def _submit_read(self, key: Hashable) -> "Future[Shard]":
        """Read a shard as soon as there is room for it; at once if the next step waits for it alone."""
        with self._changed:
            self._wait_for(lambda: self._held < self._max_shards or not self._unassembled)
            self._held += 1
        return self._pool.submit(self._read, key)

    def _assemble_steps(self) -> None:
        while True:
            with self._changed:
                self._wait_for(lambda: self._reading)
                item = self._reading.popleft()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            step = self._assemble(item.share, {key: self._result(future) for key, future in item.shards.items()})
            for future in item.done_with:
                self._release(self._result(future))
            with self._changed:
                self._held -= len(item.done_with)
                self._unassembled -= 1
                self._changed.notify_all()
                self._wait_for(lambda: len(self._ready) < self._max_steps)
                self._ready.append(step)
                self._changed.notify_all()

    def _result(self, future: "Future[Shard]") -> Shard:
        try:
            return future.result()
        except BaseException:
            if self._stopped:
                raise _Stopped from None
            raise
