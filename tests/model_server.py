"""A server that speaks as vLLM or SGLang does, with a toy model, and fails when it is told to.

Requests, answers and errors have the form of vLLM 0.32 (recorded from it: tests/teachers/recorded) and of SGLang 0.5.23
(by its source: `add_logprob_to_meta_info`, `_build_flat_top_logprobs_fields_from_arrays` and `http_server.py`).
"""

import base64
import http.server
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from capture_cases import VOCAB, Causal
from http_server import http_server

FAULTS = ("reset", "429", "500", "503", "slow", "stalled", "truncated", "half", "count", "html", "empty")
TOO_LONG = 0.5  # seconds that a stalled body stalls: longer than the timeout of the tests' clients


class ModelServer:
    """What a server of a model answers. Change the attributes while it runs.

    fault: called with the number of each request for log-probabilities, from 0, and its tokens; the name of a fault, or
    "" for none. asked: requests by path. faults: those that were made, by name.
    """

    def __init__(self, kind: str = "vllm", **changes: Any) -> None:
        self.kind, self.model = kind, Causal().eval()
        self.name, self.root, self.version = "toy", "/models/toy-1", "0.32.0"
        self.max_logprobs, self.max_length, self.token, self.flat = 20, 64, "", True
        self.ids: Callable[[str], list[int]] = lambda text: [ord(letter) % VOCAB for letter in text]
        self.fault: Callable[[int, list[int]], str] = lambda number, tokens: ""
        self.asked, self.faults = Counter[str](), Counter[str]()
        self.tokens: list[list[int]] = []
        self.hidden: set[str] = set()  # paths that are not there
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        for name, value in changes.items():
            setattr(self, name, value)

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> Any:
        """`[L, V]`, of each token's successor."""
        with self._lock:
            return self.model(torch.tensor([tokens]))[0].log_softmax(-1)

    def answer(self, method: str, path: str, body: dict[str, Any], headers: Any) -> tuple[int, Any, str]:
        """Status, JSON, and the name of a fault."""
        with self._lock:
            self.asked[path] += 1
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error": "Unauthorized"}, ""
        if path in self.hidden:
            return 404, {"detail": "Not Found"}, ""
        if path == "/v1/models":
            model = {"id": self.name, "object": "model", "created": int(time.time()), "owned_by": self.kind}
            return 200, {"object": "list", "data": [model | {"root": self.root, "max_model_len": self.max_length}]}, ""
        if path == "/tokenize":
            return 200, {"count": 0, "max_model_len": self.max_length, "tokens": self.ids(body["prompt"])}, ""
        if self.kind == "vllm" and path == "/version":
            return 200, {"version": self.version}, ""
        if self.kind == "sglang" and path == "/model_info":
            return 200, {"model_path": self.root, "weight_version": "default", "is_generation": True}, ""
        if self.kind == "sglang" and path == "/server_info":
            return 200, {"model_path": self.root, "version": self.version}, ""
        if path == {"vllm": "/v1/completions", "sglang": "/generate"}[self.kind]:
            status, found = (self._vllm if self.kind == "vllm" else self._sglang)(body)
            if status != 200:
                return status, found, ""
            tokens = body["prompt" if self.kind == "vllm" else "input_ids"]
            with self._lock:
                number = len(self.tokens)
                self.tokens.append(tokens)
                fault = self.fault(number, tokens)
                self.faults[fault] += bool(fault)
            return status, found, fault
        return 404, {"detail": "Not Found"}, ""

    def _vllm(self, body: dict[str, Any]) -> tuple[int, Any]:
        if "logit_bias" in body:
            text = f"token_id(s) [1] in logit_bias contain out-of-vocab token ids. Vocabulary size: {VOCAB}"
            return _bad_request(text)
        if (k := body["prompt_logprobs"]) > self.max_logprobs:
            return _bad_request(
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            )
        tokens = body["prompt"]
        if len(tokens) + body["max_tokens"] > self.max_length:
            return _bad_request(f"This model's maximum context length is {self.max_length} tokens.")
        logprobs = self.logprobs(tokens)
        rows: list[Any] = [None]
        for row, actual in zip(logprobs[:-1], tokens[1:], strict=True):
            best = row.topk(min(k, VOCAB))
            rank = int((row >= row[actual]).sum())
            entries = {str(actual): {"logprob": float(row[actual]), "rank": rank, "decoded_token": "a"}}
            for at, (value, token) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), 1):
                entries[str(token)] = {"logprob": max(value, -9999.0), "rank": at, "decoded_token": "é"}
            rows.append(entries)
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "prompt_logprobs": rows}
        return 200, {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": [choice]}

    def _sglang(self, body: dict[str, Any]) -> tuple[int, Any]:
        if wrong := [token for token in body.get("token_ids_logprob") or () if token >= VOCAB]:
            return 400, {
                "error": {
                    "message": "token_ids_logprob contains out-of-vocabulary token id "
                    f"{wrong[0]}; valid range is [0, {VOCAB})."
                }
            }
        tokens, k = body["input_ids"], body["top_logprobs_num"]
        best = self.logprobs(tokens)[:-1].topk(min(k, VOCAB))
        meta: dict[str, Any] = {
            "id": "1",
            "prompt_tokens": len(tokens),
            "input_token_logprobs": [[None, tokens[0], None]],
        }
        if self.flat and body.get("return_flat_raw_top_logprobs_b64"):
            values, ids = best.values.numpy().astype("<f4"), best.indices.numpy().astype("<i4")
            meta |= {
                "input_top_logprobs_val_flat_b64": base64.b64encode(values.tobytes()).decode(),
                "input_top_logprobs_idx_flat_b64": base64.b64encode(ids.tobytes()).decode(),
                "input_top_logprobs_val_flat_b64_dtype": "float32",
                "input_top_logprobs_idx_flat_b64_dtype": "int32",
                "input_top_logprobs_shape": list(values.shape),
                "input_top_logprobs_null_prefix": 1,
            }
        else:
            rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            meta["input_top_logprobs"] = [None, *([[v, i, None] for v, i in zip(*row, strict=True)] for row in rows)]
        return 200, {"text": "x", "meta_info": meta}

    def drop_a_position(self, found: Any) -> None:
        """An answer with one position less."""
        if self.kind == "vllm":
            found["choices"][0]["prompt_logprobs"].pop()
            return
        meta = found["meta_info"]
        if "input_top_logprobs" in meta:
            meta["input_top_logprobs"].pop()
            return
        width = 4 * meta["input_top_logprobs_shape"][1]
        meta["input_top_logprobs_shape"][0] -= 1
        for name in ("input_top_logprobs_val_flat_b64", "input_top_logprobs_idx_flat_b64"):
            meta[name] = base64.b64encode(base64.b64decode(meta[name])[:-width]).decode()


def _bad_request(text: str) -> tuple[int, Any]:
    return 400, {"error": {"message": text, "type": "BadRequestError", "param": None, "code": 400}}


@contextmanager
def serving(server: ModelServer) -> Iterator[str]:
    """The URL of the server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._do("GET", {})

        def do_POST(self) -> None:
            self._do("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *text: Any) -> None:
            """No log."""

        def _do(self, method: str, body: dict[str, Any]) -> None:
            with server._lock:
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                status, found, fault = server.answer(method, self.path, body, self.headers)
                self._fail(fault, found) if fault else self._reply(status, json.dumps(found).encode())
            finally:
                with server._lock:
                    server.at_once -= 1

        def _reply(self, status: int, data: bytes, length: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.end_headers()
            self.wfile.write(data)

        def _fail(self, fault: str, found: Any) -> None:
            if fault == "count":
                server.drop_a_position(found)
            data = json.dumps(found).encode()
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
            elif fault.isdigit():
                retry = {"Retry_After": "0.01"} if fault == "429" else {}
                self._reply(int(fault), b'{"error": {"message": "overloaded"}}', **retry)
            elif fault in ("slow", "stalled"):
                self._reply(200, data[: len(data) // 2], len(data))
                self.wfile.flush()
                time.sleep(0.02 if fault == "slow" else TOO_LONG)
                try:
                    self.wfile.write(data[len(data) // 2 :])
                except OSError:  # the client has given up
                    self.close_connection = True
            elif fault == "truncated":
                self._reply(200, data[: len(data) // 2], len(data))
                self.close_connection = True
            elif fault == "html":
                self._reply(200, b"<html>Bad Gateway</html>", Content_Type="text/html")
            else:
                self._reply(200, {"half": data[: len(data) // 2], "empty": b""}.get(fault, data))

    with http_server(Handler) as url:
        yield url


def array_of(answer: Any) -> Any:
    """The entries of a `TopK` as pairs of arrays, best first."""
    order = np.argsort(-answer.logprobs.numpy(), axis=-1, kind="stable")
    return [np.take_along_axis(x.numpy(), order, -1) for x in (answer.ids, answer.logprobs)]
