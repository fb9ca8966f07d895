"""Prefetching of steps: shards are read on some threads, and steps are assembled from them on another.

    plan (a thread)  ─ shards, in the order of their first use ─▶  read (threads)
                     └ steps ─▶  assemble (a thread): waits for a step's shards ─▶  steps that are ready ─▶  `next`

Memory is bounded: by `shards` that are read or being read (one step alone may need more), by `steps` that are ready,
and by `MAX_PLANNED`. An error of any thread is raised unchanged by `next` when the step that it prevented is due.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from .gather import OpenShard
from .step_plan import RankShare, ShardKey

# Steps that are planned and not yet assembled, at most: enough for shards to be read in time. Without a limit, and with
# few shards that hold everything for epochs without end, planning would take a core and the memory.
MAX_PLANNED = 1024


class Helper(Protocol):
    """Work that shards wait for, and that only the thread which iterates may do."""

    def work(self, idle: bool) -> float | None:
        """Do a piece of it. idle: whether that thread would wait otherwise; if not, at most one piece is asked for.

        Returns the seconds until it should be asked again, 0 after a piece of work; None if there is nothing to do
        until it calls `Prefetcher.wake`.
        """

    def close(self) -> None:
        """Let nobody wait any more: threads that wait for work end with an error."""


class _Stopped(Exception):
    """`close` was called."""


class Prefetcher:
    """Assembles the steps of `shares` in order, ahead of time. `close` it when done.

    read: a shard. assemble: a step, from a share and its shards. release: called with a shard that no step needs any
    more. threads: for reading. helper: what `read` may wait for; `next` does it.
    """

    def __init__(
        self,
        shares: Iterator[RankShare],
        read: Callable[[ShardKey], OpenShard],
        assemble: Callable[[RankShare, dict[ShardKey, OpenShard]], Any],
        release: Callable[[OpenShard], None],
        *,
        shards: int,
        steps: int,
        threads: int,
        helper: Helper | None = None,
    ) -> None:
        self._helper, self._woken = helper, False
        self._shares, self._read, self._assemble, self._release = shares, read, assemble, release
        self._max_shards, self._max_steps = shards, steps
        self._changed = threading.Condition()  # one lock for everything: held for moments
        # both end with None or an error
        self._reading: deque[Any] = deque()  # a share, the futures of its shards, and those that no later step needs
        self._ready: deque[Any] = deque()
        self._unassembled = self._held = 0  # steps planned and not yet assembled; shards read or being read
        self._stopped = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastkd-read")
        self._threads = [
            threading.Thread(target=self._run, args=(self._plan_steps, self._reading), name="fastkd-plan", daemon=True),
            threading.Thread(
                target=self._run, args=(self._assemble_steps, self._ready), name="fastkd-assemble", daemon=True
            ),
        ]
        for thread in self._threads:
            thread.start()

    def next(self) -> Any:
        """The next step; None after the last. Raises the error that prevented it."""
        self._help()
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

    def wake(self) -> None:
        """There is work for the helper. From any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def _help(self) -> None:
        """Let the helper work until a step is ready; once, if one is ready already."""
        while (helper := self._helper) is not None:
            with self._changed:
                idle, self._woken = not (self._ready or self._stopped), False
            pause = helper.work(idle)
            if not idle:
                return
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._stopped or self._woken, pause)

    def close(self) -> None:
        """Stop. Reads that have begun are finished, no others are started, and no thread is left."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._helper is not None:
            self._helper.close()
        self._pool.shutdown(cancel_futures=True)
        for thread in self._threads:
            thread.join()
        self._reading.clear()
        self._ready.clear()

    def _run(self, work: Callable[[], None], out: deque[Any]) -> None:
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

    def _plan_steps(self) -> None:
        live: dict[ShardKey, Future[OpenShard]] = {}
        for share in self._shares:
            for key in share.shards:
                if key not in live:
                    with self._changed:  # as soon as there is room; at once if the next step waits for this shard alone
                        self._wait_for(lambda: self._held < self._max_shards or not self._unassembled)
                        self._held += 1
                    live[key] = self._pool.submit(self._read, key)
            shards = {key: live[key] for key in share.shards}
            done_with = [live.pop(key) for key in live.keys() - share.still_open]
            with self._changed:
                self._wait_for(lambda: self._unassembled < MAX_PLANNED)
                self._reading.append((share, shards, done_with))
                self._unassembled += 1
                self._changed.notify_all()

    def _assemble_steps(self) -> None:
        while True:
            with self._changed:
                self._wait_for(lambda: self._reading)
                item = self._reading.popleft()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            share, shards, done_with = item
            step = self._assemble(share, {key: self._result(future) for key, future in shards.items()})
            for future in done_with:
                self._release(self._result(future))
            with self._changed:
                self._held -= len(done_with)
                self._unassembled -= 1
                self._changed.notify_all()
                self._wait_for(lambda: len(self._ready) < self._max_steps)
                self._ready.append(step)
                self._changed.notify_all()

    def _result(self, future: Future[OpenShard]) -> OpenShard:
        try:
            return future.result()
        except BaseException:
            if self._stopped:
                raise _Stopped from None
            raise
