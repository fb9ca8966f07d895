"""A place for caches: whether it can be reached, read and written, and whether creations exclude each other."""

from pathlib import Path

from ..cache import open_store
from ..cache.errors import CacheError
from .machine import check_disk
from .result import Found


def check_place(place: str) -> Found:
    """place: a folder, or a URL. In an object store a probe of a few bytes is left, as before the first shard."""
    if "://" not in place:
        return check_disk(Path(place))._replace(name="store")
    try:
        store = open_store(place)
        name = store.describe()
        if store.readonly:
            return Found("store", "note", f"{name}: {store.readonly_reason}; caches can only be read from there")
        next(iter(store.list("")), None)
        store.prove_exclusive()
    except CacheError as error:
        return Found("store", "problem", str(error))
    return Found("store", "ok", f"{name}: lists, creates, and refuses to create twice")
