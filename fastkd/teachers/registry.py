"""Kinds of teachers: which loader a name such as `vllm:model` or `http://host:8000` belongs to.

A new kind is one file that calls `register_teacher`: a module of this folder named after the kind, a package that
declares an entry point `KIND = "module:loader"` in the group `fastkd.teachers`, or any module imported beforehand.
A kind may also be the scheme of URLs, `SCHEME://`; then the module is the one in `_MODULES`.
"""

import re
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from ..errors import TeacherError
from ..settings import ModelSettings

Loader = Callable[[str, ModelSettings], Any]
"""loader(name, settings): from the text after `KIND:`, or a URL, to a `Teacher`, a torch module or a callable."""
Function = TypeVar("Function", bound=Loader)

_KIND = re.compile(r"[A-Za-z]\w*(?:://)?")
_MODULES = {"http://": "server", "https://": "server"}  # of kinds that are no module names
_loaders: dict[str, Loader] = {}


def register_teacher(kind: str) -> Callable[[Function], Function]:
    """A decorator that registers a loader: teachers named `KIND:NAME` are then loaded by `loader(NAME, settings)`, and
    those of a kind `SCHEME://` by `loader(URL, settings)`.

    settings: a `ModelSettings`; its device is set. Raises TeacherError for a kind that is not an identifier, or that
    is already taken by another function.
    """

    def register(loader: Function) -> Function:
        if not _KIND.fullmatch(kind):
            raise TeacherError(f"teacher kind: got {kind!r}; expected letters, digits and underscores.")
        if _loaders.setdefault(kind, loader) is not loader:
            raise TeacherError(f"teacher kind {kind!r}: already registered by {_loaders[kind].__module__}.")
        return loader

    return register


def find_loader(source: str) -> tuple[Loader, str] | None:
    """The loader of `KIND:NAME` and the name, or that of a URL and the URL; None for a path, or if the kind
    is not registered."""
    kind, colon, name = source.partition(":")
    if name.startswith("//"):
        kind, name = f"{kind}://", source
    if not colon or not _KIND.fullmatch(kind) or Path(source).exists():
        return None
    if kind not in _loaders:
        for entry in entry_points(group="fastkd.teachers", name=kind):
            _loaders[kind] = entry.load()
    module = f"{__package__}.{_MODULES.get(kind, kind)}"
    if kind not in _loaders and "/" not in module and find_spec(module) is not None:
        import_module(module)
    loader = _loaders.get(kind)
    return None if loader is None else (loader, name)
