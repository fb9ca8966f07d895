"""Import fastkd from a checkout on a machine that has torch, triton, numpy and pytest alone, and no fastkd installed.

    runpy.run_path("bench/bare.py")["use_checkout"]()

Imports the standard library alone. `fastkd.kernels` and what measures it work so; what reads or writes caches does not.
"""

import ast
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def use_checkout() -> None:
    """Make `fastkd` and its packages importable from the checkout, if they are not installed; without lazy_loader, too.

    Where fastkd is installed, the installed one is used and nothing changes.
    """
    if not is_installed("lazy_loader"):
        sys.modules["lazy_loader"] = lazy_loader()
    if not is_installed("fastkd"):
        sys.path.insert(0, str(ROOT))
    if not is_installed("fastkd.kernels"):
        import fastkd

        fastkd.__path__.append(str(ROOT))  # kernels/, cache/ and bench/ lie there


def is_installed(name: str) -> bool:
    """Whether a module can be found."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def lazy_loader() -> ModuleType:
    """What `fastkd` and `fastkd.kernels` use of the package lazy_loader."""
    module = ModuleType("lazy_loader")
    vars(module).update(attach=attach, attach_stub=attach_stub)
    return module


def attach(
    package: str, submodules: Iterable[str] = (), submod_attrs: Mapping[str, Iterable[str]] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names are imported on first use."""
    modules = {name: module for module, names in (submod_attrs or {}).items() for name in names}
    every = sorted({*submodules, *modules})

    def get(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        if name in every:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"No {package} attribute {name}")

    return get, lambda: every, every


def attach_stub(package: str, path: str) -> Any:
    """`attach` of what the stub beside `path` imports by `from .module import name as name`."""
    body = ast.parse(Path(path).with_suffix(".pyi").read_text()).body
    names: dict[str, list[str]] = {}
    for x in body:
        if isinstance(x, ast.ImportFrom) and x.module:
            names.setdefault(x.module, []).extend(alias.name for alias in x.names)
    return attach(package, (), names)
