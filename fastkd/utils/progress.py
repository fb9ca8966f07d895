"""Progress of long jobs: a bar on a terminal, a line per minute elsewhere, or JSON events for a scheduler.

Reporting never fails a job: after a closed pipe or a full disk, output stops.
"""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any, TextIO

from tqdm import tqdm

from .numbers import duration
from .secrets import masked
from .text import printable

MODES = ("none", "bar", "lines", "events")
Mode = str | Callable[[Mapping[str, Any]], object]
"""One of MODES, or a function that is called with each event, such as {"event": "shard", "shard": 3}."""
LINE_SECONDS = 60.0  # between lines, without a bar
EVENT_SECONDS = 5.0
CALL_SECONDS = 0.0  # a function is told of every addition
_WINDOW_SECONDS = 60.0  # over which rates are averaged


class Progress(AbstractContextManager["Progress"]):
    """Counts units of work and reports them. Close it, or use it as a context manager.

    total: units in all. already: units done before this job. shares: names of time shares, passed to `add` in seconds
    and reported as fractions of the elapsed time. workers: how many workers share the remaining work.
    mode: "bar", "lines", "events" (one JSON object per line), "none" (see `mode_for`), or a function for the events.
    """

    def __init__(
        self,
        total: int,
        *,
        unit: str,
        already: int = 0,
        shares: tuple[str, ...] = (),
        workers: int = 1,
        mode: Mode = "none",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self.unit = total, already, unit
        self._mine = 0
        self._shares = dict.fromkeys(shares, 0.0)
        self._figures: dict[str, tuple[float, str]] = {}
        self._workers, self._clock = workers, clock
        self._call = mode if callable(mode) else None
        self._mode = mode = "called" if callable(mode) else mode
        self._stream: Any = Lenient(stream or (sys.stdout if mode == "events" else sys.stderr))
        self._begun = self._said = clock()
        self._marks: deque[tuple[float, int, dict[str, float]]] = deque([(self._begun, 0, dict(self._shares))])
        self._bar = tqdm(
            total=total, initial=already, unit=unit, unit_scale=True, file=self._stream, dynamic_ncols=True,
            disable=mode != "bar",
        )  # fmt: skip

    def add(self, units: int, **seconds: float) -> None:
        """Add units of work done by this process, and the seconds of each share."""
        self.done += units
        self._mine += units
        for name, value in seconds.items():
            self._shares[name] += value
        now = self._clock()
        if now - self._marks[-1][0] >= 0.5:
            self._marks.append((now, self._mine, dict(self._shares)))
            while now - self._marks[0][0] > _WINDOW_SECONDS and len(self._marks) > 2:
                self._marks.popleft()
        if self._mode == "bar":
            self._bar.set_postfix_str(", ".join(self._notes()), refresh=False)
        self._bar.update(units)
        self._say_now_and_then(now)

    def found(self, units: int) -> None:
        """Add units done by other workers; negative if counted work was discarded."""
        self.done += units
        self._bar.update(units)

    def figure(self, name: str, value: float, text: str) -> None:
        self._figures[name] = value, text

    def event(self, name: str, **fields: Any) -> None:
        """Report an event; outside mode "events", its text as a line. NaN and infinities become null in JSON."""
        if self._call is not None:
            self._call({"event": name, **fields})
        elif self._mode == "events":
            known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
            self._write(json.dumps({"event": name, **known}, allow_nan=False))
        elif text := fields.get("text"):
            self.say(str(text))

    def say(self, text: str) -> None:
        """Print a line, in modes "bar" and "lines"."""
        if self._mode in ("bar", "lines"):
            self._write(printable(text))

    def now(self) -> dict[str, float]:
        """Current state: units, total, units_per_second, shares, figures, and seconds_left if any unit was done in
        the last minute."""
        then, units, shares = self._marks[0]
        elapsed = max(self._clock() - then, 1e-9)
        rate = (self._mine - units) / elapsed
        found = {f"{self.unit}s": float(self.done), "total": float(self.total), f"{self.unit}s_per_second": rate}
        # seconds are added when they are over: some may lie before the window
        for name, value in self._shares.items():
            share = (value - shares[name]) / elapsed
            found[name] = min(1.0, share) if share < math.inf else share
        found |= {name: value for name, (value, _) in self._figures.items()}
        if rate > 0:
            found["seconds_left"] = max(0, self.total - self.done) / (rate * self._workers)
        return found

    def close(self) -> None:
        self._bar.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _notes(self) -> list[str]:
        now = self.now()
        shares = [f"{name.replace('_', ' ')} {now[name]:.0%}" for name in self._shares]
        return shares + [text for _, text in self._figures.values()]

    def _say_now_and_then(self, now: float) -> None:
        wait = {"lines": LINE_SECONDS, "events": EVENT_SECONDS, "called": CALL_SECONDS}.get(self._mode)
        if wait is None or now - self._said < wait:
            return
        self._said = now
        at = self.now()
        if self._mode in ("events", "called"):
            self.event("progress", **{name: round(value, 4) for name, value in at.items()})
            return
        left = f", {duration(at['seconds_left'])} left" if "seconds_left" in at else ""
        parts = [f"{at[f'{self.unit}s_per_second']:,.0f}/s", *self._notes()]
        share = self.done / self.total if self.total else 1.0
        self._write(f"{self.done:,} of {self.total:,} {self.unit}s ({share:.1%}), {', '.join(parts)}{left}")

    def _write(self, text: str) -> None:
        if self._mode == "bar":
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


class Lenient:
    """A stream that masks credentials, and drops output after the first failed write."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda stream: stream.write(masked(text)))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def _try(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None or self._stream.closed:
            return
        try:
            action(self._stream)
        except BrokenPipeError:
            # buffered text would fail again at exit and change the exit status
            with suppress(OSError):  # a stream without a file descriptor
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            self._stream = None
        except OSError:
            self._stream = None


def notes_only(mode: Mode, unit: str = "step") -> Progress:
    """A `Progress` for notes and other events, of something that is not counted: lines take the place of a bar."""
    return Progress(0, unit=unit, mode="lines" if mode == "bar" else mode)


def mode_for(*, events: bool = False, stream: TextIO | None = None) -> str:
    """ "events" if requested, "bar" on a terminal, else "lines"."""
    if events:
        return "events"
    stream = stream or sys.stderr
    return "bar" if stream is not None and not stream.closed and stream.isatty() else "lines"
