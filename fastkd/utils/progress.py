"""How a long job says how far it is: a bar at a terminal, a line a minute elsewhere, or events for a scheduler.

Nothing here ends a job: where a pipe is closed, or the disk with the log is full, it falls silent.
"""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

from .numbers import duration as duration

MODES = ("none", "bar", "lines", "events")
LINE_SECONDS = 60.0  # between two lines, where there is no bar
EVENT_SECONDS = 5.0
_WINDOW_SECONDS = 60.0  # over which speeds are taken


class Progress:
    """Counts units of work, and tells of them. Close it, or use it as a context manager.

    total: units in all; already: how many of them were there before. shares: names of parts of the time, given in
    seconds with `add`, that are shown as shares of it. workers: how many share what is left.
    mode: "bar"; "lines"; "events" (a JSON object a line); "none". `mode_for` chooses.
    """

    def __init__(
        self,
        total: int,
        *,
        unit: str,
        already: int = 0,
        shares: tuple[str, ...] = (),
        workers: int = 1,
        mode: str = "none",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self.unit = total, already, unit
        self._mine = 0
        self._shares = dict.fromkeys(shares, 0.0)
        self._figures: dict[str, tuple[float, str]] = {}
        self._workers, self._mode, self._clock = workers, mode, clock
        self._stream: Any = Lenient(stream or (sys.stdout if mode == "events" else sys.stderr))
        self._begun = self._said = clock()
        self._marks: deque[tuple[float, int, dict[str, float]]] = deque([(self._begun, 0, dict(self._shares))])
        self._bar = None
        if mode == "bar":
            self._bar = tqdm(
                total=total, initial=already, unit=unit, unit_scale=True, file=self._stream, dynamic_ncols=True
            )

    def add(self, units: int, **seconds: float) -> None:
        """Work done here, and the seconds of each share in it."""
        self.done += units
        self._mine += units
        for name, value in seconds.items():
            self._shares[name] += value
        now = self._clock()
        if now - self._marks[-1][0] >= 0.5:
            self._marks.append((now, self._mine, dict(self._shares)))
            while now - self._marks[0][0] > _WINDOW_SECONDS and len(self._marks) > 2:
                self._marks.popleft()
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._notes()), refresh=False)
            self._bar.update(units)
        self._say_now_and_then(now)

    def found(self, units: int) -> None:
        """Work that others did meanwhile; negative where work that was counted came to nothing."""
        self.done += units
        if self._bar is not None:
            self._bar.update(units)

    def figure(self, name: str, value: float, text: str) -> None:
        """A figure to show beside the rest from now on."""
        self._figures[name] = value, text

    def event(self, name: str, **fields: Any) -> None:
        """Something that happened: an event; or a line, where it has a text. Numbers that JSON has not are null."""
        if self._mode == "events":
            known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
            self._write(json.dumps({"event": name, **known}, allow_nan=False))
        elif text := fields.get("text"):
            self.say(str(text))

    def say(self, text: str) -> None:
        """A line for a person; nothing where there are events, or nobody listens."""
        if self._mode in ("bar", "lines"):
            self._write(text)

    def now(self) -> dict[str, float]:
        """Where it stands: units and total, units_per_second, each share, each figure, seconds_left (where units
        were done in the last minute)."""
        then, units, shares = self._marks[0]
        elapsed = max(self._clock() - then, 1e-9)
        rate = (self._mine - units) / elapsed
        found = {f"{self.unit}s": float(self.done), "total": float(self.total), f"{self.unit}s_per_second": rate}
        # seconds are told when they are over: some of the window's first may lie before it
        for name, value in self._shares.items():
            share = (value - shares[name]) / elapsed
            found[name] = min(1.0, share) if share < math.inf else share
        found |= {name: value for name, (value, _) in self._figures.items()}
        if rate > 0:
            found["seconds_left"] = max(0, self.total - self.done) / (rate * self._workers)
        return found

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _notes(self) -> list[str]:
        now = self.now()
        shares = [f"{name.replace('_', ' ')} {now[name]:.0%}" for name in self._shares]
        return shares + [text for _, text in self._figures.values()]

    def _say_now_and_then(self, now: float) -> None:
        wait = {"lines": LINE_SECONDS, "events": EVENT_SECONDS}.get(self._mode)
        if wait is None or now - self._said < wait:
            return
        self._said = now
        at = self.now()
        if self._mode == "events":
            self.event("progress", **{name: round(value, 4) for name, value in at.items()})
            return
        left = f", {duration(at['seconds_left'])} left" if "seconds_left" in at else ""
        parts = [f"{at[f'{self.unit}s_per_second']:,.0f}/s", *self._notes()]
        share = self.done / self.total if self.total else 1.0
        self._write(f"{self.done:,} of {self.total:,} {self.unit}s ({share:.1%}), {', '.join(parts)}{left}")

    def _write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


class Lenient:
    """A stream to write to that falls silent where it would fail: nobody can be told any more."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        self._try(lambda stream: stream.flush())

    def _try(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None or self._stream.closed:
            return
        try:
            action(self._stream)
        except BrokenPipeError:
            # what the stream still holds would fail again when the process ends, and change its exit status
            with suppress(OSError):  # a stream without a file
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            self._stream = None
        except OSError:
            self._stream = None


def mode_for(*, events: bool = False, stream: TextIO | None = None) -> str:
    """ "events" where they are asked for, "bar" at a terminal, else "lines"."""
    if events:
        return "events"
    stream = stream or sys.stderr
    return "bar" if stream is not None and not stream.closed and stream.isatty() else "lines"
