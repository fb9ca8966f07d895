"""moto's S3 in a process of its own, behind a proxy that injects faults and logs what was committed.

The proxy answers one request at a time towards moto, as S3's promise for `If-None-Match` wants it: moto looks for the
object and then writes it.
"""

import http.client
import http.server
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from typing import NamedTuple

ON_A_PUT = ("reset before", "reset after", "503 before", "500 after")
"""Faults of a request that creates, before it reaches S3 or after its commit."""
ON_A_GET = ("reset before", "503 before", "reset after", "truncated", "slow")
"""Faults of a request that reads: of its answer, too."""
BUCKET = "bucket"


class Request(NamedTuple):
    """A request as S3 saw it. status: S3's answer; 0 if the proxy never passed it on."""

    method: str
    key: str
    conditional: bool
    status: int
    fault: str


class FaultyS3:
    """A bucket at `url`. A fault happens with probability `rate` to a request, until `left` have happened; and, if
    `first_puts`, to the first request to create each key."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self.moto = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.lock = threading.Lock()
        self.log: list[Request] = []
        self.rate, self.left, self.random = 0.0, 0, random.Random(0)
        self.first_puts, self.seen = False, set[str]()
        self.proxy = _Proxy(self)
        self.url = f"http://127.0.0.1:{self.proxy.server_port}"
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        deadline = time.monotonic() + 120
        while True:
            try:
                assert self.pass_on("PUT", f"/{BUCKET}", {"Host": "127.0.0.1"}, b"")[0] == 200
                break
            except OSError:
                assert self.moto.poll() is None, "moto's server ended"
                assert time.monotonic() < deadline, "moto's server does not answer"
                time.sleep(0.1)

    def close(self) -> None:
        """End the proxy and the server."""
        self.proxy.shutdown()
        self.proxy.server_close()
        self.upstream.close()
        self.moto.kill()
        self.moto.wait()

    def pass_on(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """S3's answer: status, headers and body."""
        # what is not signed would be no S3 request
        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request"} | headers
        self.upstream.close()  # a connection each: moto's server closes them anyway
        self.upstream.request(method, path, body, headers)
        answer = self.upstream.getresponse()
        return answer.status, answer.getheaders(), answer.read()

    def fault_for(self, method: str, key: str) -> str:
        """The fault of the next request, or ""."""
        with self.lock:
            if self.first_puts and method == "PUT" and key not in self.seen:
                self.seen.add(key)
                return ON_A_PUT[len(self.seen) % len(ON_A_PUT)]
            if not self.left or self.random.random() >= self.rate:
                return ""
            self.left -= 1
            return self.random.choice(ON_A_PUT if method == "PUT" else ON_A_GET)

    def faults(self) -> Counter[str]:
        """How many of each fault have happened."""
        return Counter(request.fault for request in self.log if request.fault)

    def created(self, prefix: str) -> Counter[str]:
        """How often S3 created each key below a prefix. A creation without a condition is an error."""
        made = [r for r in self.log if r.method == "PUT" and r.status == 200 and r.key.startswith(prefix)]
        assert all(request.conditional for request in made)
        return Counter(request.key for request in made)


class _Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, s3: FaultyS3) -> None:
        self.s3 = s3
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no error."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        s3, method = self.server.s3, self.command
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).removeprefix(f"/{BUCKET}/")
        fault, status, headers, data = s3.fault_for(method, key), 0, [], b""
        with s3.lock:
            if not fault.endswith("before"):
                status, headers, data = s3.pass_on(method, self.path, dict(self.headers.items()), body)
            s3.log.append(Request(method, key, "If-None-Match" in self.headers, status, fault))
        if fault.startswith("reset"):
            return self._reset()
        if fault[:3] in ("503", "500"):
            self.send_response(int(fault[:3]))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("connection", "content-length", "date", "server", "transfer-encoding"):
                self.send_header(name, value)
        length = dict(headers).get("Content-Length", "0") if method == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault == "truncated":
            self.wfile.write(data[: len(data) // 2])
            return self._reset()
        if fault == "slow":
            step = max(1, -(-len(data) // 8))
            for start in range(0, len(data), step):
                time.sleep(0.02)
                self.wfile.write(data[start : start + step])
            return None
        self.wfile.write(data)
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _reset(self) -> None:
        """End the connection at once, as a router does that forgets it."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # or it would hold the socket open
        self.connection.close()
