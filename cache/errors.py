"""What the cache raises."""


class CacheError(Exception):
    """Something about a cache that a person has to know: what it is, what was found, and what to do next."""


class CorruptShard(CacheError):
    """A shard whose bytes are not the bytes that were committed."""


class StoreError(CacheError):
    """A store that would not do what it was asked: the store, the object, the operation, and its own words."""


class ReadOnly(StoreError):
    """A store that cannot create an object only if it is absent, or that must not be written."""


class NotFound(StoreError):
    """An object (or a whole store) that is not there."""
