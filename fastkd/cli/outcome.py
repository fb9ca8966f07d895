"""What commands return, and what they share."""

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from ..cache.errors import CacheError, StoreError

if TYPE_CHECKING:
    from ..cache.stores import Store


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


def at_terminal() -> bool:
    """Whether a person may look at progress bars."""
    return sys.stderr.isatty()
