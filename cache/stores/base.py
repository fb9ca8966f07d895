"""What all stores share: the protocol, checks of keys, errors without credentials, and `open_store`."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn, cast

from ..credentials import redact
from ..errors import CacheError, NotFound, ReadOnly, Refused, StoreError, type_name

# The folder of a store's own objects: unfinished attempts, a probe. Never listed, never an object's key.
ATTEMPTS = "attempts"
FINAL = {
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EROFS,
}  # not a matter of time
MOST_BYTES = 2**33  # of an object; nothing in a cache is larger
REMOVABLE = "features"  # the folder of what may be deleted: nothing else in a cache is
PROBE = f"{ATTEMPTS}/exclusive-create"
PROBE_TEXT = b"fastkd asks with this object whether the store creates exclusively.\n"

Names = list[str]  # inside a store's class, `list` is a method


class Entry(NamedTuple):
    """One object of a listing: its key and its size in bytes."""

    key: str
    size: int


def check_key(store: "Store", key: str) -> list[str]:
    """The parts of a key that stays inside the store. Raises StoreError for any other."""
    parts = key.split("/") if isinstance(key, str) else []
    if not parts or {"", ".", ".."} & set(parts) or "\\" in key or not key.isprintable() or parts[0] == ATTEMPTS:
        raise StoreError(
            f"{store.describe()}: {key!r} is no key of an object. A key is a relative path with '/' between its parts, "
            f"none of them empty, '.' or '..', without backslashes or control characters, and not in '{ATTEMPTS}/'."
        )
    return parts


def words(error: BaseException) -> str:
    """The message of an error, on one line of reasonable length and without credentials."""
    text = (isinstance(error, OSError) and error.strerror) or str(error).split("\n\nDebug source")[0]
    text = " ".join(redact(text).split()) or type(error).__name__
    return text if len(text) <= 600 else text[:600] + " …"


def harmless(error: BaseException) -> BaseException:
    """The error itself as a cause to chain, or its cleaned message where a traceback would print a credential."""
    link: BaseException | None = error
    while link is not None:
        if redact(str(link)) != str(link):
            return StoreError(f"{type(error).__name__}: {words(error)}")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return error


def refuse(
    store: "Store", operation: str, key: str, error: BaseException, step: str, kind: type[StoreError] = StoreError
) -> NoReturn:
    """Raise `kind` for a request that failed, naming store, operation, object, its message and the next step."""
    raise kind(f"{store.describe()}: {operation} of {key!r} failed: {words(error)}. {step}") from harmless(error)


class Store:
    """Immutable objects by key, each created whole and once.

    Keys are relative paths with "/" between their parts. Every method raises StoreError when a request fails. An object
    of another class with the public members is taken for a store, too.

    A kind of store fills in `describe` and some of `_read`, `_entries`, `_put`, `_remove` and `_size`, which may raise
    `ERRORS`, with FileNotFoundError for an object that is absent. Here keys are checked and errors are named.
    """

    ERRORS: tuple[type[Exception], ...] = (Exception,)
    NEXT_STEP = "Check the address, the credentials and the connection."

    readonly_reason = ""  # why it is only read; empty for a store that can be written
    _exclusive = True  # whether it is known that creations of one object exclude each other
    _probe_lock = threading.Lock()

    def describe(self) -> str:
        """The store's name for messages and logs; never with credentials."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.describe()}>"

    @property
    def readonly(self) -> bool:
        """Whether `create` is known to be refused."""
        return bool(self.readonly_reason)

    def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound if it is absent."""
        return self._object(key, None)

    def get_tail(self, key: str, length: int) -> bytes:
        """The last `length` bytes, or all if the object is shorter. Raises NotFound if it is absent."""
        if length < 1:
            raise ValueError(f"length: got {length}; expected at least one byte")
        return self._object(key, length)

    def exists(self, key: str) -> bool:
        """Whether there is such an object. Reads its last byte."""
        try:
            self.get_tail(key, 1)
        except NotFound:
            return False
        return True

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects whose key starts with `prefix` ("shards/"), in any order; without the store's own files."""
        folders = prefix.split("/")[:-1]
        if folders:
            check_key(self, "/".join(folders))
        return self._listing(folders, prefix)

    def create(self, key: str, data: bytes | memoryview) -> bool:
        """Create the object if it is absent. True: this call created it, whole. False: it exists and is untouched.

        After a StoreError the object may exist or not; and a store that repeats a request whose response was lost may
        return False for an object that this call created. The object's own attributes say who wrote it.
        """
        check_key(self, key)
        if self.readonly_reason:
            raise ReadOnly(
                f"{self.describe()}: {key!r} cannot be created: {self.readonly_reason}. Write the cache to a local "
                "folder or an object store (s3://, gs://, az://)."
            )
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")  # TypeError if it is not contiguous
        with self._probe_lock:  # one probe, however many threads begin at once
            if not self._exclusive:
                self.prove_exclusive()
        return self._created(key, view)

    def prove_exclusive(self) -> None:
        """Create a probe of a few bytes twice. Raises StoreError if it cannot be, and ReadOnly if it was created twice:
        a server that ignores the condition of a creation accepts a second one, too."""
        if self._created(PROBE, PROBE_TEXT) and self._created(PROBE, PROBE_TEXT):
            raise ReadOnly(
                f"{self.describe()}: the server, or its client, ignores `If-None-Match: *`, so two writers could "
                "overwrite each other's shards. Use a newer version or another store; reading from this one is "
                "safe."
            )
        self._exclusive = True

    def delete(self, key: str) -> bool:
        """Delete an object of a feature, below "features/". False if it is absent.

        Raises StoreError for any other key, and ReadOnly if the store cannot be written or cannot delete.
        """
        if check_key(self, key)[0] != REMOVABLE or "/" not in key:
            raise Refused(f"{self.describe()}: {key!r} is never deleted; only the objects of features are.")
        unable = type(self)._remove is Store._remove
        if self.readonly_reason or unable:
            reason = self.readonly_reason or "this kind of store does not delete"
            raise ReadOnly(f"{self.describe()}: {key!r} cannot be deleted: {reason}.")
        with self._errors("deletion", key):
            return self._remove(key)

    def sweep(self) -> Names:
        """Remove what dead attempts left behind, and nothing of living ones; the names of what was removed."""
        return []  # most attempts leave nothing behind

    def _read(self, key: str, length: int | None) -> bytes:
        """The object, or its last `length` bytes."""
        raise NotImplementedError

    def _entries(self, folders: Names) -> Iterator[Entry]:
        """The objects below a folder, or more than these."""
        raise NotImplementedError

    def _put(self, key: str, data: memoryview) -> bool:
        """Create an object. False where it exists."""
        raise NotImplementedError

    def _remove(self, key: str) -> bool:
        """Delete an object. False where it does not exist."""
        raise NotImplementedError

    def _size(self, key: str) -> int:
        """Bytes of an object."""
        raise NotImplementedError

    def _next_step(self, error: Exception) -> str:
        return self.NEXT_STEP

    def _is_final(self, error: Exception) -> bool:
        """Whether a request that failed so would fail again."""
        return isinstance(error, PermissionError) or getattr(error, "errno", None) in FINAL

    @contextmanager
    def _errors(self, operation: str, key: str, hint: str = "") -> Iterator[None]:
        expected: tuple[type[Exception], ...] = (MemoryError, *self.ERRORS)
        try:
            yield
        except StoreError:
            raise
        except expected as error:
            if operation == "reading" and isinstance(error, FileNotFoundError):
                refuse(self, operation, key, error, "There is no such object, or no such bucket.", NotFound)
            kind = Refused if self._is_final(error) else StoreError
            refuse(self, operation, key, error, hint + self._next_step(error), kind)

    def _object(self, key: str, length: int | None) -> bytes:
        check_key(self, key)
        with self._errors("reading", key):
            try:
                return self._read(key, length)
            except (StoreError, FileNotFoundError):
                raise
            except self.ERRORS:
                with suppress(Exception):  # an empty object has no last byte, which servers report in different ways
                    if length is not None and self._size(key) == 0:
                        return b""
                raise

    def _listing(self, folders: Names, prefix: str) -> Iterator[Entry]:
        with self._errors("listing", prefix):
            for entry in self._entries(folders):
                if entry.key.startswith(prefix) and not entry.key.startswith(f"{ATTEMPTS}/"):
                    yield entry

    def _created(self, key: str, data: bytes | memoryview) -> bool:
        with self._errors("creation", key, "It may have been committed all the same. "):
            return self._put(key, memoryview(data))

    def _refuse_listing(self, folders: Names) -> NoReturn:
        """Raise StoreError: there is no listing over HTTP."""
        raise StoreError(
            f"{self.describe()}: {'/'.join(folders)!r} cannot be listed, HTTP has no listing. Only a sealed cache can "
            "be read from here: run `fastkd seal` on it where it was written."
        )


