"""A cache on an fsspec file system."""

import inspect
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any, NoReturn

from ..errors import NotFound, ReadOnly, StoreError
from .base import (
    ATTEMPTS,
    NO_LISTING,
    PROBE,
    PROBE_TEXT,
    BaseStore,
    Entry,
    Names,
    check_key,
    check_length,
    check_prefix,
    clean,
    flat,
    refuse,
)
from .local import LocalStore

NEXT_STEP = "Check the address, the credentials and the connection."
SEALED = "Read a sealed cache, or another kind of store."
# fsspec's memory file system looks first and writes then; all of this process's creations take turns.
_memory_lock = threading.Lock()


class FsspecStore(BaseStore):
    """Objects on an fsspec file system, below the folder `root`.

    Written to only where the installed version creates exclusively and whole: fsspec's own local file system
    (LocalStore does all of it: fsspec itself shows partial files and follows links out of the cache), its memory file
    system (among this process's FsspecStores), and s3fs where `pipe_file` knows the mode "create" (probed first, as in
    ObstoreStore). Everything else is read-only: fsspec's general `pipe_file(mode="create")` looks and then writes, and
    some file systems ignore the mode. Pickles and forks as well as the file system does.
    """

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = str(fs._strip_protocol(str(root))).rstrip("/")
        self._kind = _kind(fs)
        self._local = LocalStore(self._root or "/") if self._kind == "local" else None
        self._exclusive = self._kind != "s3fs"
        self._http = "http" in fs.protocol

    def describe(self) -> str:
        if self._local:
            return self._local.describe()
        return f"fsspec {clean(self._fs.unstrip_protocol(self._root))}"

    @property
    def readonly(self) -> bool:
        return self._local.readonly if self._local else not self._kind

    def get(self, key: str) -> bytes:
        check_key(self, key)
        if self._local:
            return self._local.get(key)
        try:
            return bytes(self._fs.cat_file(self._path(key)))
        except Exception as error:
            self._refuse_reading(key, error)

    def get_tail(self, key: str, length: int) -> bytes:
        """The last bytes; how many requests that takes is the file system's affair."""
        check_length(length)
        check_key(self, key)
        if self._local:
            return self._local.get_tail(key, length)
        try:
            return bytes(self._fs.cat_file(self._path(key), start=-length))
        except Exception as error:
            # An empty object has no last byte, and a server may say so with an error.
            if not isinstance(error, FileNotFoundError) and self._is_empty(key):
                return b""
            self._refuse_reading(key, error)

    def list(self, prefix: str) -> Iterator[Entry]:
        folders = check_prefix(self, prefix)
        if self._local:
            return self._local.list(prefix)
        if self._http:
            raise StoreError(NO_LISTING.format(store=self.describe(), prefix=prefix))
        return self._entries("/".join(folders), prefix)

    def create(self, key: str, data: bytes | memoryview) -> bool:
        check_key(self, key)
        if self._local:
            return self._local.create(key, data)
        if not self._kind:
            raise ReadOnly(
                f"{self.describe()}: {key!r} cannot be created, this file system is not known to create exclusively. "
                "Write to a local folder, or to s3://, gs:// or az:// through obstore."
            )
        if not self._exclusive:
            self._prove_exclusive()
        return self._create(key, bytes(flat(data)))

    def sweep(self) -> Names:
        """What LocalStore does on a local file system, nothing elsewhere."""
        return self._local.sweep() if self._local else []

    def _path(self, key: str) -> str:
        if self._http:
            key = urllib.parse.quote(key)
        return f"{self._root}/{key}" if self._root else key

    def _entries(self, folder: str, prefix: str) -> Iterator[Entry]:
        found = []
        try:
            self._fs.invalidate_cache()  # a listing kept from earlier would hide what others have committed since
            for path, info in self._fs.find(self._path(folder).rstrip("/"), detail=True).items():
                key = path.removeprefix(self._root).lstrip("/")
                if key.startswith(prefix) and not key.startswith(f"{ATTEMPTS}/"):
                    found.append(Entry(key, int(info["size"])))
        except FileNotFoundError:
            pass  # a folder in which nothing has been made yet
        except Exception as error:
            refuse(self, "listing", prefix, error, SEALED)
        return iter(found)

    def _create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        try:
            if self._kind == "memory":
                with _memory_lock:
                    self._fs.pipe_file(path, data, mode="create")
            else:
                # One conditional PUT: chunks at least as large as the object keep s3fs from a multipart upload.
                self._fs.pipe_file(path, data, mode="create", chunksize=len(data) + 1)
            return True
        except FileExistsError as error:
            if self._fs.isfile(path):
                return False
            refuse(self, "creation", key, error, "Yet nothing is there: other requests conflict. Try again later.")
        except Exception as error:
            refuse(self, "creation", key, error, f"It may have been committed all the same. {NEXT_STEP}")

    def _prove_exclusive(self) -> None:
        """Raises ReadOnly if the server takes two conditional creations of one object."""
        if self._create(PROBE, PROBE_TEXT) and self._create(PROBE, PROBE_TEXT):
            raise ReadOnly(
                f"{self.describe()}: the server or this botocore ignores `If-None-Match: *`, so two writers could "
                "overwrite each other's shards. Write through obstore, or to another store; reading is safe."
            )
        self._exclusive = True

    def _is_empty(self, key: str) -> bool:
        try:
            return bool(self._fs.size(self._path(key)) == 0)
        except Exception:
            return False  # the error that led here is the one to tell

    def _refuse_reading(self, key: str, error: Exception) -> NoReturn:
        if isinstance(error, FileNotFoundError):
            refuse(self, "reading", key, error, "There is no such object.", NotFound)
        refuse(self, "reading", key, error, NEXT_STEP)


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
