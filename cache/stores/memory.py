"""A cache in the memory of this process, for tests and experiments."""

import threading
from collections.abc import Iterator

from ..errors import StoreError
from .base import Entry, Names, Store, register_store


class MemoryStore(Store):
    """Objects in a dict. It lives as long as something refers to it; other processes do not see it."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        raise StoreError(f"{self.describe()}: a store in memory cannot be sent to other processes. Use a folder.")

    def describe(self) -> str:
        return f"memory://{self._name}"

    def _read(self, key: str, length: int | None) -> bytes:
        if key not in self._objects:
            raise FileNotFoundError("there is no such object")
        return self._objects[key][-(length or 0) :]

    def _entries(self, folders: Names) -> Iterator[Entry]:
        return (Entry(key, len(data)) for key, data in self._objects.copy().items())

    def _put(self, key: str, data: memoryview) -> bool:
        copy = bytes(data)
        with self._lock:
            if key in self._objects:
                return False
            self._objects[key] = copy
            return True

    def _remove(self, key: str) -> bool:
        with self._lock:
            return self._objects.pop(key, None) is not None


_named: dict[str, MemoryStore] = {}  # this process's stores by URL, each created on first use
register_store("memory://")(lambda url, create: _named.setdefault(url, MemoryStore(url.partition("://")[2])))
