"""The errors of a cache. Each message names the thing, the evidence, and the next step."""

from typing import Any


class CacheError(Exception):
    """A cache, an argument or a file of it is not as expected."""


class CorruptShard(CacheError):
    """The bytes of a shard are not the bytes that were committed."""


class StoreError(CacheError):
    """A request to a store failed: the store, the object, the operation, and the store's own message."""


class Refused(StoreError):
    """A request that fails again if it is repeated: it is not permitted, or the object is no file of a cache."""


class ReadOnly(Refused):
    """A store cannot be written, or cannot create an object only if it is absent."""


class NotFound(StoreError):
    """An object, or a whole store, does not exist."""


def expect(good: bool, name: str, got: Any, expected: str) -> None:
    """CacheError "name: got ...; expected ..." unless `good`."""
    if not good:
        raise CacheError(f"{name}: got {got!r}; expected {expected}.")


def type_name(value: object) -> str:
    """What a value is, for messages: its type, or None."""
    return "None" if value is None else type(value).__name__


def said(error: object) -> str:
    """What an error says, for the middle of another sentence: on one line, without a full stop at its end."""
    text = " ".join(str(error).split())
    return text if text.endswith("...") else text.rstrip(".")
