"""Entry point of `python -m fastkd` and of the command `fastkd`."""

import os
import signal
import sys
import traceback
from types import TracebackType
from typing import NoReturn

if sys.argv[1:2] in (["capture"], ["train"], ["sweep"], ["demo"]):
    # until the command has its own handler: a signal must not raise anything in the imports
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(75))

from .cli.main import main
from .utils.secrets import masked
from .utils.signals import end, final


def run() -> NoReturn:
    """Run the command and exit with its status."""
    final()
    sys.excepthook = _show
    end(main())


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an error that nobody expected, without credentials."""
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


if __name__ == "__main__":
    run()
