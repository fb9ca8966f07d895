"""Rooms named after the function that users call: `fastkd.train` is a package, and `fastkd.train(...)` trains.

Importing a submodule binds it as an attribute of its parent, over any function of that name. So the package itself is
callable, whichever is imported first.
"""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package that forwards a call to the function of its own name in its `api` module."""

    @property
    def _function(self) -> Any:
        return getattr(import_module(f"{self.__name__}.api"), self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        """The function's docstring: what `help` of the package shows first."""
        return inspect.getdoc(self._function)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)


def make_callable(name: str) -> None:
    """Make the package of this name callable. Call it in the package's `__init__`."""
    sys.modules[name].__class__ = CallablePackage
