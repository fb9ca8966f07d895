"""A worker of a capture, as a Ray actor: it captures the shards that the driver gives it, and says what became of them.

Three methods run for long, one after another: `load`, `open` and `capture`. `exchange` and `stop` run beside them, in
Ray's concurrency group "talk".
"""

import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition
from typing import Any, NamedTuple

from ...cache.errors import StoreError
from ...cache.stores import open_store
from ...capture.session import CaptureSession
from ...capture.shard_runner import CaptureReport
from ...settings import CaptureSettings
from ...teachers.load import load
from ...utils.signals import Stop
from .cluster import enter_folder

TALK = "talk"


@dataclass(frozen=True)
class Work:
    """What the workers capture. load: the teacher and the data, as `fastkd.capture` takes them. options: of
    `CaptureSession`. folder: where relative names are looked for, if the worker's machine has it."""

    load: Callable[[], tuple[Any, Any]]
    out: Any
    settings: CaptureSettings
    options: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""


class Survey(NamedTuple):
    """A cache. totals: of its window plan. missing: shards. there: positions of the others."""

    cache: str
    totals: dict[str, int]
    missing: list[int]
    there: int


class Heard(NamedTuple):
    """What an exchange returns. ran: positions that the teacher ran since `capture` was called. busy: the fraction of
    the last minute in which it ran. events: of `Progress`, without those named progress."""

    ran: int
    busy: float
    events: list[dict[str, Any]]


class CaptureWorker:
    """One worker. rank, world_size: among all of them."""

    def __init__(self, work: Work, rank: int, world_size: int) -> None:
        self._work, self._place = work, {"rank": rank, "world_size": world_size}
        self._changed = Condition()
        self._events: list[dict[str, Any]] = []
        self._given: deque[int] = deque()
        self._closed = False
        self._stop = Stop()
        self._ran, self._busy = 0, 0.0
        self._session: CaptureSession | None = None
        self._loaded: tuple[Any, Any] | None = None

    def load(self) -> str:
        """Load the teacher and the data. Returns the name of this machine."""
        enter_folder(self._work.folder)
        self._loaded = self._work.load()
        return socket.gethostname()

    def open(self) -> None:
        """Begin or continue the cache, anew if it was open."""
        if self._session is not None:
            with suppress(StoreError):  # of the shards that failed, and are captured again
                self._session.__exit__(None, None, None)
            self._session = None
        assert self._loaded is not None
        self._stop = Stop()  # a capture that gave its teacher up has used the last one
        with self._changed:
            self._given.clear()
            self._events, self._ran, self._busy = [], 0, 0.0
        teacher, data = self._loaded
        options = {**self._work.options, **self._place}
        self._session = CaptureSession(
            teacher, data, self._work.out, self._work.settings, **options, progress=self._note
        )

    def survey(self) -> Survey:
        """What the cache has."""
        assert self._session is not None
        plan, missing = self._session.plan, self._session.missing()
        left = sum(int(plan.shard_rows[i + 1] - plan.shard_rows[i]) for i in missing)
        return Survey(open_store(self._work.out).describe(), plan.totals, missing, plan.totals["positions"] - left)

    def capture(self) -> CaptureReport:
        """Capture what is given, until `close` or `stop`; seals the cache if it then has every shard."""
        assert self._session is not None
        return self._session.run(self._shards(), stop=self._stop)

    def exchange(self, shards: Sequence[int], seconds: float) -> Heard:
        """Take some shards, and wait for events, at most this number of seconds."""
        with self._changed:
            self._given.extend(shards)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._events, seconds)
            events, self._events = self._events, []
            return Heard(self._ran, self._busy, events)

    def close(self) -> None:
        """There are no more shards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stop(self) -> None:
        """End after the current batch."""
        self._stop()
        self.close()

    def _shards(self) -> Iterator[int]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._given or self._closed)
                if self._stop.asked or not self._given:
                    return
                index = self._given.popleft()
            yield index

    def _note(self, event: Mapping[str, Any]) -> None:
        """Keep an event for the driver. From the capture's threads."""
        with self._changed:
            if event["event"] == "progress":
                self._ran, self._busy = int(event["positions"]), float(event.get("teacher_busy", 0.0))
            else:
                if event["event"] == "failed":
                    self._ran = max(0, self._ran - int(event["positions"]))
                self._events.append(dict(event))
                self._changed.notify_all()


def load_named(settings: Any) -> tuple[Any, Any]:
    """The teacher and the data that settings name, which are both `TeacherSettings` and `DataSettings`."""
    loaded = load(settings.teacher, settings, settings, rank=0, world_size=1)
    return loaded.teacher, loaded.data
