"""Work that runs ahead of who asks for it: shards are read on some threads, steps are put together on another.

    plan (a thread)  ─ asks for shards, in the order of their first use ─▶  reading (threads)
                     └ steps ─▶  assembly (a thread): waits for a step's shards ─▶ steps that are ready ─▶ who asks

Memory is bounded: by `shards` that are read or being read (one step alone may need more), by `steps` that are ready,
and by `MOST_PLANNED`. An error of any thread is raised, as it is, where the step that it hindered is asked for.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

# Steps planned and not yet put together, at most. Far enough ahead to have shards read in time; without an end, where
# few shards hold everything and plans go on for ever, planning would take a core, and the memory.
MOST_PLANNED = 1024

Plan = TypeVar("Plan")
Shard = TypeVar("Shard")
Ready = TypeVar("Ready")


@dataclass(frozen=True)
class Needs(Generic[Plan]):
    """A step to be put together: the shards it is made of, and those that later steps may be made of as well."""

    plan: Plan
    shards: list[Hashable]
    still_open: set[Hashable]


@dataclass(frozen=True)
class _Planned(Generic[Plan, Shard]):
    plan: Plan
    shards: "dict[Hashable, Future[Shard]]"
    done_with: "list[Future[Shard]]"


class _Stopped(Exception):
    """The one who asks wants no more."""


class Prefetcher(Generic[Plan, Shard, Ready]):
    """The steps of `plans`, one after another, made ahead of time; `close` it when done.

    read: from a shard's key to the shard. assemble: from a plan and its shards to a step. release: a shard that no
    step needs any more. threads: that read.
    """

    def __init__(
        self,
        plans: Iterator[Needs[Plan]],
        read: Callable[[Hashable], Shard],
        assemble: Callable[[Plan, dict[Hashable, Shard]], Ready],
        release: Callable[[Shard], None],
        *,
        shards: int,
        steps: int,
        threads: int,
    ) -> None:
        self._plans, self._read, self._assemble, self._release = plans, read, assemble, release
        self._most_shards, self._most_steps = shards, steps
        # one lock for everything: held for moments
        self._changed = threading.Condition()
        self._planned: deque[_Planned[Plan, Shard] | BaseException | None] = deque()
        self._ready: deque[Ready | BaseException | None] = deque()
        self._waiting = self._held = 0  # steps planned and not yet assembled; shards read or being read
        self._stopped = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastkd-read")
        self._threads = [
            threading.Thread(target=self._run, args=(work, out), name=f"fastkd-{name}", daemon=True)
            for name, work, out in (("plan", self._plan, self._planned), ("assemble", self._work, self._ready))
        ]
        for thread in self._threads:
            thread.start()

    def next(self) -> Ready | None:
        """The next step; None after the last. Raises what hindered it."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._stopped)
            if self._stopped:
                return None
            item = self._ready[0]
            if item is None or isinstance(item, BaseException):  # the last that will ever come: it stays
                if item is None:
                    return None
                raise item
            self._ready.popleft()
            self._changed.notify_all()
        return item

    def close(self) -> None:
        """Stop: what is being read is read to its end, nothing else is; no thread is left."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown(cancel_futures=True)
        for thread in self._threads:
            thread.join()
        self._planned.clear()
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

    def _plan(self) -> None:
        live: dict[Hashable, Future[Shard]] = {}
        for needs in self._plans:
            for key in needs.shards:
                if key not in live:
                    live[key] = self._ask(key)
            shards = {key: live[key] for key in needs.shards}
            done_with = [live.pop(key) for key in live.keys() - needs.still_open]
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._waiting < MOST_PLANNED)
                if self._stopped:
                    raise _Stopped
                self._planned.append(_Planned(needs.plan, shards, done_with))
                self._waiting += 1
                self._changed.notify_all()

    def _ask(self, key: Hashable) -> "Future[Shard]":
        """Have a shard read once there is room; or at once, where the next step waits for it and nothing else."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._held < self._most_shards or not self._waiting)
            if self._stopped:
                raise _Stopped
            self._held += 1
        return self._pool.submit(self._read, key)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._planned)
                if self._stopped:
                    raise _Stopped
                item = self._planned.popleft()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            step = self._assemble(item.plan, {key: self._shard(future) for key, future in item.shards.items()})
            for future in item.done_with:
                self._release(self._shard(future))
            with self._changed:
                self._held -= len(item.done_with)
                self._waiting -= 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._most_steps)
                if self._stopped:
                    raise _Stopped
                self._ready.append(step)
                self._changed.notify_all()

    def _shard(self, future: "Future[Shard]") -> Shard:
        try:
            return future.result()
        except BaseException:
            if self._stopped:
                raise _Stopped from None
            raise
