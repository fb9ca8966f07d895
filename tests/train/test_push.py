"""Uploads to the Hugging Face Hub, against a server of this process that speaks the part of its interface they use."""

import base64
import http.server
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from http_server import http_server
from train_cases import SMALL, make_cache

from fastkd.cache import Cache
from fastkd.cli.main import main
from fastkd.errors import TrainError
from fastkd.models.upload import Upload, check_base, check_upload

TOKEN = "hf_Canary0123456789Secret"


class Hub(http.server.BaseHTTPRequestHandler):
    """whoami, create_repo and commits of small files. refuse: the status of requests whose path has this text."""

    refuse: dict[str, int]
    role: str
    files: dict[str, bytes]
    calls: list[str]
    created: dict[str, Any]

    def log_message(self, *args: Any) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def answer(self, document: Any, status: int = 200) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.handle_any()

    def do_POST(self) -> None:
        self.handle_any()

    def handle_any(self) -> None:
        body = self.body()
        self.calls.append(self.path)
        for text, status in self.refuse.items():
            if text in self.path:
                return self.answer({"error": "refused"}, status)
        if self.headers["authorization"] != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        url = f"http://{self.headers['Host']}/me/student"
        if self.path == "/api/whoami-v2":
            token = {"accessToken": {"role": self.role}}
            return self.answer({"name": "me", "type": "user", "orgs": [{"name": "lab"}], "auth": token})
        if self.path == "/api/repos/create":
            self.created.update(json.loads(body))
            return self.answer({"url": url, "name": "me/student"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True})
        return self.answer({"error": "no such page"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The Hub for this process: a local one, which knows the token of HF_TOKEN."""

    Mine = type("Mine", (Hub,), {"refuse": {}, "role": "write", "files": {}, "calls": [], "created": {}})
    with http_server(Mine) as url:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield Mine


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("push") / "prose")


@pytest.fixture
def run(cache: Cache, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """`fastkd train --push me/student`; the token is nowhere."""
    flags = [x for name, value in {**SMALL, "steps": 2}.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    place = cache.store.describe().removeprefix("file://")

    def run(*args: str) -> tuple[int, str, str]:
        out = tmp_path / "run"
        command = ["train", "--student", "train_cases:tiny", "--cache", place, "--out", str(out), *flags, *args]
        status = main(command)
        said, told = capfd.readouterr()
        for path in out.rglob("*"):
            assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
        assert TOKEN not in said + told
        assert "Traceback" not in told
        return status, said, told

    return run


def test_a_student_is_uploaded(hub: type[Hub], run: Any, tmp_path: Path) -> None:
    status, said, told = run("--push", "student", "--push-private", "--json")
    assert status == 0, told
    report = json.loads(said.splitlines()[-1])
    assert report["pushed"].endswith("/me/student")
    student = tmp_path / "run" / "student"
    assert hub.files == {path.name: path.read_bytes() for path in student.iterdir()}
    assert "README.md" in hub.files
    assert hub.created["name"] == "student"
    assert hub.created.get("private") or hub.created["visibility"] == "private"
    hub.files.clear()
    status, said, _ = run("--push", "me/student")
    assert status == 0
    assert "uploaded to http" in said
    assert hub.files


@pytest.mark.parametrize(
    ("refuse", "why"),
    [
        ({"/commit/": 403}, "the token may not write there (403)"),
        ({"/create": 401}, "does not accept the token (401)"),
        ({"/preupload/": 400}, "refused it (400;"),
    ],
)
def test_a_failed_upload_loses_nothing(
    refuse: dict[str, int], why: str, hub: type[Hub], run: Any, tmp_path: Path
) -> None:
    hub.refuse = refuse
    status, said, told = run("--push", "me/student")
    student = tmp_path / "run" / "student"
    assert status == 1
    assert f"student: {student}" in said
    sentence = told.strip().splitlines()[-1]
    assert why in sentence
    assert sentence.endswith(f"To upload it later: hf upload me/student {student}")
    assert (student / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["report"]["complete"]
    hub.refuse = {}
    assert run("--push", "me/student")[0] == 0


def test_what_cannot_be_is_said_before_the_training(
    hub: type[Hub], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, repo: str = "me/student") -> None:
        status, _, told = run("--push", repo)
        assert status == 1
        assert match in told, told
        assert told.startswith("fastkd: ")
        assert len(told.strip().splitlines()) == 1
        assert not (tmp_path / "run" / "run.json").exists()
        assert not any("/create" in call for call in hub.calls)

    refused("--push a/b/c: expected OWNER/NAME", "a/b/c")
    refused("expected a repository of me, lab", "you/x")
    hub.role = "read"
    refused("a token of me that may only read. Log in with a token that may write (`hf auth login`, or HF_TOKEN)")
    hub.refuse = {"whoami": 401}
    refused("does not accept the token (401)")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    refused("the Hugging Face Hub gave no answer (")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE forbids uploads")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused("got no token for the Hugging Face Hub. Log in with a token that may write")


def test_the_repository_is_of_the_owner(hub: type[Hub]) -> None:
    assert check_upload("student") == Upload("me/student")
    assert check_upload("lab/student", private=True) == Upload("lab/student", True)
    assert Upload("a/b", True).command(Path("x y")) == "hf upload a/b 'x y' --private"
    with pytest.raises(TrainError, match="expected OWNER/NAME"):
        check_upload("--x")


def test_an_adapter_of_a_folder_is_not_shared(
    hub: type[Hub], cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others could not load it, and its config would name the folder."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    place = cache.store.describe().removeprefix("file://")
    args = ["train", "--cache", place, "--out", str(tmp_path / "run"), "--push", "me/student"]
    for more in (["--student", str(base), "--lora-rank", "2"], ["--student", str(adapter)]):
        assert main([*args, *more]) == 1
        assert f"--push: got an adapter of the folder {base}; expected a base that is" in capsys.readouterr().err
    assert not hub.calls
    check_base(str(adapter / "none"), adapter=True)
    check_base(str(base), adapter=False)
