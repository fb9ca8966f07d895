"""Caches that are only read: a zip file of a whole cache, and a folder behind HTTP."""

import base64
import functools
import http.client
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from ..errors import CacheError, NotFound, StoreError
from .base import (
    NO_LISTING,
    Entry,
    ReadOnlyStore,
    check_key,
    check_length,
    check_prefix,
    clean,
    refuse,
)

# Shards hardly compress. What claims to has been made to exhaust memory.
MAX_UNPACKED, MAX_RATIO = 64 << 20, 50


class ZipStore(ReadOnlyStore):
    """The objects are the members of a zip file, stored or deflated, under their keys.

    `get_tail` of a deflated member unpacks all of it. A member's CRC is checked by `get`. May be pickled, and used
    after a fork: each process opens the file itself.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(path)
        self._lock = threading.Lock()
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        self._archive()  # a file that is no zip is refused here, not at the first read

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._path,)

    def describe(self) -> str:
        return self._path

    def get(self, key: str) -> bytes:
        check_key(self, key)
        try:
            info = self._info(key)
            return self._archive().read(info)
        except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            refuse(self, "reading", key, error, "The zip file is damaged or of another kind; copy it again.")

    def get_tail(self, key: str, length: int) -> bytes:
        check_length(length)
        check_key(self, key)
        try:
            info = self._info(key)
            with self._archive().open(info) as member:
                member.seek(max(0, info.file_size - length))
                return member.read()
        except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            refuse(self, "reading", key, error, "The zip file is damaged or of another kind; copy it again.")

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(self, prefix)
        names = {name for name in self._archive().namelist() if name.startswith(prefix) and not name.endswith("/")}
        return iter([Entry(name, self._archive().getinfo(name).file_size) for name in names])

    def _info(self, key: str) -> zipfile.ZipInfo:
        try:
            info = self._archive().getinfo(key)
        except KeyError:
            raise NotFound(f"{self.describe()}: there is no object {key!r}.") from None
        if info.file_size > max(MAX_UNPACKED, MAX_RATIO * info.compress_size):
            raise StoreError(
                f"{self.describe()}: {key!r} claims {info.file_size} bytes, packed into {info.compress_size}. No "
                "object of a cache compresses like that; the zip file is damaged or hostile."
            )
        return info

    def _archive(self) -> zipfile.ZipFile:
        """This process's open file. One inherited through a fork shares its position with the parent's."""
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                try:
                    self._opened = os.getpid(), zipfile.ZipFile(self._path)
                except FileNotFoundError as error:
                    refuse(self, "opening", "", error, "Has the file been moved?", NotFound)
                except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
                    refuse(self, "opening", "", error, "A zip file of a cache's whole folder was expected.")
            return self._opened[1]


class HttpStore(ReadOnlyStore):
    """Objects behind http:// or https://, by GET alone; one request each, not retried.

    user:password@ in the URL is sent as basic authentication (never to another place that a redirect names); a query
    (a signature) is sent with every request. `list` is refused: HTTP has no listing. May be pickled; used after a fork.

    `timeout`: seconds without any answer after which a request fails.
    """

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            good = False  # its words would quote what may be a password
        if not good or not url.isprintable() or " " in url:
            raise CacheError(f"{clean(url)!r} is no URL of a folder. What is taken is http(s)://host/path.")
        self._timeout = timeout
        self._base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._query = parts.query
        self._authorization = ""
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self._authorization = "Basic " + base64.b64encode(pair.encode()).decode()

    def describe(self) -> str:
        return self._base

    def get(self, key: str) -> bytes:
        return self._request(key, None)

    def get_tail(self, key: str, length: int) -> bytes:
        """The last bytes; from a server that ignores ranges the whole object is fetched for it."""
        check_length(length)
        return self._request(key, length)[-length:]

    def list(self, prefix: str) -> Iterator[Entry]:
        """Refused. Raises StoreError."""
        raise StoreError(NO_LISTING.format(store=self.describe(), prefix=prefix))

    def _request(self, key: str, length: int | None) -> bytes:
        check_key(self, key)
        url = f"{self._base}/{urllib.parse.quote(key)}" + (f"?{self._query}" if self._query else "")
        headers = {"Accept-Encoding": "identity"} | ({} if length is None else {"Range": f"bytes=-{length}"})
        request = urllib.request.Request(url, headers=headers)
        if self._authorization:
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            with _opener().open(request, timeout=self._timeout) as response:
                if response.status not in ((200,) if length is None else (200, 206)):
                    raise http.client.HTTPException(f"HTTP {response.status} where an object was asked for")
                body: bytes = response.read()
                return body
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                refuse(self, "reading", key, error, "There is no such object.", NotFound)
            if error.code == 416 and error.headers.get("Content-Range") == "bytes */0":
                return b""  # an empty object has no last byte
            step = "Check the user and password, or the signature." if error.code in (401, 403) else "Try again later."
            refuse(self, "reading", key, error, step)
        except (OSError, http.client.HTTPException) as error:
            refuse(self, "reading", key, error, "Check the address and the connection, and try again.")


@functools.cache
def _opener() -> Any:
    """An opener of http and https alone: a redirect leads to no other scheme."""
    opener = urllib.request.OpenerDirector()
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ]
    for handler in handlers:
        opener.add_handler(handler)
    return opener
