"""A small S3 on loopback, in memory, whose network is slow and fails: for measurements of many workers.

Objects of one bucket: PUT (with If-None-Match), GET, HEAD, and listing in pages of 1,000. Every request waits `latency`
seconds; some of them meet a fault, of a request before S3 sees it or of its answer.
"""

import http.server
import random
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from xml.sax.saxutils import escape

BUCKET = "bucket"
FAULTS = ("503 slow down", "500 before", "500 after", "reset before", "reset after", "slow body")
PAGE = 1000


class S3Server(http.server.ThreadingHTTPServer):
    """latency: seconds of each request. rate: fraction of requests that meet a fault. requests: by method, and "LIST".
    faults: by name."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, latency: float = 0.0, rate: float = 0.0, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.latency, self.rate, self.random = latency, rate, random.Random(seed)
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.created: Counter[str] = Counter()
        self.bytes = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self) -> dict[str, str]:
        """What clients need."""
        keys = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ALLOW_HTTP": "true"} | keys

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no error."""

    def fault(self, kind: str) -> str:
        with self.lock:
            self.requests[kind] += 1
            if self.random.random() >= self.rate:
                return ""
            name = self.random.choice(FAULTS)
            self.faults[name] += 1
            return name


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Server

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        s3, where = self.server, urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = urllib.parse.unquote(where.path).removeprefix(f"/{BUCKET}").removeprefix("/")
        query = dict(urllib.parse.parse_qsl(where.query))
        fault = s3.fault("LIST" if not key else self.command)
        time.sleep(s3.latency)
        if fault.endswith("before"):
            return self._reset() if fault.startswith("reset") else self._answer(500)
        if fault.startswith("503"):
            return self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
        status, data, headers = self._do(key, body, query)
        if fault == "reset after":
            return self._reset()
        if fault == "500 after":
            return self._answer(500)
        return self._answer(status, data, headers, slow=fault == "slow body")

    def _do(self, key: str, body: bytes, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        s3 = self.server
        with s3.lock:
            if not key:
                return 200, self._page(query), {"Content-Type": "application/xml"}
            if self.command == "PUT":
                if key in s3.objects and "If-None-Match" in self.headers:
                    return 412, b"<Error><Code>PreconditionFailed</Code></Error>", {}
                s3.objects[key] = body
                s3.created[key] += 1
                s3.bytes += len(body)
                return 200, b"", {"ETag": f'"{len(body)}"'}
            if key not in s3.objects:
                return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
            data = s3.objects[key]
        headers = {"ETag": f'"{len(data)}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if given := self.headers.get("Range"):
            first, _, last = given.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return 206, data[start:stop], headers
        return 200, data, headers

    def _page(self, query: dict[str, str]) -> bytes:
        prefix, after = query.get("prefix", ""), query.get("continuation-token") or query.get("start-after", "")
        keys = sorted(key for key in self.server.objects if key.startswith(prefix) and key > after)
        more, keys = len(keys) > PAGE, keys[:PAGE]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>0</ETag><Size>{len(self.server.objects[key])}</Size></Contents>"
            for key in keys
        )
        token = f"<NextContinuationToken>{escape(keys[-1])}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys)}</KeyCount>"
            f"<MaxKeys>{PAGE}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}"
            "</ListBucketResult>"
        ).encode()

    def _answer(
        self, status: int, data: bytes = b"", headers: dict[str, str] | None = None, *, slow: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        step = max(1, -(-len(data) // 8)) if slow else max(1, len(data))
        for start in range(0, len(data), step):
            if slow:
                time.sleep(0.05)
            self.wfile.write(data[start : start + step])

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _reset(self) -> None:
        """End the connection at once."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # or it would hold the socket open
        self.connection.close()
