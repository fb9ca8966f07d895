"""Progress over shards, for a person who waits: tqdm's bar, or what the caller shows."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
Shown = bool | Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Whether a bar is shown on stderr; or a function that yields the shards it is given, and shows how many of so many it
has yielded. Its arguments are the shards, their number, and what is done with them, such as "verify"."""


def shown(shards: Iterable[T], total: int, what: str, progress: Shown) -> Iterable[T]:
    """The shards, with progress."""
    if callable(progress):
        return progress(shards, total, what)
    bar: Iterable[T] = tqdm(shards, total=total, unit="shard", disable=not progress, desc=what, leave=False)
    return bar
