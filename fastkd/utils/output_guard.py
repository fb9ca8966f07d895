"""Refuses to write into a folder or store that has other files, or cannot be written. Imports nothing heavy."""

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from ..cache.errors import CacheError
from ..errors import ReportError, TrainError
from .atomic import check_place

if TYPE_CHECKING:
    from ..cache.stores import Store

# For each kind of output, the names that it writes first, and keeps; and the error.
_KINDS: dict[str, tuple[tuple[str, ...], type[Exception]]] = {
    "cache": (("spec.json", "plan.json", "lengths.npz", "manifest.parquet", "shards", "claims"), CacheError),
    "run": (("run.json", "metrics.jsonl", "checkpoints"), TrainError),
    "sweep": (("sweep.json", "auto.json", "*/seed=*"), TrainError),
    "generations": (("generations.json", "generation-1"), TrainError),
    "demo": (("teacher", "cache", "report.json"), ReportError),
}
CONTROL = "control"
_ANYWHERE = (".*", "*.log", "*.out", "*.err")  # logs of a scheduler may be in the same folder


def check_store(store: "Store") -> None:
    """CacheError for a store that is neither empty nor a cache, and for an empty one that cannot be written."""
    names = (entry.key.partition("/")[0] for entry in store.list(""))
    if not _check(names, "cache", store.describe()) and store.readonly:
        raise CacheError(
            f"{store.describe()}: got a place that cannot be written; expected one that can. Check its permissions, or "
            "choose another."
        )


def check_folder(folder: Path, kind: str) -> None:
    """Raise the error of a kind of output for a folder that is neither empty nor of that kind, or cannot be written."""
    error = _KINDS[kind][1]
    if os.path.lexists(folder) and not folder.is_dir():
        raise error(f"out: got {folder}, which is a file; expected a folder.")
    check_place(folder, "out", error)
    if folder.is_dir():
        inner = (f"{path.parent.name}/{path.name}" for path in folder.glob("*/seed=*"))
        paths = sorted(folder.iterdir())
        if kind == "sweep":  # an arm's folder is made before that of its first training, which may have failed
            paths = [path for path in paths if not ("=" in path.name and path.is_dir() and not any(path.iterdir()))]
        names = [path.name for path in paths]
        if kind == "run" and "run.json" not in names and (control := folder / CONTROL).is_dir():
            # which is trained first with stop_if_worse: of a student, or of each of several
            each = [path for path in control.iterdir() if any((path / name).exists() for name in _KINDS[kind][0])]
            for run in each or [control]:
                check_folder(run, kind)
            names.remove(CONTROL)
        _check([*inner, *names], kind, str(folder))


def check_file(path: Path, name: str, error: type[Exception]) -> None:
    """Raise `error` if a file cannot be written: it is a folder, or has no place. name: of the setting."""
    if path.is_dir():
        raise error(f"{name}: got {path}, which is a folder; expected the name of a file.")
    if path.exists() and not os.access(path, os.W_OK):
        raise error(f"{name}: got {path}, which is not writable; expected a file that is.")
    if path.is_file() or not path.exists():  # not a pipe or a device
        check_place(path, name, error)


def _check(names: Iterable[str], kind: str, where: str) -> bool:
    """Whether one of the names is known. Raises the error of the kind if there are only others."""
    known, error = _KINDS[kind]
    first = None
    for name in names:  # stops at the first known name: a store may list millions
        if any(fnmatch(name, pattern) for pattern in known):
            return True
        if first is None and "/" not in name and not any(fnmatch(name, pattern) for pattern in _ANYWHERE):
            first = name
    if first is not None:
        raise error(f"{where}: got {first!r}; expected an empty folder, a new one, or that of a {kind}.")
    return False
