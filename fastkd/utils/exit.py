"""How a process ends that was one of a group.

What divides a model (transformers, FSDP2) keeps process groups beyond its own end, in caches that nothing empties.
Their threads then run beside the interpreter's end, which aborts now and then ("terminate called without an active
exception"). So such a process skips that end: there is nothing left to do in it.
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
    """This process has joined a group."""
    global _grouped
    _grouped = True


def end(status: int) -> NoReturn:
    """End this process, which has nothing more to do, with an exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # else one that comes late would be the status
    if not _grouped:
        sys.exit(status)
    # what Python does before it takes itself apart
    threading._shutdown()  # type: ignore[attr-defined]  # waits for what other threads have begun
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:  # None: it was closed when the process began
                stream.flush()
        except OSError as error:
            with suppress(Exception):
                print(f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            status = 120
    os._exit(status)
