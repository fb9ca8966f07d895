"""Stores of a cache: immutable objects, each created whole and only if it is absent.

Belongs here: one file for each kind of store; `register_store` in it makes `open_store` find it.
Does not: what the objects hold.
"""

import pkgutil
from importlib import import_module

from .archive import ZipStore
from .base import BaseStore, Entry, Store, open_store, register_store
from .filesystems import FsspecStore
from .http import HttpStore
from .local import LocalStore
from .memory import MemoryStore
from .objects import ObstoreStore

__all__ = [
    "BaseStore", "Entry", "FsspecStore", "HttpStore", "LocalStore", "MemoryStore", "ObstoreStore", "Store", "ZipStore",
    "open_store", "register_store",
]  # fmt: skip

for _module in pkgutil.iter_modules(__path__):  # every file here is a kind of store
    import_module(f"{__name__}.{_module.name}")
