"""Graceful stop on SIGTERM and SIGINT, and the end of a process. Imports nothing heavy: commands enter it first.

transformers and FSDP2 keep process groups in caches that are never emptied. Their threads are still alive when the
interpreter shuts down, which sometimes aborts ("terminate called without an active exception"). A process that has
joined a process group therefore skips the interpreter's shutdown after its exit functions have run.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

DONE, WORK_REMAINS = 0, 75  # exit statuses; 75 is EX_TEMPFAIL, which schedulers can requeue on
INTERRUPTED = 130  # as of a shell, after SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGINT)

_final = False


def final() -> None:
    """Declare that the process ends after the job: after a stop request, further SIGTERMs do not change its status."""
    global _final
    _final = True


class Stopped(BaseException):
    """The job was asked to stop. Not an error: like KeyboardInterrupt, a BaseException."""


@dataclass
class Stop:
    """A stop request. Call it to ask the job to stop after the current batch; finished work is kept.

    gentle: a job is running that checks `asked` and stops by itself.
    """

    asked: bool = False
    gentle: bool = False

    def __call__(self, *signal: Any) -> None:
        self.asked = True

    @contextmanager
    def gently(self) -> Iterator[None]:
        """Around a job that stops by itself, which may be part of another one."""
        before, self.gentle = self.gentle, True
        try:
            yield
        finally:
            self.gentle = before


@contextmanager
def stopping(out: str = "", err: str = "") -> Iterator[Stop]:
    """Yield a `Stop` that the first SIGTERM or SIGINT triggers. While no job is running, `Stopped` is raised at once.

    A process that ends after the job (see `final`) is then ended by the signal's handler instead, with status 75 and
    the texts `out` and `err`: an exception in an import would leave modules half made, and there is nothing to finish.
    A second SIGINT interrupts as usual; a third one, while that cleans up, ends a process that ends after the job: what
    is committed is whole at any instant. A second SIGTERM is ignored: launchers forward signals that schedulers have
    already sent to every process. Enter it in the main thread.
    """
    stop, interrupted = Stop(), False

    def ask(number: int, frame: Any) -> None:
        nonlocal interrupted
        if stop.asked:
            if number == signal.SIGINT:
                if interrupted and _final:
                    os._exit(INTERRUPTED)
                interrupted = True
                raise KeyboardInterrupt
            return
        stop()
        if not stop.gentle and _final:
            for descriptor, text in ((1, out), (2, err)):
                with suppress(OSError):
                    os.write(descriptor, text.encode())
            os._exit(WORK_REMAINS)
        if not stop.gentle:
            raise Stopped
        with suppress(OSError, RuntimeError, ValueError):  # stderr is closed, or a line was being written
            again = "; Ctrl-C again to quit now" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            print(f"{name}: stopping after the current batch{again}", file=sys.stderr, flush=True)

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
    """Whether an error was caused by `Stopped`. Python turns an exception raised while a class is created,
    as in an import, into a RuntimeError."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__
    return error is not None


_grouped = False


def grouped() -> None:
    global _grouped
    _grouped = True


def end(status: int) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a late SIGTERM would otherwise change the status
    if not _grouped:
        sys.exit(status)
    # what the interpreter does before its shutdown
    threading._shutdown()  # type: ignore[attr-defined]  # joins the other threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:  # None: closed when the process began
                stream.flush()
        except OSError as error:
            with suppress(Exception):
                print(f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            status = 120
    os._exit(status)
