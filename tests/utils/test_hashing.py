"""Hashes of files: right whatever happened to the file or to the cache, and computed once where nothing did."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

from fastkd.data.documents import open_documents
from fastkd.utils import hashing as fingerprints
from fastkd.utils.hashing import cache_folder, file_sha256, files_sha256


class Hashing:
    """Counts the files that are really read through."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        patch.setattr(fingerprints, "hashlib", self)

    def sha256(self, data: bytes = b"") -> Any:
        self.runs += not data  # entries' names are hashes too, of given data
        return hashlib.sha256(data)


@pytest.fixture
def hashing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hashing:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "SETTLED", 0.0)
    return Hashing(monkeypatch)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    time.sleep(0.02)  # past the tick of the file system's clock
    return path


def test_a_file_is_hashed_once(hashing: Hashing, tmp_path: Path) -> None:
    path = written(tmp_path / "a", b"x" * 5_000_000)
    told: list[int] = []
    for _ in range(3):
        assert file_sha256(path, told.append) == (sha(path), 5_000_000)
    assert hashing.runs == 1
    assert sum(told) == 15_000_000


def test_by_whatever_name_it_is_reached(hashing: Hashing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a", b"x")
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    assert file_sha256("a") == file_sha256(tmp_path / "link") == file_sha256(path) == (sha(path), 1)
    assert hashing.runs == 1


@pytest.mark.parametrize("how", ["longer", "same size", "times put back", "replaced", "swapped"])
def test_a_changed_file_is_hashed_again(hashing: Hashing, tmp_path: Path, how: str) -> None:
    path = written(tmp_path / "a", b"before")
    file_sha256(path)
    was = path.stat()
    other = written(tmp_path / "b", b"behind")
    file_sha256(other)
    if how == "longer":
        written(path, b"before and after")
    elif how in ("same size", "times put back"):
        written(path, b"behold")
        if how == "times put back":
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    else:
        os.utime(other, ns=(was.st_atime_ns, was.st_mtime_ns))
        other.replace(path)
    assert file_sha256(path) == (sha(path), path.stat().st_size)


def test_a_file_that_just_changed_is_not_remembered(
    hashing: Hashing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED", 2.0)
    path = tmp_path / "a"
    for text in (b"one", b"two", b"six"):  # within a tick, of one size, in one inode
        path.write_bytes(text)
        assert file_sha256(path)[0] == sha(path)
    assert not list(tmp_path.glob("cache/**/*"))
    # nor one from the future, of a clock that is not ours
    os.utime(path, (time.time() + 100, time.time() + 100))
    file_sha256(path)
    assert not list(tmp_path.glob("cache/**/*"))


def test_a_file_that_changes_meanwhile_is_not_remembered(hashing: Hashing, tmp_path: Path) -> None:
    path = written(tmp_path / "a", b"x" * 9_000_000)

    def grow(_: int) -> None:
        if path.stat().st_size == 9_000_000:
            with open(path, "ab") as file:
                file.write(b"y")

    file_sha256(path, grow)
    assert file_sha256(path) == (sha(path), path.stat().st_size)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}\n" + b"0" * 64 + b"\n", b"x" * 99])
def test_a_broken_cache_is_no_cache(hashing: Hashing, tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "a", b"x")
    file_sha256(path)
    (entry,) = (cache_folder() / "sha256").iterdir()
    entry.write_bytes(content)
    assert file_sha256(path)[0] == sha(path)
    assert file_sha256(path)[0] == sha(path)
    assert hashing.runs == 2


@pytest.mark.parametrize("where", ["/proc/nowhere", "file"])
def test_an_unwritable_cache_is_no_cache(
    hashing: Hashing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / where))
    path = written(tmp_path / "a", b"x")
    assert file_sha256(path)[0] == file_sha256(path)[0] == sha(path)


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for home in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        assert cache_folder() == tmp_path / ".cache" / "fastkd"


def test_documents_are_read_once(hashing: Hashing, tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{name}.txt", name.encode() * 9) for name in "ab"]
    options: dict[str, Any] = {"tokenizer": lambda text: list(text.encode()), "tokenizer_fingerprint": "bytes"}
    first = open_documents(paths, **options).fingerprint()
    assert hashing.runs == 2
    assert open_documents(paths, **options).fingerprint() == first
    assert hashing.runs == 2
    written(paths[1], b"c" * 9)
    assert open_documents(paths, **options).fingerprint() != first


def test_progress_on_request(
    hashing: Hashing, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkd.utils.progress.LINE_SECONDS", 0.0)
    path = written(tmp_path / "a", b"x" * 2048)
    assert files_sha256([path, path]) == [(sha(path), 2048)] * 2
    assert capfd.readouterr().err == ""
    files_sha256([path], progress=True)
    assert "2.0 kB of 2.0 kB (100.0%)" in capfd.readouterr().err
