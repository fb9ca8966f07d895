"""A real server of vLLM on loopback, for the long tests. `python tests/real_server.py MODEL` records its answers."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UP_SECONDS = 600.0


@contextmanager
def vllm_server(model: Path, *arguments: str) -> Iterator[str]:
    """The URL of a server of this model, once it is up; ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", str(model), "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--enforce-eager", "--gpu-memory-utilization", "0.25", *arguments]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            stdout=log,
            stderr=log,
            env=environment,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + UP_SECONDS
            while not _is_up(url):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"vLLM did not start:\n{log.read()[-4000:].decode(errors='replace')}")
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def ask(url: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def record(url: str) -> dict[str, Any]:
    """What tests read in place of a server: answers as they came, without their times and ids."""
    found: dict[str, Any] = {}
    found["models"], found["version"] = ask(url, "/v1/models")[1], ask(url, "/version")[1]
    usual = {"model": "smollm2", "max_tokens": 1, "temperature": 0.0, "add_special_tokens": False}
    for name, k, prompt in (
        ("completion", 4, [504, 2365, 6354, 16438, 28]),  # " The quick brown fox,"
        ("completion_20", 20, [1, 4093, 198, 19556]),
    ):
        request = usual | {"prompt": prompt, "prompt_logprobs": k}
        found[name] = {"request": request, "answer": ask(url, "/v1/completions", request)[1]}
    for name, more in (
        ("refused_bias", {"logit_bias": {"2147483647": 1.0}}),
        ("refused_k", {"prompt_logprobs": 2147483647}),
        ("refused_token", {"prompt": [2147483647]}),
        ("refused_model", {"model": "another"}),
    ):
        status, answer = ask(url, "/v1/completions", usual | {"prompt": [0]} | more)
        found[name] = {"status": status, "answer": answer}
    found["tokenize"] = ask(url, "/tokenize", {"model": "smollm2", "prompt": "A fox", "add_special_tokens": False})[1]
    for model in found["models"]["data"]:
        model.pop("permission", None)
        model["created"], model["root"] = 0, "/models/SmolLM2-135M-Instruct"
    for name in ("completion", "completion_20"):
        found[name]["answer"] |= {"id": "cmpl-0", "created": 0}
    return found


if __name__ == "__main__":
    with vllm_server(Path(sys.argv[1]), "--max-model-len", "512") as address:
        out = Path(__file__).parent / "teachers" / "recorded" / "vllm.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(record(address), indent=1, ensure_ascii=False) + "\n")
        print(out)
