"""A server as a teacher: what our side of it takes.

    python bench/bench_server.py [--k 64] [--documents N] [--rate R] [--server http://host:port] [--json PATH]

Without a server: a process sends ready answers of vLLM's form (JSON), of SGLang's nested form (JSON) and of its flat
one (base64) as fast as it can, so that the client is measured: core time a position of parsing alone (by msgspec, and
by the standard library's json) and of the whole capture, encoding and writing included, and the positions/s at
which that is a tenth of the wall time. Then it is a server of R positions/s (2,000), and captures are compared with
bare requests, whose answers are thrown away.
With --server: the same comparison with a real one.
"""

import argparse
import base64
import http.server
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import fastkd
from fastkd.bench.suites import Case, RunConfig
from fastkd.bench.table import Table
from fastkd.cache.stores import MemoryStore
from fastkd.teachers.server import sglang, vllm
from fastkd.teachers.server.options import ServerOptions
from fastkd.teachers.server.teacher import ServerTeacher

LENGTH, VOCAB = 512, 49152  # tokens of a document
FORMS = ("vllm", "sglang nested", "sglang flat")


def body_of(form: str, positions: int, k: int) -> bytes:
    """An answer for that many positions, the added one not counted."""
    random = np.random.default_rng(0)
    logits = np.sort(random.standard_normal((positions, k)) * 3, 1)[:, ::-1]
    logprobs = (logits - np.log(np.exp(logits).sum(1, keepdims=True)) - 0.05).astype(np.float32)
    ids = np.argsort(random.random((positions, 4 * k)), 1)[:, :k].astype(np.int32) * 7 + 5
    if form == "vllm":
        rows: list[Any] = [None]
        for row, tokens in zip(logprobs.tolist(), ids.tolist(), strict=True):
            said = zip(tokens, row, range(1, k + 1), strict=True)
            entries = {str(t): {"logprob": v, "rank": r, "decoded_token": " word"} for t, v, r in said}
            rows.append({"3": {"logprob": -12.3456, "rank": 5678, "decoded_token": " actual"}} | entries)
        return json.dumps({"choices": [{"index": 0, "text": "x", "prompt_logprobs": rows}]}).encode()
    meta: dict[str, Any] = {"input_token_logprobs": [[-1.2345, 17, None]] * (positions + 1)}
    if form == "sglang nested":
        rows = [
            [[v, t, None] for v, t in zip(*row, strict=True)]
            for row in zip(logprobs.tolist(), ids.tolist(), strict=True)
        ]
        meta["input_top_logprobs"] = [None, *rows]
    else:
        side = "input_top_logprobs"
        meta |= {
            f"{side}_val_flat_b64": base64.b64encode(logprobs.tobytes()).decode(),
            f"{side}_idx_flat_b64": base64.b64encode(ids.tobytes()).decode(),
            f"{side}_val_flat_b64_dtype": "float32",
            f"{side}_idx_flat_b64_dtype": "int32",
            f"{side}_shape": [positions, k],
            f"{side}_null_prefix": 1,
        }
    return json.dumps({"text": "x", "meta_info": meta}).encode()


