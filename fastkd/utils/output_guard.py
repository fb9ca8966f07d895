"""Refuses to write into a folder or store that has other files. Imports nothing heavy."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from ..cache.errors import CacheError
from ..errors import ReportError, TrainError

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
    """CacheError for a store that is neither empty nor a cache."""
    _check((entry.key.partition("/")[0] for entry in store.list("")), "cache", store.describe())


def check_folder(folder: Path, kind: str) -> None:
    """Raise the error of a kind of output for a folder that is neither empty nor of that kind."""
    if folder.is_dir():
        inner = (f"{path.parent.name}/{path.name}" for path in folder.glob("*/seed=*"))
        names = sorted(path.name for path in folder.iterdir())
        if kind == "run" and "run.json" not in names and (control := folder / CONTROL).is_dir():
            # which is trained first with stop_if_worse: of a student, or of each of several
            each = [path for path in control.iterdir() if any((path / name).exists() for name in _KINDS[kind][0])]
            for run in each or [control]:
                check_folder(run, kind)
            names.remove(CONTROL)
        _check([*inner, *names], kind, str(folder))


def _check(names: Iterable[str], kind: str, where: str) -> None:
    known, error = _KINDS[kind]
    first = None
    for name in names:  # stops at the first known name: a store may list millions
        if any(fnmatch(name, pattern) for pattern in known):
            return
        if first is None and "/" not in name and not any(fnmatch(name, pattern) for pattern in _ANYWHERE):
            first = name
    if first is not None:
        raise error(f"{where}: got {first!r}; expected an empty folder, a new one, or that of a {kind}.")
