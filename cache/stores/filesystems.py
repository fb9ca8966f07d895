"""A cache on an fsspec file system."""

import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

from ..credentials import redact
from .base import Entry, Names, Store
from .local import LocalStore

_memory_lock = threading.Lock()  # fsspec's memory file system looks first and writes then


class FsspecStore(Store):
    """Objects on an fsspec file system, below the folder `root`.

    It can be written on fsspec's own local file system (the result is then a LocalStore: fsspec itself shows partial
    files and follows links out of the cache) and memory file system (among the FsspecStores of this process). Every
    other one is read-only: `pipe_file(mode="create")` looks and then writes, or ignores the mode. Write to object
    stores by their URL (s3://, gs://, az://). Pickles and forks as well as the file system does.
    """

    def __new__(cls, fs: Any, root: str) -> Any:
        # by class and not by protocol, which others may register for themselves
        if _class_name(fs) == "fsspec.implementations.local.LocalFileSystem":
            return LocalStore(_stripped(fs, root) or "/")
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[Any, str]:
        return self._fs, self._root

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = _stripped(fs, root)
        self._http = "http" in fs.protocol
        if _class_name(fs) != "fsspec.implementations.memory.MemoryFileSystem":
            self.readonly_reason = "this file system is not known to create exclusively"

    def describe(self) -> str:
        return f"fsspec {redact(self._fs.unstrip_protocol(self._root))}"

    def _read(self, key: str, length: int | None) -> bytes:
        return bytes(self._fs.cat_file(self._path(key), start=None if length is None else -length))

    def _size(self, key: str) -> int:
        return int(self._fs.size(self._path(key)))

    def _entries(self, folders: Names) -> Iterator[Entry]:
        if self._http:
            self._refuse_listing(folders)
        self._fs.invalidate_cache()  # an earlier listing would hide what others have committed since
        try:
            found = self._fs.find(self._path("/".join(folders)).rstrip("/"), detail=True)
        except FileNotFoundError:
            return  # nothing has been created in this folder yet
        for path, info in found.items():
            yield Entry(path.removeprefix(self._root).lstrip("/"), int(info["size"]))

    def _put(self, key: str, data: memoryview) -> bool:
        try:
            with _memory_lock:
                self._fs.pipe_file(self._path(key), bytes(data), mode="create")
            return True
        except FileExistsError:
            return False

    def _path(self, key: str) -> str:
        if self._http:
            key = urllib.parse.quote(key)
        return f"{self._root}/{key}" if self._root else key


def _stripped(fs: Any, root: str) -> str:
    return str(fs._strip_protocol(str(root))).rstrip("/")


def _class_name(fs: Any) -> str:
    return f"{type(fs).__module__}.{type(fs).__qualname__}"