def replay(form: str, bodies: dict[int, bytes], port: Any, rate: float) -> None:
    """A server that sends these answers, by the tokens of the prompt. rate: positions/s, at most."""
    busy = threading.Lock()
    kind = form.partition(" ")[0]
    about: dict[str, Any] = {"/v1/models": {"data": [{"id": "m", "owned_by": kind, "max_model_len": 4096}]}}
    about |= {path: {"version": "0", "model_path": "m"} for path in ("/version", "/model_info", "/server_info")}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send(json.dumps(about[self.path]).encode())

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = asked.get("prompt") or asked["input_ids"]
            with busy:
                time.sleep((len(prompt) - 1) / rate)
            self.send(bodies.get(len(prompt) - 1, b"{}"))

        def send(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *text: Any) -> None:
            """No log."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_address[1])
    server.serve_forever()


def texts(count: int) -> list[list[int]]:
    return np.random.default_rng(1).integers(0, VOCAB, (count, LENGTH)).tolist()


def capture(url: str, count: int, k: int, **options: Any) -> tuple[float, float, float]:
    """Wall seconds, core seconds, and seconds of parsing, of a capture into memory."""
    teacher = ServerTeacher(url, ServerOptions(**options))
    _ = teacher.fingerprint
    wall, core, parsed = time.perf_counter(), time.process_time(), teacher.client.figures["parse_seconds"]
    report = fastkd.capture(
        teacher, texts(count), MemoryStore(), k=k, draws=0, temperatures=(1.0,), context=LENGTH, held_out=0.0
    )
    assert report.complete
    return (
        time.perf_counter() - wall,
        time.process_time() - core,
        teacher.client.figures["parse_seconds"] - parsed,
    )


def bare(url: str, count: int, k: int, concurrency: int) -> float:
    """Wall seconds of the requests alone."""
    teacher = ServerTeacher(url, ServerOptions(concurrency=concurrency))
    api, served = teacher._found
    begun = time.perf_counter()
    asked = [
        teacher.client.submit(
            api.PATH, len, lambda t=tokens: api.request(served, [*t, t[0]], k), tokens=LENGTH, limit=2**30,  # type: ignore[misc]
            stop=threading.Event(),
        )
        for tokens in texts(count)
    ]  # fmt: skip
    for future in asked:
        future.result()
    return time.perf_counter() - begun


def core_seconds(function: Any, *arguments: Any) -> float:
    """Of a call, the mean of ten."""
    begun = time.process_time()
    for _ in range(10):
        function(*arguments)
    return (time.process_time() - begun) / 10


@contextmanager
def replayed(form: str, bodies: dict[int, bytes], rate: float) -> Iterator[str]:
    """The URL of such a server, in a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=replay, args=(form, bodies, theirs, rate), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def client_alone(form: str, count: int, k: int, rate: float) -> dict[str, Any]:
    """What the client takes of answers of a form."""
    api: Any = vllm if form == "vllm" else sglang
    bodies = {length: body_of(form, length, k if length == LENGTH else 16) for length in (LENGTH, 24)}
    body = bodies[LENGTH]
    api.parse(body, LENGTH, k)
    seconds = {"parse": core_seconds(api.parse, body, LENGTH, k), "json": core_seconds(json.loads, body)}
    with replayed(form, bodies, 1e9) as url:
        capture(url, 4, k, concurrency=4, vocab_size=VOCAB)
        wall, core, _ = capture(url, count, k, concurrency=4, vocab_size=VOCAB)
    with replayed(form, bodies, rate) as url:
        alone = bare(url, count, k, 4)
        limited, _, _ = capture(url, count, k, concurrency=4, vocab_size=VOCAB)
    positions = count * LENGTH
    return {
        "form": form,
        "bytes_per_position": len(body) / LENGTH,
        "parse_us": 1e6 * seconds["parse"] / LENGTH,
        "json_loads_us": 1e6 * seconds["json"] / LENGTH,
        "capture_core_us": 1e6 * core / positions,
        "positions_per_second": positions / wall,
        "a_tenth_at": 0.1 * positions / core,
        "rate": rate,
        "capture_to_bare": limited / alone,
    }


def cases(ask: RunConfig) -> Sequence[Case]:
    """A case for each form of the answers."""

    def case(form: str) -> Callable[[Table], None]:
        return lambda table: tabled(table, client_alone(form, ask.size(8, 64), 64, 2000.0))

    return [Case(form, case(form)) for form in FORMS]


def tabled(table: Table, found: dict[str, Any]) -> None:
    """Add what `client_alone` found to a table."""
    table.title(f"answers of {found['form']}, {found['bytes_per_position']:,.0f} bytes a position")
    table.value("parsing, core time a position", found["parse_us"], "us")
    table.value("json.loads alone", found["json_loads_us"], "us")
    table.value("whole capture, core time a position", found["capture_core_us"], "us")
    table.value("a tenth of the wall time at", found["a_tenth_at"], "positions/s")
    table.ratio(f"capture at {found['rate']:,.0f} positions/s", found["capture_to_bare"], "bare requests", "<= 1.10")


def with_server(url: str, count: int, k: int, concurrency: int) -> dict[str, float]:
    """A capture against the bare requests, twice each, in turn."""
    bare(url, 2, k, concurrency)
    walls: list[list[float]] = []
    for _ in range(2):
        alone = bare(url, count, k, concurrency)
        wall, core, parsed = capture(url, count, k, concurrency=concurrency)
        walls.append([alone, wall, core, parsed])
    alone, wall, core, parsed = np.array(walls).mean(0).tolist()
    positions = count * LENGTH
    found = {
        "bare": alone,
        "capture": wall,
        "ratio": wall / alone,
        "core_share": core / wall,
        "parse_share": parsed / wall,
    }
    print(
        f"{positions:,} positions: bare requests {positions / alone:,.0f} positions/s; capture takes "
        f"{wall / alone:.3f} times as long; our core time is {core / wall:.1%} of it, parsing {parsed / wall:.1%}"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2000.0)
    parser.add_argument("--server")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.server:
        found = with_server(args.server, args.documents, args.k, args.concurrency)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=2) + "\n")
        return
    table = Table("cpu", "server")
    for form in FORMS:
        tabled(table, client_alone(form, args.documents, args.k, args.rate))
    table.save(args.json)


if __name__ == "__main__":
    main()
