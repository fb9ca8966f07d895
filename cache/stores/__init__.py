"""Stores of a cache: immutable objects, each created whole and only if it is absent.

Belongs here: one file for each kind of store; `register_store` in it makes `open_store` find it.
Does not: what the objects hold.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .archive import ZipStore as ZipStore
    from .base import BaseStore as BaseStore
    from .base import Entry as Entry
    from .base import Store as Store
    from .filesystems import FsspecStore as FsspecStore
    from .http import HttpStore as HttpStore
    from .local import LocalStore as LocalStore
    from .memory import MemoryStore as MemoryStore
    from .objects import ObstoreStore as ObstoreStore
    from .registry import open_store as open_store
    from .registry import register_store as register_store

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "archive": ["ZipStore"],
        "base": ["BaseStore", "Entry", "Store"],
        "filesystems": ["FsspecStore"],
        "http": ["HttpStore"],
        "local": ["LocalStore"],
        "memory": ["MemoryStore"],
        "objects": ["ObstoreStore"],
        "registry": ["open_store", "register_store"],
    },
)
