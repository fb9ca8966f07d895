"""Who means to write what. Claims save work; they decide nothing: only the commit of a shard does.

A claim is an object `claims/<name>/<n>.json`; of several the last one counts. It expires by itself, sooner if it is
young: each renewal lasts as long as all that went before it, so that a worker which dies is waited for no longer than
it worked, and a living one renews rarely.

A claim says until when it lasts, and for how long. The first is right where clocks agree; the second, from when it was
first seen, ends a claim whose writer's clock is far ahead.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..cache.errors import NotFound, StoreError
from ..cache.stores import Store

FIRST_SECONDS = 60.0
LONGEST_SECONDS = 3600.0  # whatever a claim says, and however long its worker has been at it
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,17})\.json")


@dataclass(frozen=True)
class _Held:
    number: int  # of the newest object
    begun: float
    renewed: float
    expires: float


class Claims:
    """The claims of one worker, in the store that it writes to. For one thread at a time.

    rank, world_size: a claim of the same rank of as many is a predecessor's, and is ignored unless that one still runs
    on this machine.
    clock: seconds since 1970; workers' clocks should agree to within some seconds.
    """

    def __init__(self, store: Store, rank: int, world_size: int, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._seen: dict[str, tuple[int, float]] = {}  # by name: the newest claim's number, and since when it is known
        self._me: dict[str, Any] = {
            "worker": uuid.uuid4().hex,
            "rank": rank,
            "world_size": world_size,
            "host": _host(),
            "process": _process(os.getpid()),
        }

    def take(self, name: str) -> float:
        """Claim a name. 0 where it is now ours; else for how many seconds more it may be somebody else's."""
        number, newest = self._newest(name)
        now = self._clock()
        if newest is not None and (left := self._seconds_left(name, number, newest, now)) > 0:
            return left
        held = _Held(number + 1, now, now, now + FIRST_SECONDS)
        if not self._write(name, held):
            return FIRST_SECONDS  # another was faster
        self._held[name] = held
        self._seen.pop(name, None)
        return 0.0

    def keep(self) -> None:
        """Renew what is held and has come half-way to its end. To be called now and then.

        A claim that another has taken, because this came too late, is held no longer; the work on it may go on: the
        commit decides.
        """
        now = self._clock()
        for name, held in list(self._held.items()):
            if held.renewed <= now < (held.renewed + held.expires) / 2:
                continue
            worked = min(max(now - held.begun, 0.0), LONGEST_SECONDS - FIRST_SECONDS)
            renewed = _Held(held.number + 1, held.begun, now, now + worked + FIRST_SECONDS)
            # Where the store fails the claim stays as it is, and is renewed at the next call; if it expires before
            # that, another does the same work. That is no reason to stop this one.
            with suppress(StoreError):
                if self._write(name, renewed):
                    self._held[name] = renewed
                else:
                    del self._held[name]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep all that is held, on a thread, as long as this is entered; nothing else may be asked meanwhile."""
        over = threading.Event()

        def keep() -> None:
            while not over.wait(FIRST_SECONDS / 4):
                self.keep()

        thread = threading.Thread(target=keep, name="fastkd-claims", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def drop(self, name: str) -> None:
        """Give up a claim, if it is held, so that others need not wait for it to expire."""
        if (held := self._held.pop(name, None)) is not None:
            with suppress(StoreError):  # then it expires
                self._write(name, _Held(held.number + 1, 0.0, 0.0, 0.0))

    def done(self, name: str) -> None:
        """Forget a claim: what it was for is there."""
        self._held.pop(name, None)

    @property
    def held(self) -> list[str]:
        """The names that are held."""
        return list(self._held)

    def _write(self, name: str, held: _Held) -> bool:
        claim = {**self._me, "expires": held.expires, "seconds": held.expires - held.renewed}
        return self._store.create(f"claims/{name}/{held.number}.json", json.dumps(claim).encode())

    def _newest(self, name: str) -> tuple[int, dict[str, Any] | None]:
        """The number of the newest claim, −1 where there is none, and what it says, if it can be read."""
        prefix = f"claims/{name}/"
        found = (_NUMBER.fullmatch(entry.key.removeprefix(prefix)) for entry in self._store.list(prefix))
        number = max((int(match[1]) for match in found if match), default=-1)
        if number < 0:
            return -1, None
        try:
            claim = json.loads(self._store.get(f"{prefix}{number}.json"))
        except (NotFound, ValueError, RecursionError):  # somebody tidied up, or wrote something of their own
            return number, None
        return number, claim if isinstance(claim, dict) else None

    def _seconds_left(self, name: str, number: int, claim: dict[str, Any], now: float) -> float:
        expires, seconds, process = (claim.get(key) for key in ("expires", "seconds", "process"))
        if not (_is_time(expires) and _is_time(seconds)) or claim.get("worker") == self._me["worker"]:
            return 0.0
        lives = False
        if claim.get("host") == self._me["host"] and isinstance(process, list) and len(process) == 2:
            if process[1] is not None and process != _process(process[0]):
                return 0.0  # it ran here, and is dead
            lives = process[1] is not None and process != self._me["process"]
        if not lives and all(claim.get(key) == self._me[key] for key in ("rank", "world_size")):
            return 0.0
        which, since = self._seen.get(name, (-1, now))
        if which != number or since > now:  # a new one; or our clock was set back
            since = now
        self._seen[name] = number, since
        return max(0.0, min(expires, since + min(seconds, LONGEST_SECONDS)) - now)


def _is_time(value: Any) -> TypeGuard[float]:
    """Whether this is a number of seconds: neither NaN nor infinite, and nothing that arithmetic chokes on."""
    return isinstance(value, (int, float)) and abs(value) < 2**53


def _host() -> str:
    """What process numbers are of: the machine since it was started, and the container."""
    parts = [socket.gethostname()]
    # machines of one name, and containers on a host's network, are not the same place
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _process(pid: Any) -> list[Any]:
    """A process, told from a later one of the same number by when it began; [pid, None] where there is no such process
    (or only what is left of one), or where that cannot be known."""
    try:
        # the process's name, in brackets, may hold anything
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return [pid, int(fields[19]) if fields[0] not in "ZX" else None]
    except (OSError, ValueError, IndexError, TypeError, OverflowError):
        return [pid, None]
