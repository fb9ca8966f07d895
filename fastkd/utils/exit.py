"""End a process that has joined a process group.

transformers and FSDP2 keep process groups in caches that are never emptied. Their threads are still alive when the
interpreter shuts down, which sometimes aborts ("terminate called without an active exception"). Such a process
therefore skips the interpreter's shutdown after its exit functions have run.
"""

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

_grouped = False


def grouped() -> None:
    """Record that this process has joined a process group."""
    global _grouped
    _grouped = True


def end(status: int) -> NoReturn:
    """End this process with an exit status."""
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
