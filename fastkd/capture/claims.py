"""Claims: which worker is capturing which shard. They prevent duplicate work; correctness depends on commits alone.

A claim is an object `claims/<name>/<n>.json`; the one with the highest n counts. Claims expire, young ones sooner: each
renewal lasts as long as the claim has been held so far, so that others wait for a dead worker no longer than it worked,
and a living worker renews rarely.

A claim states when it expires, and for how many seconds it lasts. The first is right if clocks agree; the second,
counted from when it was first seen, ends a claim of a writer whose clock is far ahead.
"""

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from ..cache.errors import NotFound, Refused, StoreError
from ..cache.stores import Store

FIRST_SECONDS = 60.0
LONGEST_SECONDS = 3600.0  # upper limit, whatever a claim states
_PAUSE = 0.5
_WAIT_SECONDS = 2.0  # between two looks at another worker's claim
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,17})\.json")
T = TypeVar("T")


@dataclass(frozen=True)
class _Held:
    number: int  # of the newest object
    begun: float
    renewed: float
    expires: float


class Claims:
    """The claims of one worker, in the store that it writes to. Not thread-safe.

    rank, world_size: a claim with the same two is from an earlier run of this worker, and is ignored unless that run's
        process is still alive on this machine.
    clock: seconds since 1970; the workers' clocks should agree to within some seconds.
    """

    def __init__(self, store: Store, rank: int, world_size: int, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._held: dict[str, _Held] = {}
        # by name: the number of the newest claim, and when it was first seen
        self._seen: dict[str, tuple[int, float]] = {}
        self._me: dict[str, Any] = {
            "worker": uuid.uuid4().hex,
            "rank": rank,
            "world_size": world_size,
            "host": _host(),
            "process": _process(os.getpid()),
        }

    def take(self, name: str) -> float:
        """Claim a name. Returns 0 on success; otherwise the seconds for which another worker's claim may last.

        A request that fails is repeated once: claims are only advice, and no reason to end a capture.
        """
        try:
            return self._take(name)
        except Refused:
            raise
        except StoreError:
            time.sleep(_PAUSE)
            return self._take(name)

    def _take(self, name: str) -> float:
        number, newest = self._newest(name)
        now = self._clock()
        if newest is not None and (left := self._seconds_left(name, number, newest, now)) > 0:
            return left
        held = _Held(number + 1, now, now, now + FIRST_SECONDS)
        if not self._write(name, held):
            return FIRST_SECONDS  # another worker was faster
        self._held[name] = held
        self._seen.pop(name, None)
        return 0.0

    def keep(self) -> None:
        """Renew the held claims that have passed half of their duration. To be called regularly.

        A claim that expired and was taken by another worker is dropped from the held ones. Its work may still be
        finished: the first commit wins.
        """
        now = self._clock()
        for name, held in list(self._held.items()):
            if held.renewed <= now < (held.renewed + held.expires) / 2:
                continue
            worked = min(max(now - held.begun, 0.0), LONGEST_SECONDS - FIRST_SECONDS)
            renewed = _Held(held.number + 1, held.begun, now, now + worked + FIRST_SECONDS)
            # If the store fails, the claim is renewed at the next call; if it expires before that, another worker
            # does the same work, which is no reason to stop this one.
            with suppress(StoreError):
                if self._write(name, renewed):
                    self._held[name] = renewed
                else:
                    del self._held[name]

    def drop(self, name: str) -> None:
        """Give up a claim, if held, so that others need not wait until it expires."""
        if (held := self._held.pop(name, None)) is not None:
            with suppress(StoreError):  # it expires instead
                self._write(name, _Held(held.number + 1, 0.0, 0.0, 0.0))

    def done(self, name: str) -> None:
        """Forget a claim whose work is committed."""
        self._held.pop(name, None)

    @property
    def held(self) -> list[str]:
        """The names of the held claims."""
        return list(self._held)

    def _write(self, name: str, held: _Held) -> bool:
        claim = {**self._me, "expires": held.expires, "seconds": held.expires - held.renewed}
        key, text = f"claims/{name}/{held.number}.json", json.dumps(claim).encode()
        # a store that repeats a request whose answer was lost finds the object that the first one made
        return self._store.create(key, text) or self._store.get(key) == text

    def _newest(self, name: str) -> tuple[int, dict[str, Any] | None]:
        """The number of the newest claim, −1 if there is none, and its contents if they can be read."""
        prefix = f"claims/{name}/"
        found = (_NUMBER.fullmatch(entry.key.removeprefix(prefix)) for entry in self._store.list(prefix))
        number = max((int(match[1]) for match in found if match), default=-1)
        if number < 0:
            return -1, None
        try:
            claim = json.loads(self._store.get(f"{prefix}{number}.json"))
        except (NotFound, ValueError, RecursionError):  # deleted by a person, or not written by us
            return number, None
        return number, claim if isinstance(claim, dict) else None

    def _seconds_left(self, name: str, number: int, claim: dict[str, Any], now: float) -> float:
        expires, seconds, process = (claim.get(key) for key in ("expires", "seconds", "process"))
        if not (_is_time(expires) and _is_time(seconds)) or claim.get("worker") == self._me["worker"]:
            return 0.0
        alive = False
        if claim.get("host") == self._me["host"] and isinstance(process, list) and len(process) == 2:
            if process[1] is not None and process != _process(process[0]):
                return 0.0  # it ran on this machine, and is dead
            alive = process[1] is not None and process != self._me["process"]
        if not alive and all(claim.get(key) == self._me[key] for key in ("rank", "world_size")):
            return 0.0
        which, since = self._seen.get(name, (-1, now))
        if which != number or since > now:  # a new one; or our clock was set back
            since = now
        self._seen[name] = number, since
        return max(0.0, min(expires, since + min(seconds, LONGEST_SECONDS)) - now)


def wait_for(attempt: Callable[[], tuple[float, T]], waiting: Callable[[], None]) -> T:
    """Call `attempt` until another worker's claim is no reason to wait: it returns for how many seconds one may last,
    and its result, which is returned with 0 seconds. waiting: called before the first wait.
    """
    left, result = attempt()
    if left:
        waiting()
    while left:
        time.sleep(min(left, _WAIT_SECONDS))
        left, result = attempt()
    return result


def _is_time(value: Any) -> TypeGuard[float]:
    """Whether this is a finite number of seconds that fits a float."""
    return isinstance(value, (int, float)) and abs(value) < 2**53


def _host() -> str:
    """Identifies the machine, its last boot and the container, within which process numbers are unique."""
    parts = [socket.gethostname()]
    # machines may share a name, and containers their host's network
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _process(pid: Any) -> list[Any]:
    """A process and its start time, which distinguishes it from a later process with the same number; [pid, None] if
    there is no such process, if it is a zombie, or if that cannot be determined."""
    try:
        # the process's name, in brackets, may contain anything
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return [pid, int(fields[19]) if fields[0] not in "ZX" else None]
    except (OSError, ValueError, IndexError, TypeError, OverflowError):
        return [pid, None]
