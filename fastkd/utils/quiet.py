"""Silence around libraries that log, warn and print while they are imported and while they export."""

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

_KEPT = 2000  # characters of what was said that an error takes along


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While it lasts, no warning, no log record and nothing that is printed or written to standard error, also by C++,
    reaches the user. The root logger has its handlers and level again at the end, which some imports change.

    If it ends with an error, the end of what was written is added to it as a note.
    """
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, logging.root.manager.disable
    printed = io.StringIO()
    with tempfile.TemporaryFile() as written, warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(printed))
        before = _descriptor(written.fileno())
        logging.disable(logging.CRITICAL)
        try:
            yield
        except Exception as error:
            written.seek(0)
            said = printed.getvalue() + written.read().decode(errors="replace")
            if said.strip():
                error.add_note(said.strip()[-_KEPT:])
            raise
        finally:
            logging.disable(disabled)
            root.handlers[:] = handlers
            root.setLevel(level)
            if before is not None:
                os.dup2(before, 2)
                os.close(before)


def _descriptor(target: int) -> int | None:
    """Send file descriptor 2 to another one. Returns a copy of what it was, or None if it is closed."""
    if sys.__stderr__ is not None:
        with contextlib.suppress(ValueError, OSError):  # closed: then nothing can be seen of it
            sys.__stderr__.flush()
    try:
        before = os.dup(2)
    except OSError:
        return None
    os.dup2(target, 2)
    return before
