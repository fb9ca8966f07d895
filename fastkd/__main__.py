"""Entry point of `python -m fastkd` and of the command `fastkd`."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

# the commands that can be continued; those of cli/main.py, as a test checks
LONG = ("capture", "train", "mutual", "sweep", "generations", "mix-targets", "export-cache", "demo")

# until the command has its own handler: a signal must not raise anything in the imports
_interrupt = signal.getsignal(signal.SIGINT)
_resumes = sys.argv[1:2] != [] and sys.argv[1] in LONG


def _end_at_once(status: int, text: bytes) -> Callable[..., NoReturn]:
    """A signal's handler, while the command is not at work: ends the process."""

    def handler(*_: object) -> NoReturn:
        with suppress(OSError):  # stderr is closed
            os.write(2, text)
        os._exit(status)

    return handler


if _resumes:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_at_once(75, b"fastkd: stopped. Run the same command again.\n"))
elif _interrupt is signal.default_int_handler:  # not if it is ignored, as of a job in the background
    signal.signal(signal.SIGINT, _end_at_once(130, b"fastkd: interrupted\n"))

from .cli.main import main  # noqa: E402
from .utils.secrets import masked  # noqa: E402
from .utils.signals import end, final  # noqa: E402


def run() -> NoReturn:
    """Run the command and exit with its status."""
    if _interrupt is signal.default_int_handler and not _resumes:
        signal.signal(signal.SIGINT, _interrupt)
    final()
    sys.excepthook = _show
    end(main())


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an error that nobody expected, without credentials."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


if __name__ == "__main__":
    run()
