"""Progress of a loop over shards: a tqdm bar, or the caller's own display."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
Shown = bool | Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Whether to show a progress bar on stderr; or a function that wraps the iterable of shards and displays progress, as
tqdm does. Its arguments: the shards, their total, and a description such as "verify"."""


def shown(shards: Iterable[T], total: int, what: str, progress: Shown) -> Iterable[T]:
    """Wrap an iterable of shards to display progress."""
    if callable(progress):
        return progress(shards, total, what)
    bar: Iterable[T] = tqdm(shards, total=total, unit="shard", disable=not progress, desc=what, leave=False)
    return bar
