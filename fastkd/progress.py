"""How a long job says how far it is: a bar at a terminal, a line a minute elsewhere, or events for a scheduler."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 60.0  # between two lines, where there is no bar
EVENT_SECONDS = 5.0
_WINDOW_SECONDS = 60.0  # over which speeds are taken


class Progress:
    """Counts units of work, and tells of them.

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
        self._figures: dict[str, str | float] = {}
        self._workers, self._mode, self._clock = workers, mode, clock
        self._stream = stream or (sys.stdout if mode == "events" else sys.stderr)
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
        self._figures[name] = value
        self._figures[f"{name} text"] = text

    def event(self, name: str, **fields: Any) -> None:
        """Something that happened: an event; or a line, where it has a text."""
        if self._mode == "events":
            self._write(json.dumps({"event": name, **fields}, allow_nan=False))
        elif text := fields.get("text"):
            self.say(str(text))

    def say(self, text: str) -> None:
        """A line for a person; nothing where there are events, or nobody listens."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._mode == "lines":
            self._write(text)

    def now(self) -> dict[str, float]:
        """Where it stands: units and total, units_per_second, each share, each figure, seconds_left."""
        then, units, shares = self._marks[0]
        elapsed = max(self._clock() - then, 1e-9)
        rate = (self._mine - units) / elapsed
        found = {f"{self.unit}s": float(self.done), "total": float(self.total), f"{self.unit}s_per_second": rate}
        # seconds are told when they are over: some of the window's first may lie before it
        found |= {name: min(1.0, (value - shares[name]) / elapsed) for name, value in self._shares.items()}
        found |= {name: value for name, value in self._figures.items() if isinstance(value, float)}
        if rate > 0:
            found["seconds_left"] = max(0, self.total - self.done) / (rate * self._workers)
        return found

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _notes(self) -> list[str]:
        now = self.now()
        return [f"{name.replace('_', ' ')} {now[name]:.0%}" for name in self._shares] + [
            str(value) for name, value in self._figures.items() if name.endswith(" text")
        ]

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
        print(text, file=self._stream, flush=True)


def mode_for(*, events: bool = False, stream: TextIO | None = None) -> str:
    """ "events" where they are asked for, "bar" at a terminal, else "lines"."""
    if events:
        return "events"
    return "bar" if (stream or sys.stderr).isatty() else "lines"


def duration(seconds: float) -> str:
    """Seconds for a person: 42 s, 7 min, 3.1 h, 2.5 days."""
    for size, name in ((86400.0, "days"), (3600.0, "h")):
        if seconds >= 2 * size or (size == 3600.0 and seconds >= size):
            return f"{seconds / size:.1f} {name}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
