"""Where a cache lies: immutable objects by key, each created whole and only if it is absent."""

import os
import urllib.parse
import urllib.request
from typing import Any

from ..errors import CacheError, NotFound
from .base import Entry, Store, clean, refuse
from .filesystems import FsspecStore
from .local import LocalStore, make_folder
from .memory import MemoryStore, named
from .readonly import HttpStore, ZipStore

__all__ = ["Entry", "FsspecStore", "HttpStore", "LocalStore", "MemoryStore", "Store", "ZipStore", "open_store"]

TAKEN = (
    "What is taken: a local folder, a .zip file, s3://, gs://, az://, http(s)://, file:// or memory:// URLs, an "
    "obstore store, FsspecStore(fs, root), or any object with the methods of fastkd.cache.stores.Store"
)
OBSTORE = ("S3Store", "GCSStore", "AzureStore", "MemoryStore", "HTTPStore", "LocalStore")


def open_store(path_or_store: object, *, create: bool = False) -> Store:
    """The store that a path, a URL or an object of another library names; a Store itself is returned as it is.

    A local path is a folder (made, with `create`) or, ending in .zip, a file that is read. s3://, gs:// and az:// take
    their credentials from the environment and need obstore. http(s):// is read only, memory://name lives in this
    process. Nothing but the folder is made: a bucket has to exist.

    Raises NotFound if a local folder is not there, StoreError if it cannot be made, CacheError for anything else.
    """
    if isinstance(path_or_store, bytes):
        path_or_store = os.fsdecode(path_or_store)
    if isinstance(path_or_store, os.PathLike):
        return _open_path(os.fsdecode(path_or_store), create)
    if isinstance(path_or_store, str):
        return _open_url(path_or_store, create) if "://" in path_or_store else _open_path(path_or_store, create)
    if isinstance(path_or_store, Store):
        return path_or_store
    if hasattr(path_or_store, "_strip_protocol"):
        raise CacheError("A file system of fsspec needs the cache's folder as well: FsspecStore(fs, root).")
    # By name, so that obstore is not imported for those who do not use it.
    for base in type(path_or_store).__mro__:
        if base.__module__ == "obstore.store" and base.__name__ in OBSTORE:
            return _open_obstore(path_or_store, base.__name__, create)
    raise CacheError(f"A {type(path_or_store).__name__} names no store. {TAKEN}.")


def _open_url(url: str, create: bool) -> Store:
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return HttpStore(url)
    if scheme == "memory":
        return named(url.partition("://")[2])
    if scheme == "file":
        parts = urllib.parse.urlsplit(url)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise CacheError(f"{clean(url)!r} names no folder of this machine. Give its path, or file:///path.")
        return _open_path(urllib.request.url2pathname(parts.path), create)
    if scheme in ("s3", "gs", "az"):
        store: Store = _objects().open_url(url)
        return store
    raise CacheError(f"{clean(url)!r}: the scheme {scheme!r} is not known. {TAKEN}.")


def _open_path(path: str, create: bool) -> Store:
    if not path or "\0" in path:
        raise CacheError(f"{path!r} is no path. {TAKEN}.")
    if path.endswith(".zip") and not os.path.isdir(path):
        if create and not os.path.exists(path):
            raise CacheError(f"{path}: a zip file is only read. Write the cache to a folder, and zip its content.")
        return ZipStore(path)
    try:
        if create:
            make_folder(path)
        elif not os.path.isdir(path):
            what = "a file, not a folder" if os.path.exists(path) else "not there"
            raise NotFound(f"{path}: {what}. A cache is a folder; `fastkd capture`, or `create_cache`, makes one.")
    except OSError as error:
        refuse(LocalStore(path), "opening", "", error, "The folder cannot be made; check the path and its owner.")
    return LocalStore(path)


def _open_obstore(store: Any, kind: str, create: bool) -> Store:
    if kind == "LocalStore":
        # obstore links its files into place, but does not sync them: a power cut could leave a committed, empty object.
        if store.prefix is None:
            raise CacheError("An obstore LocalStore without a prefix is the whole disk. Give the cache's folder.")
        return _open_path(os.fspath(store.prefix), create)
    opened: Store = _objects().ObstoreStore(store)
    return opened


def _objects() -> Any:
    """The module of object stores. Raises CacheError where obstore is not installed."""
    try:
        from . import objects
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise CacheError("Object stores need obstore: pip install 'fastkd[cloud]'.") from error
    return objects
