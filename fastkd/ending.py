"""How a process ends that was one of a group.

What divides a model (transformers, FSDP2) keeps process groups beyond its own end, in caches that nothing empties.
Their threads then run beside the interpreter's end, which aborts now and then ("terminate called without an active
exception"). So such a process skips that end: there is nothing left to do in it.
"""

import atexit
import os
import sys
from typing import NoReturn

_grouped = False


def grouped() -> None:
    """This process has joined a group."""
    global _grouped
    _grouped = True


def end(status: int) -> NoReturn:
    """End this process, which has nothing more to do, with an exit status."""
    if _grouped:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    sys.exit(status)
