"""A cache in this process's memory, for tests and for trying things out."""

import threading
from collections.abc import Iterator

from ..errors import NotFound, StoreError
from .base import (
    BaseStore,
    Entry,
    check_key,
    check_length,
    check_prefix,
    flat,
)


class MemoryStore(BaseStore):
    """Objects in a dict. It lives as long as something refers to it; other processes do not see it."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        raise StoreError(f"{self.describe()}: a store in memory is not sent to other processes. Use a folder.")

    def describe(self) -> str:
        return f"memory://{self._name}"

    def get(self, key: str) -> bytes:
        check_key(self, key)
        try:
            return self._objects[key]
        except KeyError:
            raise NotFound(f"{self.describe()}: there is no object {key!r}.") from None

    def get_tail(self, key: str, length: int) -> bytes:
        check_length(length)
        return self.get(key)[-length:]

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(self, prefix)
        with self._lock:
            found = [Entry(key, len(data)) for key, data in self._objects.items() if key.startswith(prefix)]
        return iter(found)

    def create(self, key: str, data: bytes | memoryview) -> bool:
        check_key(self, key)
        copy = bytes(flat(data))
        with self._lock:
            if key in self._objects:
                return False
            self._objects[key] = copy
            return True


_named: dict[str, MemoryStore] = {}
_named_lock = threading.Lock()


def named(name: str) -> MemoryStore:
    """This process's store of that name, made when it is first asked for."""
    with _named_lock:
        return _named.setdefault(name, MemoryStore(name))
