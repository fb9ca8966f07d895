"""A cache in a folder behind HTTP, which is only read."""

import base64
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from ..credentials import redact
from ..errors import CacheError
from .base import MOST_BYTES, Entry, Names, Store, register_store

SLOWEST = 2**14  # bytes a second
MOST_SKIPPED = 2**30  # bytes that are read for the end of an object, from a server that ignores ranges


class HttpStore(Store):
    """Objects behind http:// or https://, by GET alone; one request each, not retried.

    user:password@ in the URL is sent as basic authentication, but not to another host that a redirect names; a query
    (a signature) is sent with every request. `list` raises StoreError: HTTP has no listing. `get_tail` fetches the
    whole object from a server that ignores ranges. Can be pickled and used after a fork.

    timeout: seconds without any response after which a request fails; and how long a body may take beyond a second
    for each SLOWEST bytes.
    """

    ERRORS = (OSError, http.client.HTTPException)

    readonly_reason = "HTTP is read-only"

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            good = False  # its message would quote what may be a password
        if not good or not url.isprintable() or " " in url:
            raise CacheError(f"store: got {redact(url)!r}; expected the URL of a folder, http(s)://host/path.")
        self._timeout = timeout
        self._base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._query = parts.query
        self._authorization = ""
        if parts.username is not None:
            pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self._authorization = "Basic " + base64.b64encode(pair.encode()).decode()

    def describe(self) -> str:
        return self._base

    def _read(self, key: str, length: int | None) -> bytes:
        url = f"{self._base}/{urllib.parse.quote(key)}" + (f"?{self._query}" if self._query else "")
        headers = {"Accept-Encoding": "identity"} | ({} if length is None else {"Range": f"bytes=-{length}"})
        request = urllib.request.Request(url, headers=headers)
        if self._authorization:
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                if response.status not in ((200,) if length is None else (200, 206)):
                    raise http.client.HTTPException(f"got HTTP {response.status}; expected an object")
                return self._body(response, length)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(str(error)) from error
            if error.code == 416 and error.headers.get("Content-Range") == "bytes */0":
                return b""  # an empty object has no last byte
            raise

    def _body(self, response: http.client.HTTPResponse, length: int | None) -> bytes:
        """A response's body, or the last `length` bytes of it, of which no more is kept."""
        begun, expected, body, size = time.monotonic(), response.length, bytearray(), 0
        most = MOST_BYTES if length is None else max(length, MOST_SKIPPED)
        while size != expected and (chunk := response.read1(2**20)):
            size += len(chunk)
            body += chunk
            if length is not None and len(body) > length + 2**22:
                del body[:-length]
            if size > most:
                raise http.client.HTTPException(f"got more than {most} bytes; expected an object of a cache")
            if time.monotonic() - begun > self._timeout + size / SLOWEST:
                raise TimeoutError(f"got {size} bytes in {time.monotonic() - begun:.0f} seconds; expected more")
        if expected is not None and size < expected:
            raise http.client.IncompleteRead(b"", expected - size)
        return bytes(body[-length:] if length else body)

    def _is_final(self, error: Exception) -> bool:
        code = error.code if isinstance(error, urllib.error.HTTPError) else 0
        return 400 <= code < 500 and code not in (408, 425, 429)

    def _next_step(self, error: Exception) -> str:
        if isinstance(error, urllib.error.HTTPError):
            denied = error.code in (401, 403)
            return "Check the user and password, or the signature." if denied else "Try again later."
        return "Check the address and the connection, and try again."

    def _entries(self, folders: Names) -> Iterator[Entry]:
        self._refuse_listing(folders)


register_store("http://", "https://")(lambda url, create: HttpStore(url))
