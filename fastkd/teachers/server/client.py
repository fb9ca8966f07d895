"""An HTTP client for a server: requests at a time up to a bound, repeated with pauses while they fail.

Of threads, not of an event loop: what waits for an answer is an ordinary loop over batches, and a body is parsed where
it arrives. The threads end when nothing is left to ask.
"""

import email.utils
import json
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from ...cache.credentials import without_credentials
from ...cache.errors import said
from ...errors import TeacherError, TeacherUnavailable
from ...models.hub import brief
from .options import ServerOptions

Value = TypeVar("Value")

INSTALL = "pip install 'fastkd[server]'"
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses of requests that are repeated
SMALL = 2**20  # bytes of an answer without log-probabilities, at most
_CONNECT_SECONDS = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds between two tries; each is twice the last, times 0.5 to 1.5
_LONGEST_RETRY_AFTER = 300.0  # seconds, whatever a server asks for
_MESSAGE = 300  # characters of a server's message that are shown


class BadAnswer(ValueError):
    """A body that is not what was asked for. The request is repeated."""


class Answered(NamedTuple):
    """Status, body, and for how many seconds the server wants to be left alone, if it says so."""

    status: int
    body: bytes
    retry_after: float | None = None


class ServerClient:
    """The client of one server. Thread-safe.

    url: http(s)://host:port, with or without /v1 at the end. pause: waits for a number of seconds, or until an event.
    figures: requests, retries, bytes and parse_seconds so far. in_flight: requests, and tokens in them. absences: how
    often a server that had answered could not be reached.
    """

    def __init__(
        self,
        url: str,
        options: ServerOptions,
        *,
        pause: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        self.shown = without_credentials(url)
        try:
            self._httpx: Any = import_module("httpx2")
            import_module("msgspec")
        except ImportError as error:
            raise TeacherError(f"{self.shown}: a server needs the package {error.name}. Use `{INSTALL}`.") from error
        base = url.rstrip("/").removesuffix("/v1")
        if "?" in url or "#" in url or not base.partition("://")[2]:
            raise TeacherError(f"{self.shown}: got another kind of URL; expected http(s)://HOST:PORT without a query.")
        self._options, self._pause, self._token = options, pause, options.token()
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            self._http = self._httpx.Client(
                base_url=base,
                headers=headers,
                timeout=self._httpx.Timeout(options.timeout, connect=min(_CONNECT_SECONDS, options.timeout)),
                limits=self._httpx.Limits(max_connections=options.concurrency + 1, keepalive_expiry=30.0),
            )
        except (ValueError, self._httpx.InvalidURL) as error:
            raise TeacherError(f"{self.shown}: is no URL of a server ({brief(error)}).") from error
        weakref.finalize(self, self._http.close)
        self.figures = {"requests": 0.0, "retries": 0.0, "bytes": 0.0, "parse_seconds": 0.0}
        self.in_flight = [0, 0]
        self.absences = 0
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._threads = 0
        self._reached = False

    def ask(
        self,
        path: str,
        parse: Callable[[bytes], Value],
        body: bytes | None = None,
        *,
        limit: int = SMALL,
        stop: threading.Event | None = None,
    ) -> Value:
        """What `parse` makes of the body of an answer: of a POST with a body, of a GET without one.

        limit: bytes of it, at most. stop: CancelledError once it is set. Raises TeacherError if the server refuses the
        request, and TeacherUnavailable if it fails every time.
        """
        stop, problem, pause = stop or threading.Event(), "", 0.0
        for number in range(self._options.retries + 1):
            if number:
                self._pause(stop, pause * random.uniform(1.0, 1.5))
            if stop.is_set():
                raise CancelledError
            pause = min(_FIRST_PAUSE * 2**number, _LONGEST_PAUSE)
            self._count(requests=1, retries=number > 0)
            try:
                answered = self.send(path, body, limit)
                if answered.status == 200:
                    begun = time.perf_counter()
                    value = parse(answered.body)
                    self._count(bytes=len(answered.body), parse_seconds=time.perf_counter() - begun)
                    return value
                problem = self.message(answered)
                if answered.status not in AGAIN:
                    raise self._refusal(answered.status, problem)
                pause = pause if answered.retry_after is None else answered.retry_after
            except self._httpx.TransportError as error:
                if isinstance(error, self._httpx.ConnectError):
                    with self._lock:
                        self.absences += 1
                problem = self._masked(brief(error))
            except BadAnswer as error:
                problem = self._masked(str(error))
        raise TeacherUnavailable(
            f"{self.shown}: a request failed {self._options.retries + 1} times, the last time with {said(problem)}. "
            "Look at the log of the server; run the same command again once it answers."
        )

    def submit(
        self,
        path: str,
        parse: Callable[[bytes], Value],
        body: Callable[[], bytes],
        *,
        tokens: int,
        limit: int,
        stop: threading.Event,
    ) -> Future[Value]:
        """`ask` on one of the threads, when its turn comes. tokens: of its input."""
        future: Future[Value] = Future()

        def work() -> None:
            if stop.is_set() or not future.set_running_or_notify_cancel():
                future.cancel()
                return
            self._change_in_flight(1, tokens)
            try:
                value = self.ask(path, parse, body(), limit=limit, stop=stop)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(value)
            finally:
                self._change_in_flight(-1, -tokens)

        with self._lock:
            self._waiting.append(work)
            if self._threads < self._options.concurrency:
                self._threads += 1
                threading.Thread(target=self._work, name="server-request", daemon=True).start()
        return future

    def send(self, path: str, body: bytes | None = None, limit: int = SMALL) -> Answered:
        """One request, once. Raises an error of httpx2 if there is no answer, BadAnswer for a body above the limit, and
        TeacherError if there is nothing at the address at all."""
        end = time.monotonic() + self._options.timeout
        parts, size = [], 0
        try:
            with self._http.stream("GET" if body is None else "POST", path, content=body) as response:
                for part in response.iter_raw():
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        raise BadAnswer(f"a body of more than {limit:,} bytes")
                    if time.monotonic() > end:
                        raise self._httpx.ReadTimeout(f"a body that took more than {self._options.timeout:g} s")
                if 300 <= response.status_code < 400:
                    there = without_credentials(response.headers.get("location", "another place"))
                    raise TeacherError(
                        f"{self.shown}: the server sends requests for {path} on to {self._masked(there)} (status "
                        f"{response.status_code}), and a token is not sent to where it was not meant for. Use the "
                        "address that it names."
                    )
                after = _retry_after(response.headers.get("retry-after"))
                self._reached = True
                return Answered(response.status_code, b"".join(parts), after)
        except self._httpx.ConnectError as error:
            if self._reached:
                raise
            told = self._masked(brief(error))
            if "CERTIFICATE_VERIFY_FAILED" in told:
                raise TeacherError(
                    f"{self.shown}: the server's certificate is not trusted ({told}). Set the environment variable "
                    "SSL_CERT_FILE to a file with the certificate of who signed it."
                ) from error
            raise TeacherError(
                f"{self.shown}: the server cannot be reached ({told}). Start it, and check host and port."
            ) from error

    def message(self, answered: Answered) -> str:
        """What a server says of a request that it did not fulfil, in a line."""
        try:
            found = json.loads(answered.body)
            for name in ("error", "message", "detail"):
                found = found.get(name, found) if isinstance(found, dict) else found
            text = found if isinstance(found, str) else json.dumps(found)
        except (ValueError, RecursionError):
            text = answered.body[:_MESSAGE].decode("utf-8", "replace")
        text = " ".join(self._masked(text).split())
        text = text if len(text) <= _MESSAGE else text[:_MESSAGE] + "…"
        return f"status {answered.status}" + (f" ({text})" if text else "")

    def _refusal(self, status: int, problem: str) -> TeacherError:
        if status in (401, 403):
            what = "another token" if self._token else "a token"
            return TeacherError(
                f"{self.shown}: {problem}; expected {what}. Set an environment variable to it, and give its name: "
                "--teacher-options token_env=NAME."
            )
        advice = " Is it the address of a server of vLLM or SGLang, http(s)://HOST:PORT?" if status == 404 else ""
        return TeacherError(f"{self.shown}: the server refused a request: {said(problem)}.{advice}")

    def _masked(self, text: str) -> str:
        return text.replace(self._token, "…") if self._token else text

    def _count(self, **more: float) -> None:
        with self._lock:
            for name, value in more.items():
                self.figures[name] += value

    def _change_in_flight(self, requests: int, tokens: int) -> None:
        with self._lock:
            self.in_flight[0] += requests
            self.in_flight[1] += tokens

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                work = self._waiting.popleft()
            work()


def _retry_after(text: str | None) -> float | None:
    """The seconds that a header Retry-After asks for: a number, or a date."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER) if seconds == seconds else None
