"""A cache in an object store (S3, Google Cloud Storage, Azure), through obstore."""

import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import obstore
from obstore.exceptions import AlreadyExistsError, NotSupportedError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from ..errors import CacheError, NotFound, ReadOnly, StoreError
from .base import (
    ATTEMPTS,
    NO_LISTING,
    PROBE,
    PROBE_TEXT,
    BaseStore,
    Entry,
    check_key,
    check_length,
    check_prefix,
    clean,
    flat,
    harmless,
    refuse,
    words,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# What one PUT takes: 5 GiB on S3 and Google, 5000 MiB on Azure.
MAX_SIZE = 5000 << 20
# obstore gives a request 30 seconds in all, too few for 100 MB over a slow line.
TIMEOUTS = {"timeout": "600s", "connect_timeout": "20s"}
# Given any option of its HTTP client, obstore reads none from the environment; so these are read here.
ENVIRONMENT = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
CLIENT = ("allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url", "timeout", "user_agent")
PAUSES = (0.0, 0.1, 0.4, 1.6)  # seconds before each try of a creation that met a conflict
NEXT_STEP = "Check the address, the credentials (the provider's usual environment variables) and the connection."

_user: int | None = None  # the process that has used obstore; its threads do not survive a fork


class ObstoreStore(BaseStore):
    """Objects in an obstore store: S3Store, GCSStore, AzureStore, MemoryStore; HTTPStore to read.

    `create` is one PUT with the provider's condition that nothing be there (`If-None-Match: *` on S3 and Azure,
    `ifGenerationMatch=0` on Google), so an object is never partial. It is never a multipart upload, whose completion
    obstore cannot make conditional: an object has at most 5000 MiB. Some imitations of S3 ignore the condition; before
    the first `create` a probe of a few bytes, `attempts/exclusive-create`, is therefore put twice, and a store that
    takes it twice is refused. obstore repeats a request that was answered 5xx or 429: if the first had succeeded after
    all, `create` says False of its own object.

    Reading needs GET and LIST. May be pickled if the obstore store may. After a fork obstore hangs in the child; that
    is refused: start worker processes with "spawn" or "forkserver".
    """

    def __init__(self, store: "ObjectStore", name: str = "") -> None:
        self._store = store
        self._name = clean(name)
        self._http = isinstance(store, HTTPStore)
        self._exclusive = not isinstance(store, S3Store)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._store, self._name)

    def describe(self) -> str:
        store: Any = self._store
        if self._name:
            return self._name
        if isinstance(store, HTTPStore):
            return clean(store.url)
        config = dict(getattr(store, "config", None) or {})
        if isinstance(store, S3Store):
            name = f"s3://{config.get('bucket', '(bucket)')}"
        elif isinstance(store, GCSStore):
            name = f"gs://{config.get('bucket', '(bucket)')}"
        elif isinstance(store, AzureStore):
            name = f"az://{config.get('account_name', '(account)')}/{config.get('container_name', '(container)')}"
        else:
            return f"obstore.{type(store).__name__}"
        name += f"/{store.prefix}" if store.prefix else ""
        return clean(name + (f" at {config['endpoint']}" if "endpoint" in config else ""))

    @property
    def readonly(self) -> bool:
        return self._http

    def get(self, key: str) -> bytes:
        check_key(self, key)
        self._check_process()
        try:
            return obstore.get(self._store, key).bytes().to_bytes()
        except Exception as error:
            self._refuse_reading(key, error)

    def get_tail(self, key: str, length: int) -> bytes:
        """One request; two on Azure, which has no ranges counted from the end, and for an empty object."""
        check_length(length)
        check_key(self, key)
        self._check_process()
        try:
            if isinstance(self._store, AzureStore):
                size = obstore.head(self._store, key)["size"]
                start = max(0, size - length)
                return obstore.get_range(self._store, key, start=start, end=size).to_bytes() if size else b""
            options: Any = {"range": {"suffix": length}}
            return obstore.get(self._store, key, options=options).bytes().to_bytes()
        except Exception as error:
            # An empty object has no last byte, and each provider says so in its own way.
            if not isinstance(error, FileNotFoundError) and self._is_empty(key):
                return b""
            self._refuse_reading(key, error)

    def list(self, prefix: str) -> Iterator[Entry]:
        folders = check_prefix(self, prefix)
        if self._http:
            raise StoreError(NO_LISTING.format(store=self.describe(), prefix=prefix))
        self._check_process()
        return self._entries("/".join(folders), prefix)

    def create(self, key: str, data: bytes | memoryview) -> bool:
        check_key(self, key)
        view = flat(data)
        if self._http:
            raise ReadOnly(
                f"{self.describe()}: {key!r} cannot be created over HTTP. Write the cache to s3://, gs:// or az://."
            )
        if len(view) > MAX_SIZE:
            raise StoreError(
                f"{self.describe()}: {key!r} has {len(view)} bytes, a single conditional request takes {MAX_SIZE}. "
                "Make the shards smaller."
            )
        self._check_process()
        self._prove_exclusive()
        return self._create(key, view)

    def _create(self, key: str, view: memoryview) -> bool:
        # 412 says that an object is there. 409 reads the same here, and says that another request for it is under way,
        # which may still fail: so look, and if nothing is there, try again.
        conflict: Exception | None = None
        for pause in PAUSES:
            time.sleep(pause)
            try:
                obstore.put(self._store, key, view, mode="create", use_multipart=False)
                return True
            except AlreadyExistsError as error:
                conflict = error
            except NotSupportedError as error:
                refuse(self, "creation", key, error, "It cannot create exclusively; use another store.", ReadOnly)
            except Exception as error:
                refuse(self, "creation", key, error, f"It may have been committed all the same. {NEXT_STEP}")
            try:
                obstore.head(self._store, key)
                return False
            except FileNotFoundError:
                continue
            except Exception as error:
                refuse(self, "creation", key, error, f"Whether an object is there could not be found out. {NEXT_STEP}")
        assert conflict is not None
        refuse(
            self, "creation", key, conflict, "Yet nothing is there: other requests for it conflict. Try again later."
        )

    def _prove_exclusive(self) -> None:
        """Raises ReadOnly if the server takes two conditional creations of one object."""
        with self._lock:
            if self._exclusive:
                return
            text = memoryview(PROBE_TEXT)
            if self._create(PROBE, text) and self._create(PROBE, text):
                raise ReadOnly(
                    f"{self.describe()}: the server ignores `If-None-Match: *`, so two writers could overwrite each "
                    "other's shards. Use a newer server, or another store; reading from this one is safe."
                )
            self._exclusive = True

    def _entries(self, folder: str, prefix: str) -> Iterator[Entry]:
        try:
            for batch in obstore.list(self._store, prefix=folder or None, chunk_size=1000):
                for meta in batch:
                    if meta["path"].startswith(prefix) and not meta["path"].startswith(f"{ATTEMPTS}/"):
                        yield Entry(meta["path"], meta["size"])
        except Exception as error:
            refuse(self, "listing", prefix, error, NEXT_STEP)

    def _is_empty(self, key: str) -> bool:
        try:
            return obstore.head(self._store, key)["size"] == 0
        except Exception:
            return False  # the error that led here is the one to tell

    def _refuse_reading(self, key: str, error: Exception) -> NoReturn:
        if isinstance(error, FileNotFoundError):
            refuse(self, "reading", key, error, "There is no such object, or no such bucket.", NotFound)
        refuse(self, "reading", key, error, NEXT_STEP)

    def _check_process(self) -> None:
        """Raises StoreError in a child forked from a process that has used obstore: there a request hangs for ever."""
        global _user
        if _user is None:
            _user = os.getpid()
        elif _user != os.getpid():
            raise StoreError(
                f"{self.describe()}: this process was forked from one that has used obstore, which does not work after "
                'a fork. Start workers with "spawn" or "forkserver" (DataLoader: multiprocessing_context="spawn").'
            )


def open_url(url: str) -> ObstoreStore:
    """The store behind an s3://, gs:// or az:// URL, with the environment's credentials. Raises CacheError."""
    prefix = ENVIRONMENT[url.partition("://")[0].lower()]
    given = {name: os.environ[prefix + name.upper()] for name in CLIENT if prefix + name.upper() in os.environ}
    options: Any = TIMEOUTS | given
    try:
        return ObstoreStore(obstore.store.from_url(url, client_options=options), url)
    except Exception as error:
        raise CacheError(f"{clean(url)}: obstore cannot open it: {words(error)}. {NEXT_STEP}") from harmless(error)
