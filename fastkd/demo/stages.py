"""Seconds by stage, each said when it begins."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..utils.progress import Lenient


class Clock:
    """Says on stderr what goes on and since when. seconds: of each stage."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._stream = Lenient(sys.stderr)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """A part of the work; one of the same name before it is added to."""
        self.say(f"{name}: {what}")
        begun = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def say(self, text: str) -> None:
        """A line, or several."""
        print(f"[{self.total:4.0f} s] {text}", file=self._stream, flush=True)

    @property
    def total(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.begun
