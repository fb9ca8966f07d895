"""Entry point of `python -m fastkd` and of the command `fastkd`."""

import os
import signal
import sys
import traceback
from types import TracebackType
from typing import NoReturn

# the commands that can be continued; those of cli/main.py, as a test checks
LONG = ("capture", "train", "mutual", "sweep", "generations", "mix-targets", "export-cache", "demo")

# until the command has its own handler: a signal must not raise anything in the imports
_interrupt = signal.getsignal(signal.SIGINT)
_resumes = sys.argv[1:2] != [] and sys.argv[1] in LONG and "--dry-run" not in sys.argv
if _resumes:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(75))
elif _interrupt is signal.default_int_handler:  # not if it is ignored, as of a job in the background
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

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
