"""fastkd.cache: what a teacher said, kept in shards that cannot be damaged without its being noticed. No torch.

The format is in FORMAT.md. Names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import CacheError, CorruptShard, NotFound, ReadOnly, StoreError
    from .reader import Cache, open_cache
    from .spec import CODECS, CacheSpec, Codec
    from .stores import FsspecStore, open_store
    from .verify import Problem, Report, verify_cache
    from .workspace import Workspace
    from .writer import CacheWriter, Commit, create_cache, open_writer

_HOME = {
    "CODECS": "spec",
    "Cache": "reader",
    "CacheError": "errors",
    "CacheSpec": "spec",
    "CacheWriter": "writer",
    "Codec": "spec",
    "Commit": "writer",
    "CorruptShard": "errors",
    "FsspecStore": "stores",
    "NotFound": "errors",
    "Problem": "verify",
    "ReadOnly": "errors",
    "Report": "verify",
    "Workspace": "workspace",
    "StoreError": "errors",
    "create_cache": "writer",
    "open_cache": "reader",
    "open_store": "stores",
    "open_writer": "writer",
    "verify_cache": "verify",
}

__all__ = [
    "CODECS",
    "Cache",
    "CacheError",
    "CacheSpec",
    "CacheWriter",
    "Codec",
    "Commit",
    "CorruptShard",
    "FsspecStore",
    "NotFound",
    "Problem",
    "ReadOnly",
    "Report",
    "StoreError",
    "Workspace",
    "create_cache",
    "open_cache",
    "open_store",
    "open_writer",
    "verify_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastkd.cache' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
