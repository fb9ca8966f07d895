"""module:factory names: whether a string is one, and what it returns."""

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from ..cache.errors import said

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_factory(name: str) -> bool:
    """Whether a name is module:factory, and no file."""
    return bool(_FACTORY.fullmatch(name)) and not Path(name).exists()


def check_factory(name: str, error: type[Exception]) -> None:
    """Raise `error` if the module of module:factory is not found. Imports none but its packages."""
    module = name.partition(":")[0]
    _look_here()
    try:
        there = module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        there = False
    if not there:
        raise error(
            f"{name}: No module named {module!r}. Expected a module that can be imported from here, and a function in "
            "it."
        )


def made_by(name: str, error: type[Exception]) -> Any:
    """What module:factory returns. Modules are looked for where this was started, too. Raises `error`."""
    module, _, function = name.partition(":")
    _look_here()
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as problem:
        raise error(
            f"{name}: {said(problem)}. Expected a module that can be imported from here, and a function in it."
        ) from problem
    try:
        return factory()
    except Exception as problem:
        how = ". It is called without arguments." if isinstance(problem, TypeError) else ""
        raise error(f"{name}: the function raised {type(problem).__name__}: {said(problem)}{how}") from problem


def module_file(name: str) -> Path | None:
    """The source file of the module in module:factory; None if it is not found. Imports none but its packages."""
    _look_here()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and os.path.isfile(spec.origin) else None


def _look_here() -> None:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
