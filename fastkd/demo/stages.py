"""Progress of the demo: its stages are announced on stderr, and timed."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..utils.progress import Lenient


class Stages:
    """Announces and times stages."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._stream = Lenient(sys.stderr)

    @contextmanager
    def stage(self, name: str, description: str) -> Iterator[None]:
        """Announce and time a stage. Times of stages of the same name add up."""
        self.log(f"{name}: {description}")
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def log(self, text: str) -> None:
        """Print a line, or several."""
        print(f"[{time.perf_counter() - self._start:4.0f} s] {text}", file=self._stream, flush=True)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, and "all": since the start."""
        return self._seconds | {"all": time.perf_counter() - self._start}


def seconds_text(seconds: Mapping[str, float]) -> str:
    """`Stages.seconds` as a line of text."""
    return "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if value >= 0.5)
