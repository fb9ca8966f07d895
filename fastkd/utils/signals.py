"""SIGTERM and SIGINT ask a job to stop. Imports nothing heavy: it is the first thing that a command does."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

DONE, WORK_REMAINS = 0, 75  # exit statuses; 75 is EX_TEMPFAIL, on which schedulers requeue
SIGNALS = (signal.SIGTERM, signal.SIGINT)

_final = False


def final() -> None:
    """This process ends after the job: once asked to stop, no further SIGTERM ends it with another status."""
    global _final
    _final = True


class Stopped(BaseException):
    """A job was asked to stop. Like KeyboardInterrupt, it is no failure of whatever it comes through."""


@dataclass
class Stop:
    """Asks a job to stop: what it has begun is dropped after the present batch, what is finished is kept.

    gentle: whether a job is at work that will do so.
    """

    asked: bool = False
    gentle: bool = False

    def __call__(self, *signal: Any) -> None:
        self.asked = True


@contextmanager
def stopping() -> Iterator[Stop]:
    """A `Stop` that the first SIGTERM or SIGINT asks; at once (`Stopped` is raised) while there is nothing to drop.

    A second SIGINT interrupts as usual. A second SIGTERM changes nothing: launchers hand on what schedulers have
    sent to every process. To be entered in the main thread.
    """
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        stop()
        if not stop.gentle:
            raise Stopped
        with suppress(OSError, RuntimeError, ValueError):  # nobody listens, or a line was being written
            print(f"{signal.Signals(number).name}: stopping after the present batch", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield stop
    except Exception as error:
        if _began_as_stopped(error):
            raise Stopped from error
        raise
    finally:
        for number, handler in before.items():
            if not (_final and stop.asked and number == signal.SIGTERM):
                signal.signal(number, handler)


def _began_as_stopped(error: BaseException | None) -> bool:
    """Whether an error is what something made of `Stopped`. What is raised while a class is being made, as where a
    module is imported, comes out as a RuntimeError."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__
    return error is not None
