"""What commands return, and what they share."""

import os
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeVar, cast

from ..cache.errors import CacheError, StoreError
from ..utils.secrets import masked
from ..utils.text import printable, shortened

if TYPE_CHECKING:
    from ..cache.stores import Store

T = TypeVar("T")


class Outcome(NamedTuple):
    """Result of a command: a JSON report, text for stdout, the exit status, and a warning for stderr."""

    report: dict[str, Any]
    text: str
    status: int = 0
    warning: str = ""


class NoStore(CacheError):
    """The argument does not name a cache store."""


def store_of(place: str) -> "Store":
    """The store of a cache. NoStore if the argument does not name one."""
    from ..cache import open_store

    try:
        return open_store(place)
    except StoreError:
        raise
    except CacheError as error:
        raise NoStore(str(error)) from error


def settings_of(kind: type[T], command: Any) -> T:
    """The settings of a kind, a dataclass, among the fields of a command."""
    return kind(**{one.name: getattr(command, one.name) for one in fields(cast(Any, kind))})


def at_terminal() -> bool:
    """Whether a person may look at progress bars."""
    return sys.stderr.isatty()


def shows_progress(*, json: bool) -> bool:
    """Whether progress is shown on stderr: bars on a terminal; elsewhere lines, unless the output is JSON."""
    return at_terminal() or not json


def say(text: str, stream: TextIO | None = None, *, keep: str = "\n\t") -> None:
    """Print text without credentials and control characters, but for those to keep. Characters that the stream cannot
    encode are escaped, and the middle of long words on stderr is left out; a closed pipe or a full disk is ignored."""
    stream, text = stream or sys.stdout, printable(masked(text), keep=keep)
    if stream is sys.stderr:
        text = shortened(text, len(text))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        discard(stream)


def discard(stream: TextIO) -> None:
    """Send what is printed to a stream nowhere from now on, if it cannot be written."""
    try:
        stream.flush()
    except OSError:
        # otherwise Python's flush at exit would raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
