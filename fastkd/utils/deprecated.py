"""Documented modules of earlier versions, which can still be imported, with a warning."""

import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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
