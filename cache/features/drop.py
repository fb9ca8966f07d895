"""Removing a feature: the only objects of a cache that are ever deleted."""

from typing import Any

from ..errors import CacheError, NotFound, ReadOnly
from ..stores import open_store
from .objects import SPEC
from .spec import folder_of


def drop_feature(path_or_store: Any, name: str) -> int:
    """Delete a feature of a cache, its spec first; how many objects were deleted.

    From the moment that the spec is gone there is no such feature. If this is interrupted, the rest is unused, and the
    same call deletes it. A process that writes the feature at this time fails, and may leave a shard behind.

    Raises CacheError if there is nothing of this name, ReadOnly if the store cannot delete.
    """
    store, folder = open_store(path_or_store), folder_of(name)
    delete = getattr(store, "delete", None)
    if delete is None or store.readonly:
        raise ReadOnly(f"{store.describe()}: feature {name} cannot be dropped: this store deletes nothing.")
    deleted = int(delete(f"{folder}{SPEC}"))
    try:
        keys = sorted(entry.key for entry in store.list(folder))
    except NotFound:
        keys = []
    deleted += sum(int(delete(key)) for key in keys)
    if not deleted:
        raise CacheError(f"{store.describe()}: there is no feature {name}. `fastkd features CACHE` lists them.")
    return deleted
