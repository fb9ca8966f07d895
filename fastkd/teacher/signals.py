"""SIGTERM and SIGINT ask a job to stop."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .job import Stop
from .pipeline import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stopping() -> Iterator[Stop]:
    """A `Stop` that the first SIGTERM or SIGINT asks; at once (`Stopped` is raised) while there is no shard to drop.

    A second SIGINT interrupts as usual. To be entered in the main thread.
    """
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop()
        if not stop.gentle:
            raise Stopped
        print(f"{signal.Signals(number).name}: stopping after the present batch", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
