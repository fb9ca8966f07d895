"""A cache in a zip file, which is only read."""

import os
import threading
import zipfile
import zlib
from collections.abc import Iterator

from ..errors import CacheError, NotFound, StoreError
from .base import Entry, Names, Store, refuse, register_store

# Shards hardly compress. A member that claims to was made to exhaust memory.
MAX_UNPACKED, MAX_RATIO = 64 << 20, 50


class ZipStore(Store):
    """The objects are the members of a zip file, stored or deflated, by their keys.

    `get_tail` of a deflated member unpacks all of it. `get` checks a member's CRC. Can be pickled, and used after a
    fork: each process opens the file itself.
    """

    ERRORS = (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError)
    NEXT_STEP = "The zip file is damaged or of another kind; copy it again."

    readonly_reason = "a zip file is read-only"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(path)
        self._lock = threading.Lock()
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._archive()  # a file that is no zip is refused here, not at the first read

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._path,)

    def describe(self) -> str:
        return self._path

    def _read(self, key: str, length: int | None) -> bytes:
        try:
            info = self._archive().getinfo(key)
        except KeyError:
            raise FileNotFoundError("no such member") from None
        if info.file_size > max(MAX_UNPACKED, MAX_RATIO * info.compress_size):
            raise StoreError(
                f"{self.describe()}: {key!r} claims {info.file_size} bytes, packed into {info.compress_size}. No "
                "object of a cache compresses like that; the zip file is damaged or hostile."
            )
        if length is None:
            return self._archive().read(info)
        with self._archive().open(info) as member:
            member.seek(max(0, info.file_size - length))
            return member.read()

    def _entries(self, folders: Names) -> Iterator[Entry]:
        return (Entry(info.filename, info.file_size) for info in self._archive().infolist() if not info.is_dir())

    def _archive(self) -> zipfile.ZipFile:
        """This process's open file. One inherited through a fork shares its position with the parent's."""
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                try:
                    self._opened = os.getpid(), zipfile.ZipFile(self._path)
                except FileNotFoundError as error:
                    refuse(self, "opening", "", error, "Has the file been moved?", NotFound)
                except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
                    refuse(self, "opening", "", error, "Expected a zip file of a cache's whole folder.")
            return self._opened[1]


@register_store(".zip")
def open_zip(path: str, create: bool) -> ZipStore:
    """The zip file at a path. Raises CacheError if a cache is to be created in it."""
    if create and not os.path.exists(path):
        raise CacheError(f"{path}: a zip file is only read. Write the cache to a folder, and zip its content.")
    return ZipStore(path)
