"""A secret in arguments, URLs and the environment: no command writes it to a file or says it."""

import functools
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from train_cases import SMALL, documents, make_cache

from fastkd.cli.main import main

SECRET = "Canary-7c1f3e-Secret"
SMALL_FLAGS = [x for name, value in SMALL.items() for x in (f"--{name.replace('_', '-')}", str(value))]


def data() -> list[list[int]]:
    """A factory for --data."""
    return documents()


def failing() -> Any:
    """A factory whose error has the secret, as errors of libraries may."""
    raise ValueError(f"401 for https://user:{SECRET}@hub/model?token={SECRET}, password={SECRET}")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("canary")
    make_cache(place / "served" / "cache")
    return place


@pytest.fixture
def server(place: Path) -> Iterator[str]:
    """host:port of a server that takes any credentials and signature."""
    handler = functools.partial(Quiet, directory=str(place / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command, as a shell does, in an environment with the secret; then search all that it wrote and said."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "name")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str]:
        arguments = [str(arg) for arg in args]
        monkeypatch.setattr(sys, "argv", ["/usr/bin/fastkd", *arguments])
        status = main(arguments)
        out, err = capfd.readouterr()
        assert SECRET not in out + err, f"{arguments}: {out}{err}"
        assert "Traceback" not in err
        leaks = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
        assert not leaks, f"{arguments}: {leaks}"
        assert not [path for path in tmp_path.rglob("*") if SECRET in path.name]
        return status, out + err

    return run


def test_from_a_cache_behind_a_password(run: Any, server: str, tmp_path: Path) -> None:
    """What is written tells the address and not the password, and is the same otherwise."""
    url = f"http://user:{SECRET}@{server}/cache?X-Amz-Signature={SECRET}&x=1"
    assert run("inspect", url)[0] == 0
    assert run("verify", url, "--deep")[0] == 0
    train = ["--student", "train_cases:tiny", "--cache", url, *SMALL_FLAGS]
    status, _ = run("train", *train, "--out", tmp_path / "run", "--control", "--json")
    assert status == 0
    for name in ("run.json", "control/run.json"):
        document = json.loads((tmp_path / "run" / name).read_text())
        assert f"http://…@{server}/cache?…" in document["command"]
    assert run("train", *train, "--out", tmp_path / "run")[0] == 0  # again: it is complete
    assert run("sweep", *train, "--out", tmp_path / "sweep", "--alpha", "0", "1", "--seeds", "1")[0] == 0
    arm = tmp_path / "sweep" / "alpha=0,rate=0.01" / "seed=0"
    status, _ = run("report", tmp_path / "run", arm, "--out", tmp_path / "a.html")
    assert status == 0
    assert "fastkd train" in (tmp_path / "a.html").read_text()


def test_addresses_that_cannot_be_opened(run: Any, tmp_path: Path) -> None:
    http_url = f"http://user:{SECRET}@127.0.0.1:1/x?sig={SECRET}"
    s3_url = f"s3://key:{SECRET}@bucket/x?token={SECRET}"
    for url in (http_url, s3_url, f"https://it's:{SECRET}@127.0.0.1:1/x", f"nowhere://{SECRET}@host/x"):
        for command in (
            ["inspect", url],
            ["verify", url],
            ["seal", url],
            ["train", "--student", "train_cases:tiny", "--cache", url, "--out", tmp_path / "run"],
            ["train", "--student", url, "--cache", "nowhere", "--out", tmp_path / "run"],
            ["sweep", "--student", "train_cases:tiny", "--cache", url, "--out", tmp_path / "run", "--alpha", "0"],
            ["capture", "--teacher", url, "--data", "test_canary:data", "--out", tmp_path / "cache"],
            ["capture", "--teacher", "train_cases:tiny", "--data", url, "--out", tmp_path / "cache"],
            ["capture", "--teacher", "train_cases:tiny", "--data", "test_canary:data", "--out", url],
            ["plan", "--teacher", url, "--data", "test_canary:data"],
            ["plan", "--teacher", "train_cases:tiny", "--data", url],
            ["report", url],
        ):
            if url == http_url or command[0] == "inspect" or command[:3] == ["train", "--student", url]:
                assert run(*command)[0] in (1, 2, 75)


def test_errors_of_others(run: Any, place: Path, tmp_path: Path) -> None:
    cache = place / "served" / "cache"
    for command in (
        ["capture", "--teacher", "test_canary:failing", "--data", "test_canary:data", "--out", tmp_path / "cache"],
        ["capture", "--teacher", "train_cases:tiny", "--data", "test_canary:failing", "--out", tmp_path / "cache"],
        ["train", "--student", "test_canary:failing", "--cache", cache, "--out", tmp_path / "run"],
        ["verify", cache, "--teacher", "test_canary:failing"],
        ["plan", "--teacher", "test_canary:failing", "--data", "test_canary:data"],
    ):
        assert run(*command)[0] == 1


def test_a_capture(run: Any, tmp_path: Path) -> None:
    """With notes of a teacher that is named by an address."""
    status, _ = run(
        "capture", "--teacher", "train_cases:tiny", "--data", "test_canary:data", "--out", tmp_path / "cache", "--json",
        "--context", "16", "--shard-positions", "64",
    )  # fmt: skip
    assert status == 0
    assert run("plan", "--teacher", "train_cases:tiny", "--data", "test_canary:data", "--seconds", "0.1")[0] == 0
    assert run("verify", tmp_path / "cache", "--teacher", "train_cases:tiny")[0] == 0


def test_usage_errors_and_tracebacks(tmp_path: Path) -> None:
    url = f"http://user:{SECRET}@host/x?sig={SECRET}"
    for code in (
        f"from fastkd.__main__ import run; import sys; sys.argv[1:] = ['train', '--cache', {url!r}, {url!r}]; run()",
        "import fastkd.cli.main as m; from fastkd.__main__ import run; import sys; sys.argv[1:] = ['inspect', 'x']\n"
        f"def fail(command): raise ZeroDivisionError('at ' + {url!r})\n"
        "m._COMMANDS[m.Inspect] = fail; run()",
    ):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert found.returncode in (1, 2)
        shown = "".join(line for line in (found.stdout + found.stderr).splitlines() if not line.startswith("    "))
        assert SECRET not in shown
