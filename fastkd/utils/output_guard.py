"""Whether a place may be written into: nothing is there, or what was begun there before. Imports nothing heavy."""

from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from ..cache.errors import CacheError
from ..errors import ReportError, TrainError

if TYPE_CHECKING:
    from ..cache.stores import Store

# What is among the first things that each of them writes, and stays.
CACHE = ("spec.json", "plan.json", "lengths.npz", "manifest.parquet", "shards", "claims")
RUN = ("run.json", "metrics.jsonl", "checkpoints")
SWEEP = ("sweep.json", "*/seed=*")
DEMO = ("teacher", "cache", "report.json")
_ANYWHERE = (".*", "*.log", "*.out", "*.err")  # where a scheduler's log is sent to may be the same folder


def check_cache_place(store: "Store") -> None:
    """CacheError where a store holds something, and nothing of a cache."""
    names = (entry.key.partition("/")[0] for entry in store.list(""))
    if other := _other(names, CACHE):
        raise CacheError(_refusal(store.describe(), other, "cache"))


def check_run_place(folder: Path) -> None:
    """TrainError where a folder holds something, and nothing of a run."""
    if other := _other(_names(folder), RUN):
        raise TrainError(_refusal(str(folder), other, "run"))


def check_sweep_place(folder: Path) -> None:
    """TrainError where a folder holds something, and nothing of a sweep."""
    inner = (f"{path.parent.name}/{path.name}" for path in folder.glob("*/seed=*"))
    if other := _other([*inner, *_names(folder)], SWEEP):
        raise TrainError(_refusal(str(folder), other, "sweep"))


def check_demo_place(folder: Path) -> None:
    """ReportError where a folder holds something, and nothing of a demo."""
    if other := _other(_names(folder), DEMO):
        raise ReportError(_refusal(str(folder), other, "demo"))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _other(names: Iterable[str], known: Collection[str]) -> str | None:
    """The first of the names, where there are some and none of them is known."""
    first = None
    for name in names:  # up to the first that is known: a store may list millions
        if any(fnmatch(name, pattern) for pattern in known):
            return None
        if first is None and not any(fnmatch(name, pattern) for pattern in _ANYWHERE):
            first = name
    return first


def _refusal(where: str, found: str, what: str) -> str:
    return f"{where}: got {found!r} there, and nothing of a {what}. Name a new folder, an empty one, or a {what}'s."
