"""A cache on an fsspec file system."""

import inspect
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any, NoReturn

from ..credentials import redact
from ..errors import CacheError
from .base import BaseStore, Entry, Names, refuse
from .local import LocalStore
from .registry import register_store

# fsspec's memory file system looks first and writes then; all creations of this process take turns.
_memory_lock = threading.Lock()


class FsspecStore(BaseStore):
    """Objects on an fsspec file system, below the folder `root`.

    It can be written only where the installed version creates exclusively and whole: fsspec's own local file system
    (the result is then a LocalStore: fsspec itself shows partial files and follows links out of the cache), its memory
    file system (among the FsspecStores of this process), and s3fs where `pipe_file` knows the mode "create" (probed
    first, as in ObstoreStore). Everything else is read-only: fsspec's general `pipe_file(mode="create")` looks and then
    writes, and some file systems ignore the mode. Pickles and forks as well as the file system does.
    """

    def __new__(cls, fs: Any, root: str) -> Any:
        if _kind(fs) == "local":
            return LocalStore(_stripped(fs, root) or "/")
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[Any, str]:
        return self._fs, self._root

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = _stripped(fs, root)
        self._kind = _kind(fs)
        self._exclusive = self._kind != "s3fs"
        self._http = "http" in fs.protocol
        if not self._kind:
            self.readonly_reason = "this file system is not known to create exclusively"

    def describe(self) -> str:
        return f"fsspec {redact(self._fs.unstrip_protocol(self._root))}"

    def _read(self, key: str, length: int | None) -> bytes:
        return bytes(self._fs.cat_file(self._path(key), start=None if length is None else -length))

    def _size(self, key: str) -> int:
        return int(self._fs.size(self._path(key)))

    def _entries(self, folders: Names) -> Iterator[Entry]:
        if self._http:
            self._refuse_listing("/".join(folders))
        self._fs.invalidate_cache()  # an earlier listing would hide what others have committed since
        try:
            found = self._fs.find(self._path("/".join(folders)).rstrip("/"), detail=True)
        except FileNotFoundError:
            return  # nothing has been created in this folder yet
        for path, info in found.items():
            yield Entry(path.removeprefix(self._root).lstrip("/"), int(info["size"]))

    def _put(self, key: str, data: memoryview) -> bool:
        path = self._path(key)
        try:
            if self._kind == "memory":
                with _memory_lock:
                    self._fs.pipe_file(path, bytes(data), mode="create")
            else:
                # One conditional PUT: chunks at least as large as the object keep s3fs from a multipart upload.
                self._fs.pipe_file(path, bytes(data), mode="create", chunksize=len(data) + 1)
            return True
        except FileExistsError as error:
            if self._fs.isfile(path):
                return False
            refuse(self, "creation", key, error, "Yet nothing is there: other requests conflict. Try again later.")

    def _path(self, key: str) -> str:
        if self._http:
            key = urllib.parse.quote(key)
        return f"{self._root}/{key}" if self._root else key


@register_store("fsspec.spec.AbstractFileSystem")
def open_file_system(fs: Any, create: bool) -> NoReturn:
    """Raises CacheError: a file system alone does not name the cache's folder."""
    raise CacheError("A file system of fsspec needs the cache's folder as well: FsspecStore(fs, root).")


def _stripped(fs: Any, root: str) -> str:
    return str(fs._strip_protocol(str(root))).rstrip("/")


def _kind(fs: Any) -> str:
    """ "local", "memory" or "s3fs" where the file system is exactly one that creates exclusively; otherwise "".

    By class and not by protocol: others register themselves under "s3", and obstore's takes the mode and ignores it.
    """
    name = f"{type(fs).__module__}.{type(fs).__qualname__}"
    if name == "fsspec.implementations.local.LocalFileSystem":
        return "local"
    if name == "fsspec.implementations.memory.MemoryFileSystem":
        return "memory"
    if name == "s3fs.core.S3FileSystem" and "mode" in inspect.signature(fs._pipe_file).parameters:
        return "s3fs"
    return ""
