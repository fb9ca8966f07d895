"""Refuses to write into a folder or store that has other files. Imports nothing heavy."""

from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from ..cache.errors import CacheError
from ..errors import ReportError, TrainError

if TYPE_CHECKING:
    from ..cache.stores import Store

# Names that each kind of output writes first, and keeps.
CACHE = ("spec.json", "plan.json", "lengths.npz", "manifest.parquet", "shards", "claims")
RUN = ("run.json", "metrics.jsonl", "checkpoints")
SWEEP = ("sweep.json", "*/seed=*")
DEMO = ("teacher", "cache", "report.json")
_ANYWHERE = (".*", "*.log", "*.out", "*.err")  # logs of a scheduler may be in the same folder


def check_cache_place(store: "Store") -> None:
    """CacheError for a store that is neither empty nor a cache."""
    names = (entry.key.partition("/")[0] for entry in store.list(""))
    if other := _other(names, CACHE):
        raise CacheError(_refusal(store.describe(), other, "cache"))


def check_run_place(folder: Path) -> None:
    """TrainError for a folder that is neither empty nor a run."""
    if other := _other(_names(folder), RUN):
        raise TrainError(_refusal(str(folder), other, "run"))


def check_sweep_place(folder: Path) -> None:
    """TrainError for a folder that is neither empty nor a sweep."""
    inner = (f"{path.parent.name}/{path.name}" for path in folder.glob("*/seed=*"))
    if other := _other([*inner, *_names(folder)], SWEEP):
        raise TrainError(_refusal(str(folder), other, "sweep"))


def check_demo_place(folder: Path) -> None:
    """ReportError for a folder that is neither empty nor a demo."""
    if other := _other(_names(folder), DEMO):
        raise ReportError(_refusal(str(folder), other, "demo"))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _other(names: Iterable[str], known: Collection[str]) -> str | None:
    """The first name, if none of the names is known; None if one is, or there are none."""
    first = None
    for name in names:  # stops at the first known name: a store may list millions
        if any(fnmatch(name, pattern) for pattern in known):
            return None
        if first is None and not any(fnmatch(name, pattern) for pattern in _ANYWHERE):
            first = name
    return first


def _refusal(where: str, found: str, what: str) -> str:
    return f"{where}: got {found!r}; expected an empty folder, a new one, or that of a {what}."
