"""A cache on an fsspec file system, which is only read."""

import urllib.parse
from collections.abc import Iterator
from typing import Any

from ..credentials import redact
from .base import Entry, Names, Store
from .local import LocalStore


class FsspecStore(Store):
    """Objects on an fsspec file system, below the folder `root`. Pickles and forks as well as the file system does.

    It is only read: `pipe_file(mode="create")` looks and then writes, or ignores the mode. Write to object stores by
    their URL (s3://, gs://, az://). For fsspec's local file system, which follows links out of a cache, the result is a
    LocalStore.
    """

    readonly_reason = "an fsspec file system does not create exclusively"

    def __new__(cls, fs: Any, root: str) -> Any:
        # by class and not by protocol, which others may register for themselves
        if f"{type(fs).__module__}.{type(fs).__qualname__}" == "fsspec.implementations.local.LocalFileSystem":
            return LocalStore(fs._strip_protocol(str(root)))
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[Any, str]:
        return self._fs, self._root

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = str(fs._strip_protocol(str(root))).rstrip("/")
        self._http = "http" in fs.protocol

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

    def _path(self, key: str) -> str:
        if self._http:
            key = urllib.parse.quote(key)
        return f"{self._root}/{key}" if self._root else key
