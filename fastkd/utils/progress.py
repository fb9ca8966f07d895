"""Progress of long jobs: a bar on a terminal, a line every half minute elsewhere, or JSON events for a scheduler.

Reporting never fails a job: after a closed pipe or a full disk, output stops.
"""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from .numbers import duration
from .progress_line import amount, bar_line, pace_text
from .secrets import masked
from .text import printable

T = TypeVar("T")
MODES = ("none", "bar", "lines", "events")
Mode = str | Callable[[Mapping[str, Any]], object]
"""One of MODES, or a function that is called with each event, such as {"event": "shard", "shard": 3}."""
LINE_SECONDS = 30.0  # between lines, without a bar
EVENT_SECONDS = 5.0
CALL_SECONDS = 0.0  # a function is told of every addition
_WINDOW_SECONDS = 60.0  # over which rates are averaged
_NAMES: ContextVar[tuple[str, ...]] = ContextVar("names", default=())
_OUTER: ContextVar["Progress | None"] = ContextVar("outer", default=None)


@contextmanager
def naming(*names: str) -> Iterator[None]:
    """All progress that begins within the context has these names in front, for people: "control: step 3 of 10"."""
    token = _NAMES.set((*_NAMES.get(), *names))
    try:
        yield
    finally:
        _NAMES.reset(token)


