"""Caches of a teacher's targets: sharded, checksummed, resumable. NumPy, Zarr and Arrow; no torch. See FORMAT.md.

Belongs here: what lies on disk, and how it is written, read, checked and described.
Does not: models, teachers, the data that were captured, or anything that computes a loss.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .errors import CacheError as CacheError
    from .errors import CorruptShard as CorruptShard
    from .errors import NotFound as NotFound
    from .errors import ReadOnly as ReadOnly
    from .errors import StoreError as StoreError
    from .provenance import Provenance as Provenance
    from .reader import Cache as Cache
    from .reader import open_cache as open_cache
    from .spec import CODECS as CODECS
    from .spec import CacheSpec as CacheSpec
    from .spec import Codec as Codec
    from .stores import FsspecStore as FsspecStore
    from .stores import open_store as open_store
    from .stores import register_store as register_store
    from .verify import Problem as Problem
    from .verify import Report as Report
    from .verify import verify_cache as verify_cache
    from .workspace import Workspace as Workspace
    from .writer import CacheWriter as CacheWriter
    from .writer import Commit as Commit
    from .writer import create_cache as create_cache
    from .writer import open_writer as open_writer

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "errors": ["CacheError", "CorruptShard", "NotFound", "ReadOnly", "StoreError"],
        "provenance": ["Provenance"],
        "reader": ["Cache", "open_cache"],
        "spec": ["CODECS", "CacheSpec", "Codec"],
        "stores": ["FsspecStore", "open_store", "register_store"],
        "verify": ["Problem", "Report", "verify_cache"],
        "workspace": ["Workspace"],
        "writer": ["CacheWriter", "Commit", "create_cache", "open_writer"],
    },
)
