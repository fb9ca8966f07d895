"""Who means to write what. Claims save work; they decide nothing: only the commit of a shard does.

A claim is an object `claims/<name>/<n>`; of several the last one counts. It expires by itself, sooner if it is young:
each renewal lasts as long as all that went before it, so that a worker which dies is waited for no longer than it
worked, and a living one renews rarely.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.errors import NotFound, StoreError
from ..cache.stores import Store

FIRST_SECONDS = 60.0


@dataclass
class _Held:
    number: int  # of the newest object
    begun: float
    expires: float


class Claims:
    """The claims of one worker, in the store that it writes to. For one thread at a time.

    rank, world_size: a claim of the same rank of as many is a predecessor's, which is gone, and is ignored.
    clock: seconds since 1970; workers' clocks should agree to within some seconds.
    """

    def __init__(self, store: Store, rank: int, world_size: int, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._me: dict[str, Any] = {
            "worker": uuid.uuid4().hex,
            "rank": rank,
            "world_size": world_size,
            "host": socket.gethostname(),
            "process": _process(os.getpid()),
        }

    def take(self, name: str) -> float:
        """Claim a name. 0 where it is now ours; else for how many seconds more it may be somebody else's."""
        number, newest = self._newest(name)
        now = self._clock()
        if newest is not None and (left := self._seconds_left(newest, now)) > 0:
            return left
        held = _Held(number + 1, now, now + FIRST_SECONDS)
        if not self._write(name, held):
            return FIRST_SECONDS  # another was faster
        self._held[name] = held
        return 0.0

    def keep(self) -> None:
        """Renew what is held and has come half-way to its end. To be called now and then."""
        now = self._clock()
        for name, held in self._held.items():
            if now - held.begun < (held.expires - held.begun) / 2:
                continue
            renewed = _Held(held.number + 1, held.begun, now + (now - held.begun) + FIRST_SECONDS)
            # where another has taken it, because we were late, both go on: the commit decides
            self._write(name, renewed)
            self._held[name] = renewed

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep all that is held, on a thread, as long as this is entered; nothing else may be asked meanwhile."""
        over = threading.Event()

        def keep() -> None:
            while not over.wait(FIRST_SECONDS / 4):
                with suppress(StoreError):  # it expires then, and another does the same work
                    self.keep()

        thread = threading.Thread(target=keep, name="fastkd-claims", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def drop(self, name: str) -> None:
        """Give up a claim, so that others need not wait for it to expire."""
        held = self._held.pop(name)
        self._write(name, _Held(held.number + 1, held.begun, 0.0))

    def done(self, name: str) -> None:
        """Forget a claim: what it was for is there."""
        self._held.pop(name, None)

    @property
    def held(self) -> list[str]:
        """The names that are held."""
        return list(self._held)

    def _write(self, name: str, held: _Held) -> bool:
        claim = {**self._me, "expires": held.expires}
        return self._store.create(f"claims/{name}/{held.number}.json", json.dumps(claim).encode())

    def _newest(self, name: str) -> tuple[int, dict[str, Any] | None]:
        """The number of the newest claim, −1 where there is none, and what it says, if it can be read."""
        stems = [Path(entry.key).stem for entry in self._store.list(f"claims/{name}/")]
        number = max((int(stem) for stem in stems if stem.isdecimal()), default=-1)
        if number < 0:
            return -1, None
        try:
            claim = json.loads(self._store.get(f"claims/{name}/{number}.json"))
        except (NotFound, ValueError):  # somebody tidied up, or wrote something of their own
            return number, None
        return number, claim if isinstance(claim, dict) else None

    def _seconds_left(self, claim: dict[str, Any], now: float) -> float:
        expires = claim.get("expires")
        if not isinstance(expires, (int, float)) or claim.get("worker") == self._me["worker"]:
            return 0.0
        if all(claim.get(name) == self._me[name] for name in ("rank", "world_size")):
            return 0.0
        process = claim.get("process")
        if claim.get("host") == self._me["host"] and isinstance(process, list) and process != _process(process[0]):
            return 0.0  # it ran here, and is dead
        return max(0.0, expires - now)


def _process(pid: Any) -> list[Any]:
    """A process, told from a later one of the same number by when it began; [pid, None] where that cannot be known."""
    try:
        # the process's name, in brackets, may hold anything
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return [int(pid), int(fields[19])]
    except (OSError, ValueError, IndexError, TypeError):
        return [pid, None]