class Progress(AbstractContextManager["Progress"]):
    """Counts units of work and reports them. Close it, or use it as a context manager.

    total: units in all; 0 if that is not known. already: units done before this job. shares: names of time shares,
    passed to `add` in seconds and reported as fractions of the elapsed time. workers: how many workers share the
    remaining work. what: is counted, for people. passing: the bar is removed at the end, and with mode "none" the count
    is shown within the `hosting` progress, if there is one.
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
        what: str = "",
        passing: bool = False,
        mode: Mode = "none",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self.unit = total, already, unit
        self._mine = 0
        self._shares = dict.fromkeys(shares, 0.0)
        self._figures: dict[str, tuple[float, str]] = {}
        self._workers, self._clock, self._doing = workers, clock, ""
        self._names, self._what = ", ".join(_NAMES.get()), what
        self._outer = _OUTER.get() if passing and mode == "none" else None
        self._call = mode if callable(mode) else None
        self._mode = mode = "called" if callable(mode) else mode
        self._stream: Any = Lenient(stream or (sys.stdout if mode == "events" else sys.stderr))
        self._begun = self._said = clock()
        self._marks: deque[tuple[float, int, dict[str, float]]] = deque([(self._begun, 0, dict(self._shares))])
        how: dict[str, Any] = {"leave": not passing, "disable": mode != "bar"}
        self._bar = _Bar(self, total=total, initial=already, file=self._stream, **how)

    def add(self, units: int, **seconds: float) -> None:
        """Add units of work done by this process, and the seconds of each share."""
        self.done += units
        self._mine += units
        self._doing = ""
        for name, value in seconds.items():
            self._shares[name] += value
        now = self._clock()
        if now - self._marks[-1][0] >= 0.5:
            self._marks.append((now, self._mine, dict(self._shares)))
            while now - self._marks[0][0] > _WINDOW_SECONDS and len(self._marks) > 2:
                self._marks.popleft()
        self._bar.update(units)
        self._say_now_and_then(now)
        if self._outer is not None:
            self._outer.doing(f"{self._what} {self._count('/')}")

    def doing(self, text: str) -> None:
        """Show what is done of the current unit, such as "micro-batch 3/8", until the next `add`. Not an event."""
        self._doing = text
        if self._mode == "bar":
            self._bar.move()
        elif self._mode == "lines":
            self._say_now_and_then(self._clock())

    @contextmanager
    def hosting(self) -> Iterator[None]:
        """Show the counts of all that begins within the context, and shows nothing itself, as what is done here."""
        token = _OUTER.set(self)
        try:
            yield
        finally:
            _OUTER.reset(token)
            self._doing = ""

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
            self._write(printable(f"{self._names}: {text}" if self._names else text))

    def line(self, width: int, *, ascii_only: bool = False) -> str:
        """The bar, with what there is room for in so many columns."""
        share = min(1.0, self.done / self.total) if self.total else None
        names = [name for name in (self._names, self._what) if name]
        return bar_line(width, ", ".join(names), self._count("/"), share, self._pieces(), ascii_only=ascii_only)

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

    def _count(self, of: str) -> str:
        """How much is done, and of how much."""
        known = [self.done, self.total] if self.total else [self.done]
        count = of.join(amount(number, self.unit) for number in known)
        return count if self.unit == "byte" else f"{count} {self.unit}s"

    def _pieces(self) -> list[str]:
        """What a bar and a line say besides the count, the most important first."""
        at, (pace, left) = self.now(), self._pace()
        shares = [f"{name.replace('_', ' ')} {at[name]:.0%}" for name in self._shares]
        figures = [text for _, text in self._figures.values()]
        ends = [] if left is None or self.done >= self.total else [f"{duration(left)} left"]
        return [piece for piece in (self._doing, pace, *ends, *figures, *shares) if piece]

    def _pace(self) -> tuple[str, float | None]:
        """The speed as text, and the seconds that are left: from whole units if these take more than a second, so that
        neither changes while one is done."""
        at, (begun, units, _), (last, mine, _) = self.now(), self._marks[0], self._marks[-1]
        rate, left = at[f"{self.unit}s_per_second"], at.get("seconds_left") if self.total else None
        if 0 < mine - units < last - begun:
            rate = (mine - units) / (last - begun)
            rest = max(0, self.total - self.done) / (rate * self._workers)
            left = max(0.0, rest - (self._clock() - last)) if self.total else None
        return pace_text(rate, self.unit), left

    def _say_now_and_then(self, now: float) -> None:
        wait = {"lines": LINE_SECONDS, "events": EVENT_SECONDS, "called": CALL_SECONDS}.get(self._mode)
        if wait is None or now - self._said < wait:
            return
        self._said = now
        if self._mode in ("events", "called"):
            self.event("progress", **{name: round(value, 4) for name, value in self.now().items()})
            return
        count = f"{self._what}: " * bool(self._what) + self._count(" of ")
        count += f" ({self.done / self.total:.1%})" if self.total else ""
        self.say(", ".join([count, *self._pieces()]))

    def _write(self, text: str) -> None:
        if self._mode == "bar":
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


class _Bar(tqdm):  # type: ignore[misc]
    """The bar of a `Progress`, whose line it shows. tqdm knows when and where to draw it."""

    def __init__(self, progress: Progress, **options: Any) -> None:
        self._progress, self._moved = progress, 0.0
        super().__init__(dynamic_ncols=True, **options)

    def __str__(self) -> str:
        how = self.format_dict
        # the last column stays free: some terminals would begin another line
        return self._progress.line((how["ncols"] or 80) - 1, ascii_only=bool(how["ascii"]))

    def move(self) -> None:
        """Draw it again, unless it was drawn just now."""
        now = time.monotonic()
        if not self.disable and now - self._moved >= self.mininterval:
            self._moved = now
            self.refresh()


class Lenient:
    """A stream that masks credentials, and drops output after the first failed write."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        """Whether both write to one stream: tqdm clears the bars there before it writes a line."""
        return isinstance(other, Lenient) and self._stream is other._stream

    __hash__ = None  # type: ignore[assignment]

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


def counting(total: int, unit: str, what: str, *, shown: bool) -> Progress:
    """The progress of a loop within a job: on a terminal a bar that is removed at the end, elsewhere lines.

    shown: whether it is shown; if not, it is shown within the `hosting` progress, if there is one.
    """
    return Progress(total, unit=unit, what=what, passing=True, mode=mode_for() if shown else "none")


def shards_shown(shards: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Wrap an iterable of `total` shards to display progress, as `counting` does."""
    with counting(total, "shard", what, shown=True) as progress:
        for shard in shards:
            yield shard
            progress.add(1)


def is_shown(mode: Mode) -> bool:
    """Whether a job with this mode shows the loops within it to a person."""
    return mode in ("bar", "lines")


def mode_for(*, events: bool = False, stream: TextIO | None = None) -> str:
    """ "events" if requested, "bar" on a terminal, else "lines"."""
    if events:
        return "events"
    stream = stream or sys.stderr
    return "bar" if stream is not None and not stream.closed and stream.isatty() else "lines"
