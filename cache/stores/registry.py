"""From a path, a URL or a store of another library to a `Store`."""

import os
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from ..credentials import redact
from ..errors import CacheError
from .base import Store

Opener = Callable[[Any, bool], Store]

_openers: dict[str, Opener] = {}


def register_store(*names: str) -> Callable[[Opener], Opener]:
    """Decorator for `opener(place, create) -> Store`, which `open_store` then calls for places of these names.

    A name is the scheme of URLs ("s3://"), the suffix of files (".zip"), or the full name of another library's class
    ("obstore.store.S3Store"). create: whether a missing folder or bucket is to be made where the store can do so.
    Raises ValueError for a name that has an opener already.
    """

    def register(opener: Opener) -> Opener:
        for name in names:
            if _openers.setdefault(name, opener) is not opener:
                raise ValueError(f"register_store: {name!r} is registered already, for {_openers[name].__qualname__}.")
        return opener

    return register


def open_store(path_or_store: object, *, create: bool = False) -> Store:
    """The store at a path or URL, or around an object of another library; a Store is returned as it is.

    A local path is a folder (made, with `create`) or a .zip file (read only). s3://, gs:// and az:// take their
    credentials from the environment and need obstore. http(s):// is read only, memory://name lives in this process.
    Only local folders are created: a bucket must exist.

    Raises NotFound if a local folder does not exist, StoreError if it cannot be made, CacheError for anything else.
    """
    _load_kinds()
    place = path_or_store
    if isinstance(place, (bytes, os.PathLike)):
        place = os.fsdecode(place)
        return _open_path(place, create)
    if isinstance(place, str):
        return _open_url(place, create) if "://" in place else _open_path(place, create)
    if isinstance(place, Store):
        return place
    for base in type(place).__mro__:  # by name, so that no library is imported for it
        if opener := _openers.get(f"{base.__module__}.{base.__qualname__}"):
            return opener(place, create)
    raise CacheError(f"store: got {type(place).__name__}; {_expected()}")


@cache
def _load_kinds() -> None:
    """Import every module of this folder, so that its stores are registered."""
    for module in pkgutil.iter_modules(import_module(__package__).__path__):
        import_module(f"{__package__}.{module.name}")


def _open_url(url: str, create: bool) -> Store:
    scheme = url.partition("://")[0].lower() + "://"
    if scheme not in _openers:
        raise CacheError(f"store: got {redact(url)!r}, of the unknown scheme {scheme!r}; {_expected()}")
    return _openers[scheme](url, create)


def _open_path(path: str, create: bool) -> Store:
    if not path or "\0" in path:
        raise CacheError(f"store: got {path!r}, which is no path; {_expected()}")
    suffix = os.path.splitext(path)[1]
    if os.path.isdir(path) or not suffix.startswith("."):
        suffix = ""
    return _openers.get(suffix, _openers[""])(path, create)


def _expected() -> str:
    kinds = [name for name in sorted(_openers) if name.startswith(".") or name.endswith("://")]
    return (
        f"expected a local folder, {', '.join(kinds)}, an obstore store, FsspecStore(fs, root), or an object with the "
        "methods of fastkd.cache.stores.Store."
    )
