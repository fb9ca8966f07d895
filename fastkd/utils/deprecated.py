"""Settings and functions of earlier versions: what still works warns, and what was removed says what to do instead."""

import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

# Documented modules that have moved: the new module, and renamed names. None: a package of such modules.
_MOVED: Mapping[str, tuple[str, Mapping[str, str]] | None] = {
    "fastkd.student": None,
    "fastkd.student.evaluate": ("fastkd.evaluate", {}),
    "fastkd.teacher": None,
    "fastkd.teacher.protocol": ("fastkd.teachers", {"Head": "LMHead"}),
}


class MovedModules(MetaPathFinder, Loader):
    """Imports documented modules from their former places, with a DeprecationWarning."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=_MOVED[fullname] is None) if fullname in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        if (moved := _MOVED[module.__name__]) is not None:
            place, renames = moved
            warnings.warn(f"{module.__name__} has moved: import from {place}.", DeprecationWarning, stacklevel=2)
            module.__getattr__ = lambda name: getattr(import_module(place), renames.get(name, name))  # type: ignore[method-assign]


def find_moved_modules() -> None:
    """Make modules that have moved importable from their former places."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())


def deprecated_decode(value: str, error: type[Exception], *, stacklevel: int) -> None:
    """The setting `decode`, which chose where targets are decoded: warn for "host", raise `error` for anything else.

    stacklevel: 1 warns at the line that calls this function, 2 at its caller's, and so on.
    """
    if value != "host":
        raise error(f"decode: got {value!r}; expected no value. Targets are always decoded on the host now.")
    warnings.warn(
        "decode: targets are always decoded on the host now; leave this setting out.",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


def renamed(old: str, new: str, value: T, *, stacklevel: int) -> T:
    """The value of an argument given by its old name, with a warning. stacklevel: as for `deprecated_decode`."""
    warnings.warn(f"{old}: this argument is now named {new}.", DeprecationWarning, stacklevel=stacklevel + 1)
    return value
