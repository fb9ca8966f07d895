"""A cache in an object store (S3, Google Cloud Storage, Azure), through obstore."""

import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import lazy_loader

from ..credentials import redact
from ..errors import CacheError, ReadOnly, Refused, StoreError, said
from .base import Entry, Names, Store, harmless, open_store, refuse, register_store, words

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")
obstore = lazy_loader.load("obstore")  # imported on first use: most caches do without

# What one PUT takes: 5 GiB on S3 and Google, 5000 MiB on Azure.
MAX_SIZE = 5000 << 20
# obstore limits a request to 30 seconds, too few for 100 MB over a slow line.
TIMEOUTS = {"timeout": "600s", "connect_timeout": "20s"}
# Given any option of its HTTP client, obstore reads none from the environment; so these are read here.
ENVIRONMENT = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
CLIENT = ("allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url", "timeout", "user_agent")
PAUSES = (0.0, 0.1, 0.4, 1.6)  # seconds before each try of what met a conflict or a broken connection
QUICK_SECONDS = 10.0  # what fails later has been repeated by obstore, or is no reset

_user: int | None = None  # the process that has used obstore; its threads do not survive a fork


class ObstoreStore(Store):
    """Objects in an obstore store: S3Store, GCSStore, AzureStore, MemoryStore; HTTPStore to read.

    `create` is one PUT with the provider's condition that the object be absent (`If-None-Match: *` on S3 and Azure,
    `ifGenerationMatch=0` on Google), so an object is never partial. It is never a multipart upload, whose completion
    obstore cannot make conditional: an object has at most 5000 MiB. Some S3-compatible servers ignore the condition;
    before the first `create` a probe of a few bytes, `attempts/exclusive-create`, is therefore put twice, and a store
    that accepts both is refused. A request that was answered with 5xx or 429, or whose connection broke, is repeated:
    if the first had succeeded after all, `create` returns False for its own object.

    Reading needs GET and LIST. `get_tail` is one request; two on Azure, which has no ranges counted from the end. Can
    be pickled if the obstore store can. obstore hangs in a forked child, so requests there raise StoreError: start
    worker processes with "spawn" or "forkserver".
    """

    NEXT_STEP = "Check the address, the credentials (the provider's usual environment variables) and the connection."

    def __init__(self, store: "ObjectStore", name: str = "") -> None:
        self._store = store
        self._name = redact(name)
        self._exclusive = not isinstance(store, obstore.store.S3Store)
        if isinstance(store, obstore.store.HTTPStore):
            self.readonly_reason = "HTTP is read-only"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._store, self._name)

    def describe(self) -> str:
        return self._name or redact(repr(self._store))

    def _read(self, key: str, length: int | None) -> bytes:
        self._check_process()
        return self._repeated(lambda: self._read_once(key, length))

    def _read_once(self, key: str, length: int | None) -> bytes:
        if length is None:
            return bytes(obstore.get(self._store, key).bytes())
        if isinstance(self._store, obstore.store.AzureStore):
            size = self._size(key)
            return bytes(obstore.get_range(self._store, key, start=max(0, size - length), end=size)) if size else b""
        return bytes(obstore.get(self._store, key, options={"range": {"suffix": length}}).bytes())

    def _size(self, key: str) -> int:
        return int(obstore.head(self._store, key)["size"])

    def _entries(self, folders: Names) -> Iterator[Entry]:
        if self.readonly_reason:
            self._refuse_listing(folders)
        self._check_process()
        prefix = "/".join(folders) or None
        for batch in self._repeated(lambda: list(obstore.list(self._store, prefix=prefix, chunk_size=1000))):
            for meta in batch:
                yield Entry(meta["path"], meta["size"])

    def create(self, key: str, data: bytes | memoryview) -> bool:
        if (size := memoryview(data).nbytes) > MAX_SIZE:
            raise Refused(
                f"{self.describe()}: {key!r} has {size} bytes, a single conditional request takes {MAX_SIZE}. Make the "
                "shards smaller."
            )
        return super().create(key, data)

    def _put(self, key: str, data: memoryview) -> bool:
        self._check_process()
        # 412 means that the object exists. 409 looks the same here, and means that another request for it is under
        # way, which may still fail: so look for the object, and if it is absent, try again.
        conflict: Exception | None = None
        for pause in PAUSES:
            time.sleep(pause)
            try:
                # the condition makes it safe to repeat
                self._repeated(lambda: obstore.put(self._store, key, data, mode="create", use_multipart=False))
                return True
            except obstore.exceptions.AlreadyExistsError as error:
                conflict = error
            except obstore.exceptions.NotSupportedError as error:
                refuse(self, "creation", key, error, "It cannot create exclusively; use another store.", ReadOnly)
            try:
                self._size(key)
                return False
            except FileNotFoundError:
                continue
        assert conflict is not None
        step = "Yet nothing is there: other requests for it conflict. Try again later."
        refuse(self, "creation", key, conflict, step)

    def _remove(self, key: str) -> bool:
        self._check_process()
        try:
            self._repeated(lambda: self._size(key))  # S3 does not say whether a deleted object was there
        except FileNotFoundError:
            return False
        self._repeated(lambda: obstore.delete(self._store, key))
        return True

    def _repeated(self, request: Callable[[], T]) -> T:
        """Repeat a request whose connection broke: obstore does not where it creates, or in the middle of an answer."""
        for pause in PAUSES[1:]:
            began = time.monotonic()
            try:
                return request()
            except obstore.exceptions.GenericError:
                if time.monotonic() - began > QUICK_SECONDS:
                    raise
            time.sleep(pause)
        return request()

    def _is_final(self, error: Exception) -> bool:
        denied = obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError, PermissionError
        return isinstance(error, denied)

    def _check_process(self) -> None:
        """Raises StoreError in a child forked from a process that has used obstore: a request would hang there."""
        global _user
        if _user is None:
            _user = os.getpid()
        elif _user != os.getpid():
            raise StoreError(
                f"{self.describe()}: this process was forked from one that has used obstore, which does not work after "
                'a fork. Start workers with "spawn" or "forkserver" (DataLoader: multiprocessing_context="spawn").'
            )


@register_store("s3://", "gs://", "az://")
def open_url(url: str, create: bool) -> ObstoreStore:
    """The store behind an s3://, gs:// or az:// URL, with the environment's credentials. Raises CacheError."""
    prefix = ENVIRONMENT[url.partition("://")[0].lower()]
    given = {name: os.environ[prefix + name.upper()] for name in CLIENT if prefix + name.upper() in os.environ}
    try:
        import obstore.store
    except ModuleNotFoundError as error:
        raise CacheError("Object stores need obstore: pip install 'fastkd[cloud]'.") from error
    options: Any = TIMEOUTS | given
    try:
        return ObstoreStore(obstore.store.from_url(url, client_options=options), url)
    except Exception as error:
        step = ObstoreStore.NEXT_STEP
        raise CacheError(f"{redact(url)}: obstore cannot open it: {said(words(error))}. {step}") from harmless(error)


@register_store(*(f"obstore.store.{kind}Store" for kind in ("S3", "GCS", "Azure", "Memory", "HTTP", "Local")))
def open_obstore(store: Any, create: bool) -> Store:
    """An obstore store; the folder of a LocalStore, which obstore would not sync to the disk."""
    if not isinstance(store, obstore.store.LocalStore):
        return ObstoreStore(store)
    if store.prefix is None:
        raise CacheError("An obstore LocalStore without a prefix is the whole disk. Give the cache's folder.")
    return open_store(os.fspath(store.prefix), create=create)