BaseStore = Store  # its name for those who write a kind of store
_MEMBERS = ("readonly", "describe", "get", "get_tail", "list", "create", "sweep")

Opener = Callable[[Any, bool], Store]
_openers: dict[str, Opener] = {}


def register_store(*names: str) -> Callable[[Opener], Opener]:
    """Decorator for `opener(place, create) -> Store`, which `open_store` then calls for places of these names.

    A name is the scheme of URLs ("s3://"), the suffix of files (".zip"), or the full name of another library's class
    ("obstore.store.S3Store"). create: whether a missing folder or bucket is to be made where the store can do so.
    Raises ValueError for a name that has an opener already.
    """

    def register(opener: Opener) -> Opener:
        for name in names:
            if _openers.setdefault(name, opener) is not opener:
                raise ValueError(f"register_store: {name!r} is registered already, for {_openers[name].__qualname__}.")
        return opener

    return register


def open_store(path_or_store: object, *, create: bool = False) -> Store:
    """The store at a path or URL, or around an object of another library; a Store is returned as it is.

    A local path is a folder (made, with `create`) or a .zip file (read only). s3://, gs:// and az:// take their
    credentials from the environment and need obstore. http(s):// is read only, memory://name lives in this process.
    Only local folders are created: a bucket must exist.

    Raises NotFound if a local folder does not exist, StoreError if it cannot be made, CacheError for anything else.
    """
    place = path_or_store
    kinds = ", ".join(name for name in sorted(_openers) if name.startswith(".") or name.endswith("://"))
    expected = (
        f"expected a local folder, {kinds}, an obstore store, FsspecStore(fs, root), or an object with the methods of "
        "fastkd.cache.stores.Store."
    )
    if isinstance(place, str) and "://" in place:
        scheme = place.partition("://")[0].lower() + "://"
        if scheme not in _openers:
            raise CacheError(f"store: got {redact(place)!r}, of the unknown scheme {scheme!r}; {expected}")
        return _openers[scheme](place, create)
    if isinstance(place, (str, bytes, os.PathLike)):
        path = os.fsdecode(place)
        if not path or "\0" in path:
            raise CacheError(f"store: got {path!r}, which is no path; {expected}")
        suffix = os.path.splitext(path)[1]
        return _openers.get("" if os.path.isdir(path) else suffix, _openers[""])(path, create)
    if all(hasattr(place, name) for name in _MEMBERS):
        return cast(Store, place)
    for base in type(place).__mro__:  # by name, so that no library is imported for it
        if opener := _openers.get(f"{base.__module__}.{base.__qualname__}"):
            return opener(place, create)
    raise CacheError(f"store: got {type_name(place)}; {expected}")
