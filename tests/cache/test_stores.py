"""Stores: one conformance class over all that can run here, then what each promises on its own."""

import errno
import functools
import http.server
import itertools
import json
import logging
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import threading
import traceback
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import obstore
import pytest
from cache_cases import make_shard, make_spec
from feature_cases import make_base, make_states, write_feature
from fsspec.implementations.dirfs import DirFileSystem
from http_server import http_server
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.threaded_moto_server import create_backend_app
from moto.server import DomainDispatcherApplication
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store
from obstore.store import LocalStore as ObstoreLocalStore
from obstore.store import MemoryStore as ObstoreMemoryStore
from werkzeug.serving import make_server

from fastkd.cache import create_cache, drop_feature, open_cache, verify_cache
from fastkd.cache.errors import CacheError, NotFound, ReadOnly, StoreError
from fastkd.cache.stores import (
    Entry,
    FsspecStore,
    HttpStore,
    LocalStore,
    MemoryStore,
    Store,
    open_store,
    register_store,
)
from fastkd.cache.stores.base import BaseStore

SECRET = "s3cret"


class S3:
    """moto's S3 on loopback, one request at a time, with faults to order.

    moto looks for the object and then writes it; that two requests cannot come between each other's look and write, as
    S3 promises for `If-None-Match`, is the lock's doing.
    """

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.lock = threading.Lock()
        self.requests: list[tuple[str, str]] = []
        self.ignore_condition = False
        self.fault: Callable[[str, int], tuple[int, bool] | None] | None = None
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = make_server("127.0.0.1", 0, self.serve, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/bucket", method="PUT")).close()

    def serve(self, environ, start_response):
        with self.lock:
            self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
            if self.fault and (answer := self.fault(environ["REQUEST_METHOD"], len(self.requests))):
                status, commit = answer
                if commit:
                    list(self.app(environ, lambda *_: None))
                start_response(f"{status} fault", [("Content-Length", "0")])
                return [b""]
            # What is not signed (Azure's requests) would see no private object.
            environ.setdefault("HTTP_AUTHORIZATION", "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request")
            if self.ignore_condition:
                environ.pop("HTTP_IF_NONE_MATCH", None)
            return list(self.app(environ, start_response))

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Without a request, and so a hundred times as fast."""
        get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, key, data)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    server = S3()
    yield server
    server.server.shutdown()
    server.server.server_close()
    server.thread.join()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3_server.requests.clear()
    yield s3_server
    s3_server.fault, s3_server.ignore_condition = None, False


class ToyStore(BaseStore):
    """A kind of store from outside the package, in as few lines as one takes."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()

    def describe(self) -> str:
        return "toy://here"

    def _read(self, key: str, length: int | None) -> bytes:
        if key not in self.objects:
            raise FileNotFoundError("absent")
        return self.objects[key][-(length or 0) :]

    def _entries(self, folders: list[str]) -> Iterator[Entry]:
        return (Entry(key, len(data)) for key, data in list(self.objects.items()))

    def _put(self, key: str, data: memoryview) -> bool:
        with self.lock:
            if key in self.objects:
                return False
            self.objects[key] = bytes(data)
            return True


@register_store("toy://")
def open_toy(url: str, create: bool) -> ToyStore:
    return ToyStore()


@pytest.fixture(
    params=[
        "toy",
        "local",
        "local url",
        "memory",
        "obstore local",
        "obstore memory",
        "s3",
        "fsspec local",
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A fresh, empty store that can be written."""
    match request.param:
        case "toy":
            return open_store("toy://here")
        case "local":
            return open_store(tmp_path / "cache", create=True)
        case "local url":
            return open_store((tmp_path / "a cache").as_uri(), create=True)
        case "memory":
            return open_store(f"memory://{uuid.uuid4()}")
        case "obstore local":
            return open_store(ObstoreLocalStore(tmp_path / "cache", mkdir=True))
        case "obstore memory":
            return open_store(ObstoreMemoryStore())
        case "s3":
            request.getfixturevalue("s3")
            return open_store(f"s3://bucket/{uuid.uuid4()}")
        case _:
            (tmp_path / "cache").mkdir()
            return open_store(FsspecStore(fsspec.filesystem("file"), str(tmp_path / "cache")))


BAD_KEYS = ["", "/a", "a/", "a//b", "..", "../a", "a/../b", "./a", "a\\b", "a\0b", "a\nb", "attempts/a", "a\udc80b"]


class TestConformance:
    """What every store that can be written promises."""

    def test_is_a_store(self, store: Store) -> None:
        assert isinstance(store, Store)
        assert open_store(store) is store
        assert not store.readonly

    def test_create_once(self, store: Store) -> None:
        assert store.create("shards/0.bin", b"first") is True
        assert store.create("shards/0.bin", b"second") is False
        assert store.get("shards/0.bin") == b"first"
        assert store.create("spec.json", memoryview(b"_{}_")[1:3])
        assert store.get("spec.json") == b"{}"
        assert type(store.get("spec.json")) is bytes

    def test_views_of_arrays(self, store: Store) -> None:
        assert store.create("a", memoryview(np.arange(6.0).reshape(2, 3)))
        assert np.array_equal(np.frombuffer(store.get("a")), np.arange(6.0))
        assert store.create("b", memoryview(np.empty(0)))
        assert store.get("b") == b""
        with pytest.raises(TypeError, match="contiguous"):
            store.create("c", memoryview(np.arange(6.0))[::2])

    def test_absent(self, store: Store) -> None:
        with pytest.raises(NotFound, match=r"'shards/0\.bin'"):
            store.get("shards/0.bin")
        with pytest.raises(NotFound, match=r"'shards/0\.bin'"):
            store.get_tail("shards/0.bin", 4)
        assert list(store.list("shards/")) == []
        assert store.sweep() == []

    def test_tail(self, store: Store) -> None:
        store.create("a", b"0123456789")
        assert store.get_tail("a", 4) == b"6789"
        assert store.get_tail("a", 10) == b"0123456789"
        assert store.get_tail("a", 100) == b"0123456789"
        with pytest.raises(ValueError, match="at least one byte"):
            store.get_tail("a", 0)

    def test_empty(self, store: Store) -> None:
        assert store.create("a", b"")
        assert not store.create("a", b"x")
        assert not store.create("a", b"")
        assert store.get("a") == b""
        assert store.get_tail("a", 5) == b""
        assert list(store.list("")) == [Entry("a", 0)]

    def test_large(self, store: Store) -> None:
        data = np.random.default_rng(0).bytes(20_000_000)
        assert store.create("shards/big", data)
        assert not store.create("shards/big", data[::-1])
        assert store.get("shards/big") == data
        assert store.get_tail("shards/big", 1000) == data[-1000:]

    def test_list(self, store: Store) -> None:
        sizes = {"shards/0": 3, "shards/1": 5, "shards/in/2": 7, "shardsx/3": 1, "spec.json": 2}
        for key, size in sizes.items():
            store.create(key, b"x" * size)
        assert sorted(store.list("shards/")) == [("shards/0", 3), ("shards/1", 5), ("shards/in/2", 7)]
        assert sorted(store.list("shards/in/")) == [("shards/in/2", 7)]
        assert sorted(entry.key for entry in store.list("sh")) == ["shards/0", "shards/1", "shards/in/2", "shardsx/3"]
        assert dict(store.list("")) == sizes
        assert list(store.list("none/")) == []
        store.create("shards/4", b"")
        assert ("shards/4", 0) in list(store.list("shards/"))

    def test_odd_names(self, store: Store) -> None:
        key = "shards/a b+c%20#1é*?=&.bin"
        assert store.create(key, b"odd")
        assert store.get(key) == b"odd"
        assert [entry.key for entry in store.list("shards/")] == [key]

    def test_bad_keys(self, store: Store) -> None:
        for key, call in itertools.product(
            BAD_KEYS, (store.get, lambda k: store.get_tail(k, 1), lambda k: store.create(k, b""))
        ):
            with pytest.raises(StoreError, match="no key of an object"):
                call(key)
        assert list(store.list("")) == []

    def test_bad_prefixes(self, store: Store) -> None:
        for prefix in ("../", "/", "a/../../"):
            with pytest.raises(StoreError, match="no key of an object"):
                store.list(prefix)

    def test_race(self, store: Store) -> None:
        start = threading.Barrier(8)
        won: list[int] = []

        def write(me: int) -> None:
            start.wait()
            if store.create("shards/0", bytes([me]) * 300_000):
                won.append(me)

        threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.get("shards/0") == bytes(won) * 300_000
        assert list(store.list("")) == [("shards/0", 300_000)]
        assert store.sweep() == []

    def test_only_features_are_deleted(self, store: Store) -> None:
        keys = [
            "spec.json",
            "shards/0",
            "features/20/spec.json",
            "features/20/shards/0",
            "features/a%2Fb:at/x",
            "features2",
        ]
        for key in keys:
            store.create(key, b"x")
        if isinstance(store, ToyStore):
            with pytest.raises(ReadOnly, match="does not delete"):
                store.delete("features/20/spec.json")
            return
        for key in ["spec.json", "shards/0", "features2", "features"]:
            with pytest.raises(StoreError, match="never deleted"):
                store.delete(key)
        for key in [*BAD_KEYS, "features/../spec.json", "features//x"]:
            with pytest.raises(StoreError, match="no key of an object"):
                store.delete(key)
        assert sorted(entry.key for entry in store.list("")) == sorted(keys)
        assert store.delete("features/20/spec.json") is True
        assert store.delete("features/20/spec.json") is False
        assert store.delete("features/none/spec.json") is False
        assert store.delete("features/a%2Fb:at/x")
        assert [entry.key for entry in store.list("features/")] == ["features/20/shards/0"]
        assert store.create("features/20/spec.json", b"again")
        assert store.get("features/20/spec.json") == b"again"
        assert store.sweep() == []

    def test_a_feature_is_written_read_and_dropped(self, store: Store) -> None:
        base = make_base(store, 1)
        before = dict(store.list(""))
        write_feature(store, base, 1, name="-1", layer=30, seal=True)
        cache = open_cache(store)
        assert list(cache.features) == ["-1"]
        assert np.array_equal(cache.features["30"].read_shard(0)[0], make_states(0)[0])
        assert cache.verify().ok
        if isinstance(store, ToyStore):
            with pytest.raises(ReadOnly, match="does not delete"):
                drop_feature(store, "-1")
            return
        assert drop_feature(store, "-1") == 4
        assert dict(store.list("")) == before

    def test_says_who_it_is(self, store: Store) -> None:
        name = store.describe()
        assert name in repr(store)
        assert SECRET not in repr(store)
        with pytest.raises(NotFound) as caught:
            store.get("absent")
        assert name in str(caught.value)


CONTENT = {"spec.json": b"{}", "shards/0.bin": bytes(range(256)) * 40, "shards/a b%#é.bin": b"odd", "empty": b""}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files by GET, with ranges, as a web server in front of a bucket has them; behind a password, if one is set."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/secure") and self.headers.get("Authorization") != "Basic dXNlcjpzM2NyZXQ=":
            return self.send_error(401)
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/away", "/seen", 1))
            return self.end_headers()
        if self.path.startswith("/seen"):
            return self.answer(200, json.dumps(dict(self.headers)).encode())
        if self.path.startswith("/broken"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"short")
            return None
        try:
            data = Path(self.translate_path(self.path.removeprefix("/secure").removeprefix("/plain"))).read_bytes()
        except OSError:
            return self.send_error(404)
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=-") and not self.path.startswith("/plain"):
            if not data:
                self.send_response(416)
                self.send_header("Content-Range", "bytes */0")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            tail = data[-int(wanted[7:]) :]
            return self.answer(206, tail, f"bytes {len(data) - len(tail)}-{len(data) - 1}/{len(data)}")
        return self.answer(200, data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, data: bytes, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("content")
    cache = LocalStore(root)
    for key, data in CONTENT.items():
        cache.create(key, data)
    return root


@pytest.fixture(scope="session")
def web(content: Path) -> Iterator[str]:
    with http_server(functools.partial(Quiet, directory=str(content))) as address:
        yield address


def zipped(path: Path, compression: int) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.mkdir("shards")
        for key, data in CONTENT.items():
            archive.writestr(key, data)
    return path


READ_ONLY = ["zip stored", "zip deflated", "http", "http plain", "obstore http", "fsspec http", "fsspec zip"]


@pytest.fixture(params=[*READ_ONLY, "fsspec dir"])
def reader(request: pytest.FixtureRequest, content: Path, tmp_path: Path, web: str) -> Store:
    """A store that is only read, with CONTENT in it."""
    match request.param:
        case "zip stored":
            return open_store(zipped(tmp_path / "c.zip", zipfile.ZIP_STORED))
        case "zip deflated":
            return open_store(str(zipped(tmp_path / "c.zip", zipfile.ZIP_DEFLATED)))
        case "http":
            return open_store(web)
        case "http plain":
            return open_store(f"{web}/plain/")
        case "obstore http":
            return open_store(HTTPStore(web, client_options={"allow_http": True}, retry_config={"max_retries": 0}))
        case "fsspec http":
            return FsspecStore(fsspec.filesystem("http"), web)
        case "fsspec zip":
            path = zipped(tmp_path / "c.zip", zipfile.ZIP_STORED)
            return FsspecStore(fsspec.filesystem("zip", fo=str(path), skip_instance_cache=True), "")
        case _:
            return FsspecStore(DirFileSystem(str(content), fs=fsspec.filesystem("file")), "")


class TestReadOnlyConformance:
    """What every store that is only read promises."""

    def test_reads(self, reader: Store) -> None:
        assert isinstance(reader, Store)
        assert reader.readonly
        for key, data in CONTENT.items():
            assert reader.get(key) == data
            assert reader.get_tail(key, 100) == data[-100:]
            assert reader.get_tail(key, 100_000) == data

    def test_absent(self, reader: Store) -> None:
        for call in (reader.get, lambda key: reader.get_tail(key, 3)):
            with pytest.raises(NotFound, match=r"'shards/9\.bin'"):
                call("shards/9.bin")

    def test_refuses_to_write(self, reader: Store) -> None:
        with pytest.raises(ReadOnly, match=r"Write .* to"):
            reader.create("new", b"")
        assert reader.sweep() == []

    def test_list(self, reader: Store) -> None:
        if "http" in reader.describe():
            with pytest.raises(StoreError, match="sealed"):
                list(reader.list("shards/"))
        else:
            assert dict(reader.list("")) == {key: len(data) for key, data in CONTENT.items()}
            assert sorted(e.key for e in reader.list("shards/")) == ["shards/0.bin", "shards/a b%#é.bin"]

    def test_bad_keys(self, reader: Store) -> None:
        for key in BAD_KEYS:
            with pytest.raises(StoreError, match="no key of an object"):
                reader.get(key)

    def test_pickles(self, reader: Store) -> None:
        assert pickle.loads(pickle.dumps(reader)).get("spec.json") == b"{}"


class TestOpen:
    def test_paths(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match=r"none: not there\. A cache is a folder"):
            open_store(tmp_path / "none")
        store = open_store(os.fsencode(tmp_path / "a" / "b"), create=True)
        assert isinstance(store, LocalStore)
        assert store.describe() == str(tmp_path / "a" / "b")
        (tmp_path / "file").write_text("")
        for create in (True, False):
            with pytest.raises(StoreError, match="file"):
                open_store(tmp_path / "file", create=create)
        with pytest.raises(CacheError, match="only read"):
            open_store(tmp_path / "new.zip", create=True)
        (tmp_path / "folder.zip").mkdir()
        assert isinstance(open_store(tmp_path / "folder.zip"), LocalStore)
        (tmp_path / "bad.zip").write_text("no zip")
        with pytest.raises(StoreError, match="not a zip file"):
            open_store(tmp_path / "bad.zip")
        with pytest.raises(NotFound):
            open_store(tmp_path / "none.zip")

    def test_a_store_from_outside(self) -> None:
        """It is one file: its class, and what registers it."""
        spec = make_spec()
        store = open_store("TOY://here")
        with create_cache(store, spec) as writer:
            writer.write_shard(0, **make_shard(spec))
            writer.seal()
        assert verify_cache(store)
        with pytest.raises(ValueError, match="'toy://' is registered already, for open_toy"):
            register_store("toy://")(lambda url, create: ToyStore())
        with pytest.raises(CacheError, match=r"unknown scheme 'other://'; expected a local folder.* toy://"):
            open_store("other://here")

    def test_memory_is_found_by_name(self) -> None:
        name = f"memory://{uuid.uuid4()}"
        open_store(name).create("a", b"x")
        assert open_store(name).get("a") == b"x"
        with pytest.raises(StoreError, match="other processes"):
            pickle.dumps(MemoryStore())

    @pytest.mark.parametrize("what", ["", "ftp://host/x", "file://host/x", 3, None, "http://", "http://h:p/x", "a\0b"])
    def test_the_unknown(self, what: object) -> None:
        with pytest.raises(CacheError, match=r"expected|names no folder"):
            open_store(what)

    def test_half_known(self) -> None:
        with pytest.raises(CacheError, match=r"FsspecStore\(fs, root\)"):
            open_store(fsspec.filesystem("memory"))
        with pytest.raises(CacheError, match="whole disk"):
            open_store(ObstoreLocalStore())
        with pytest.raises(CacheError, match="obstore cannot open"):
            open_store("az://container/path")

    def test_clouds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", f"sv=1&sig={SECRET}")
        assert repr(open_store("az://container/path")) == "<ObstoreStore az://container/path>"
        assert repr(open_store("gs://bucket/path")) == "<ObstoreStore gs://bucket/path>"

    def test_obstore_is_not_needed_for_the_rest(self, tmp_path: Path) -> None:
        code = """
import sys
sys.modules["obstore"] = None
from fastkd.cache.stores import open_store
assert open_store(sys.argv[1], create=True).create("a", b"")
assert "fsspec" not in sys.modules and "zarr" not in sys.modules
try:
    open_store("s3://bucket")
except Exception as error:
    print(type(error).__name__, error)
"""
        run = subprocess.run([sys.executable, "-c", code, tmp_path / "c"], capture_output=True, text=True, check=True)
        assert run.stdout == "CacheError Object stores need obstore: pip install 'fastkd[cloud]'.\n"


# A child that counts its steps (system calls of `create`), and dies by SIGKILL before the n-th, or waits there.
CHILD = """
import fcntl, os, signal, sys
from fastkd.cache.stores import LocalStore
root, at, how, data = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4].encode() * 100
steps = 0
def counted(name, real):
    def call(*args, **kwargs):
        global steps
        steps += 1
        if steps == at or name == how:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            print(name, flush=True)
            sys.stdin.readline()
        if name == "write":
            args = (args[0], args[1][:400])  # several writes, so that one dies with half of the data on the disk
        return real(*args, **kwargs)
    return call
calls = [(os, name) for name in ("open", "mkdir", "write", "fsync", "link", "unlink", "close")]
for module, name in [*calls, (fcntl, "flock")]:
    setattr(module, name, counted(name, getattr(module, name)))
print(LocalStore(root).create("shards/0", data))
"""
# All of them in forks of one process, which spares the imports.
KILLED_AT_EVERY_STEP = f"""
import os, sys
import fastkd.cache.stores
for at in range(1, 100):
    root = os.path.join(sys.argv[1], str(at))
    os.mkdir(root)
    if (pid := os.fork()) == 0:
        sys.argv = ["", root, str(at), "kill", sys.argv[2]]
        exec({CHILD!r})
        sys.stdout.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(at, status, flush=True)
    if status == 0:
        break
"""


def child(root: Path, at: int, how: str, data: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, root, str(at), how, data],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


class TestLocal:
    def test_killed_at_every_step(self, tmp_path: Path) -> None:
        """Whatever the step, nothing partial is seen, the leftovers are swept, and the shard can be written."""
        whole = b"0123456789" * 100
        command = [sys.executable, "-c", KILLED_AT_EVERY_STEP, tmp_path, "0123456789"]
        *lines, said, last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert said == "True"
        outcomes = set()
        for line in [*lines, last]:
            at, status = map(int, line.split())
            root = tmp_path / str(at)
            store, attempts = LocalStore(root), root / "attempts"
            there = list(store.list(""))
            assert there in ([], [("shards/0", len(whole))])
            if there:
                assert store.get("shards/0") == whole
            leftovers = os.listdir(attempts) if attempts.exists() else []
            assert store.sweep() == leftovers
            assert list(store.list("")) == there
            assert store.create("shards/0", whole) is not bool(there)
            assert store.get("shards/0") == whole
            assert os.listdir(root) in (["shards", "attempts"], ["attempts", "shards"], ["shards"])
            assert not attempts.exists() or not os.listdir(attempts)
            outcomes.add((status, bool(there), len(leftovers)))
        assert outcomes == {(-9, False, 0), (-9, False, 1), (-9, True, 1), (-9, True, 0), (0, True, 0)}
        assert at > 15

    @pytest.mark.parametrize("step", ["flock", "write", "link", "unlink"])
    def test_a_living_attempt_is_not_swept(self, tmp_path: Path, step: str) -> None:
        process = child(tmp_path, 0, step, "live")
        assert process.stdout
        assert process.stdout.readline() == f"{step}\n"
        store = LocalStore(tmp_path)
        if step == "flock":
            # Not locked yet: it may be taken for dead, and its writer then begins again.
            assert len(store.sweep()) == 1
        else:
            assert store.sweep() == []
            assert len(os.listdir(tmp_path / "attempts")) == 1
        output, _ = process.communicate("\n" * 100, timeout=60)
        assert output.endswith("True\n")
        assert store.get("shards/0") == b"live" * 100
        assert os.listdir(tmp_path / "attempts") == []

    def test_paused_and_overtaken(self, tmp_path: Path) -> None:
        process = child(tmp_path, 0, "link", "late")
        assert process.stdout
        process.stdout.readline()
        store = LocalStore(tmp_path)
        assert store.create("shards/0", b"early")
        output, _ = process.communicate("\n" * 100, timeout=60)
        assert output == "False\n"
        assert store.get("shards/0") == b"early"

    def test_paused_and_killed(self, tmp_path: Path) -> None:
        process = child(tmp_path, 0, "link", "dead")
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        (name,) = os.listdir(tmp_path / "attempts")
        assert LocalStore(tmp_path).sweep() == [name]
        assert LocalStore(tmp_path).sweep() == []

    def test_processes_race(self, tmp_path: Path) -> None:
        code = """
import sys
from fastkd.cache.stores import LocalStore
store = LocalStore(sys.argv[1])
sys.stdin.readline()
print(*(k for k in range(50) if store.create(f"shards/{k}", sys.argv[2].encode() * 10000)))
store.sweep()
"""
        processes = {
            me: subprocess.Popen(
                [sys.executable, "-c", code, tmp_path, me], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for me in "ABC"
        }
        won = {}
        for process in processes.values():
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        for me, process in processes.items():
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            for key in output.split():
                assert won.setdefault(f"shards/{key}", me) == me
        assert len(won) == 50
        assert all(LocalStore(tmp_path).get(key) == me.encode() * 10000 for key, me in won.items())
        assert os.listdir(tmp_path / "attempts") == []

    @pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
    def test_umask(self, tmp_path: Path, umask: int) -> None:
        old = os.umask(umask)
        try:
            open_store(tmp_path / "cache", create=True).create("shards/0", b"x")
        finally:
            os.umask(old)
        for path in (tmp_path / "cache", tmp_path / "cache" / "shards", tmp_path / "cache" / "attempts"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
        assert stat.S_IMODE((tmp_path / "cache" / "shards" / "0").stat().st_mode) == 0o666 & ~umask

    def test_order_of_commit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The data is on the disk before it has a name, the name before `create` returns; new folders too."""
        steps: list[str] = []
        real = {name: getattr(os, name) for name in ("fsync", "link", "unlink")}

        def spy(name: str) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                steps.append(name if name != "fsync" else f"fsync {os.readlink(f'/proc/self/fd/{args[0]}')}")
                return real[name](*args, **kwargs)

            return call

        for name in real:
            monkeypatch.setattr(os, name, spy(name))
        root = str(tmp_path / "cache")
        open_store(root, create=True).create("shards/0", b"x")
        steps = [step.split("/attempts/")[0] for step in steps]
        assert steps == [
            f"fsync {tmp_path}",
            f"fsync {root}",
            f"fsync {root}",
            f"fsync {root}",  # the attempt's file
            "link",
            f"fsync {root}/shards",
            "unlink",
        ]

    def test_nothing_is_written_by_reading(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        store.create("shards/0", b"x")
        (tmp_path / "attempts").rmdir()
        before = sorted((str(p), p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.rglob("*"))
        store.get("shards/0")
        store.get_tail("shards/0", 1)
        list(store.list(""))
        assert store.sweep() == []
        assert sorted((str(p), p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.rglob("*")) == before
        assert store.create("shards/1", b"y"), "the folder of attempts is made again"

    def test_symbolic_links(self, tmp_path: Path) -> None:
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "secret").write_bytes(b"secret")
        store = open_store(tmp_path / "cache", create=True)
        store.create("shards/0", b"x")
        cache = tmp_path / "cache"
        (cache / "shards" / "1").symlink_to("../../outside/secret")
        (cache / "shards" / "2").symlink_to("/etc/passwd")
        (cache / "way").symlink_to("../outside")
        (cache / "loop").symlink_to("loop")
        for key in ("shards/1", "shards/2", "way/secret", "loop", "loop/x"):
            with pytest.raises(StoreError, match="symbolic links are not followed"):
                store.get(key)
        assert store.create("shards/1", b"x") is False, "there is something"
        with pytest.raises(StoreError, match="symbolic links are not followed"):
            store.create("way/new", b"x")
        assert (tmp_path / "outside" / "secret").read_bytes() == b"secret"
        assert os.listdir(tmp_path / "outside") == ["secret"]
        assert "way/secret" not in dict(store.list(""))
        (tmp_path / "alias").symlink_to("cache")
        assert open_store(tmp_path / "alias").get("shards/0") == b"x", "the folder itself may be reached by a link"

    def test_no_file(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        for key in ("pipe", "folder"):
            with pytest.raises(StoreError, match="not a regular file"):
                store.get(key)
        store.create("file", b"x")
        for call in (store.get, lambda key: store.create(key, b"")):
            with pytest.raises(StoreError):
                call("file/inside")
        with pytest.raises(StoreError, match="name too long"):
            store.create("x" * 300, b"")

    def test_another_process_may_use_it(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        store.create("a", b"x")
        assert pickle.loads(pickle.dumps(store)).get("a") == b"x"

    @pytest.fixture
    def small(self, tmp_path: Path) -> Iterator[Path]:
        """A file system of 256 KiB."""
        mounted = tmp_path / "small"
        mounted.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(mounted)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        yield mounted
        subprocess.run(["umount", str(mounted)], check=True)

    def test_full_disk(self, small: Path) -> None:
        store = LocalStore(small)
        assert store.create("shards/0", b"x" * 50_000)
        with pytest.raises(StoreError, match=r"small: creation of 'shards/1' failed: No space left on device\. .*Free"):
            store.create("shards/1", b"y" * 400_000)
        assert os.listdir(small / "attempts") == []
        assert list(store.list("")) == [("shards/0", 50_000)]
        assert store.create("shards/1", b"y" * 50_000)

    def test_read_only_disk(self, small: Path) -> None:
        store = LocalStore(small)
        store.create("shards/0", b"x")
        assert not store.readonly
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        assert store.readonly
        assert store.get("shards/0") == b"x"
        assert list(store.list("shards/")) == [("shards/0", 1)]
        assert store.create("shards/0", b"y") is False
        assert store.sweep() == []
        with pytest.raises(StoreError, match=r"'shards/1' failed: Read-only file system\. .*owner and mode"):
            store.create("shards/1", b"x")

    @pytest.mark.parametrize(
        ("name", "number", "says"),
        [
            ("write", errno.EDQUOT, "Free some space"),
            ("fsync", errno.EIO, "kernel's log"),
            ("open", errno.EACCES, "owner and mode"),
            ("link", errno.EPERM, "makes no hard links"),
            ("link", errno.EOPNOTSUPP, "makes no hard links"),
            ("link", errno.EDQUOT, "Free some space"),
        ],
    )
    def test_system_errors(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, says: str
    ) -> None:
        store = LocalStore(tmp_path)
        store.create("shards/0", b"x")

        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(StoreError, match=f"'shards/1' failed: {os.strerror(number)}.*{says}") as caught:
                store.create("shards/1", b"y")
        assert isinstance(caught.value.__cause__, OSError)
        assert os.listdir(tmp_path / "attempts") == []
        assert list(store.list("")) == [("shards/0", 1)]
        assert store.create("shards/1", b"y")

    def test_a_leftover_that_cannot_be_removed_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            patch.setattr(os, "unlink", fail)
            with pytest.raises(StoreError) as caught:
                LocalStore(tmp_path).create("a", b"x")
        assert caught.value.__cause__
        assert "left over" in caught.value.__cause__.__notes__[0]
        assert len(LocalStore(tmp_path).sweep()) == 1

    def test_a_folder_that_cannot_be_synced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.fsync
        store = LocalStore(tmp_path)
        store.create("shards/0", b"x")

        def fail(file: int) -> None:
            if os.readlink(f"/proc/self/fd/{file}").endswith("/shards"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(StoreError, match="might not outlast a power cut"):
                store.create("shards/1", b"y")
        assert store.create("shards/1", b"y") is False
        assert os.listdir(tmp_path / "attempts") == []

    def test_a_sweep_of_the_same_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real, store = os.link, LocalStore(tmp_path)

        def link(*args: str, **kwargs: int) -> None:
            assert store.sweep() == LocalStore(tmp_path).sweep() == []
            real(*args, **kwargs)

        monkeypatch.setattr(os, "link", link)
        assert store.create("a", b"x") is True

    def test_nfs_lost_the_answer_to_a_link(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.link

        def twice(*args: str, **kwargs: int) -> None:
            real(*args, **kwargs)
            real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "link", twice)
            assert LocalStore(tmp_path).create("a", b"x") is True

    def test_no_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Without flock commits are as good; only nobody can tell the dead from the living."""
        import fcntl

        def fail(*_: object) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        store = LocalStore(tmp_path)
        store.create("a", b"x")
        (tmp_path / "attempts" / "b.part").write_bytes(b"")
        (tmp_path / "attempts" / "notes.txt").write_bytes(b"")
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", fail)
            assert store.create("b", b"x")
            assert store.sweep() == []
        assert "no flock" in caplog.text
        assert store.sweep() == ["b.part"]
        assert os.listdir(tmp_path / "attempts") == ["notes.txt"]


class TestS3:
    def test_many_keys(self, s3: S3) -> None:
        root = uuid.uuid4()
        store = open_store(f"s3://bucket/{root}")
        for i in range(2500):
            s3.put("bucket", f"{root}/shards/{i}", b"x" * (i % 3))
        s3.requests.clear()
        assert dict(store.list("shards/")) == {f"shards/{i}": i % 3 for i in range(2500)}
        assert [method for method, _ in s3.requests] == ["GET"] * 3

    def test_requests(self, s3: S3) -> None:
        """Reading takes GET (and LIST) alone, one request each; a commit is one conditional PUT."""
        root = uuid.uuid4()
        store = open_store(f"s3://bucket/{root}")
        store.create("a", b"x" * 20_000_000)
        puts = [path.rpartition("/")[2] for method, path in s3.requests if method == "PUT"]
        assert puts == ["exclusive-create", "exclusive-create", "a"], "no multipart upload, however large"
        for call in (lambda: store.create("b", b"x"), lambda: store.get("a"), lambda: store.get_tail("a", 5)):
            s3.requests.clear()
            call()
            assert len(s3.requests) == 1
        assert s3.requests[0][0] == "GET"
        assert list(store.list("att")) == []

    def test_the_server_enforces_the_condition(self, s3: S3) -> None:
        """Of the server and obstore, without our code."""
        raw = S3Store("bucket", prefix=str(uuid.uuid4()))
        obstore.put(raw, "a", b"x", mode="create", use_multipart=True)
        with pytest.raises(obstore.exceptions.AlreadyExistsError):
            obstore.put(raw, "a", b"y" * 20_000_000, mode="create", use_multipart=True)

    def test_a_server_that_ignores_the_condition_is_refused(self, s3: S3) -> None:
        root = uuid.uuid4()
        s3.ignore_condition = True
        store = open_store(f"s3://bucket/{root}")
        for _ in range(2):
            with pytest.raises(ReadOnly, match="ignores `If-None-Match"):
                store.create("a", b"x")
        assert list(store.list("")) == []
        s3.ignore_condition = False
        assert store.create("a", b"x")

    def test_a_conflict_is_not_taken_for_an_object(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        """S3 answers 409 to one of two requests that overlap; the other may still fail."""
        monkeypatch.setattr("fastkd.cache.stores.objects.PAUSES", (0.0, 0.01, 0.01, 0.01))
        store = open_store(f"s3://bucket/{uuid.uuid4()}")
        store.create("a", b"x")
        conflicts = itertools.count()
        s3.fault = lambda method, _: (409, False) if method == "PUT" and next(conflicts) < 2 else None
        assert store.create("b", b"x") is True
        s3.fault = lambda method, _: (409, False) if method == "PUT" else None
        with pytest.raises(StoreError, match="nothing is there"):
            store.create("c", b"x")
        s3.fault = lambda method, _: (409, True) if method == "PUT" else None
        assert store.create("d", b"x") is False

    def test_a_lost_answer(self, s3: S3) -> None:
        """The first request succeeds, its answer is an error: obstore asks again, and finds its own object there."""
        store = open_store(f"s3://bucket/{uuid.uuid4()}")
        store.create("a", b"x")
        answers = itertools.count()
        s3.fault = lambda method, _: (500, True) if method == "PUT" and next(answers) == 0 else None
        assert store.create("b", b"mine") is False
        assert store.get("b") == b"mine"

    def test_every_third_request_fails(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastkd.cache.stores.objects.PAUSES", (0.0,))  # nothing is repeated
        store = open_store(S3Store("bucket", prefix=str(uuid.uuid4()), retry_config={"max_retries": 0}))
        s3.fault = lambda _, n: (503, False) if n % 3 == 0 else None
        committed, failed = [], []
        for i in range(30):
            try:
                if store.create(f"shards/{i}", bytes([i]) * 1000):
                    committed.append(i)
            except StoreError as error:
                failed.append((i, str(error)))
        s3.fault = None
        assert len(failed) >= 9
        assert len(committed) + len(failed) == 30
        assert all("503" in said and (f"'shards/{i}'" in said or "exclusive-create" in said) for i, said in failed)
        assert {e.key for e in store.list("")} == {f"shards/{i}" for i in committed}
        assert all(store.get(f"shards/{i}") == bytes([i]) * 1000 for i in committed)

    def test_refusals(self, s3: S3) -> None:
        store = open_store(S3Store("bucket", prefix=str(uuid.uuid4()), retry_config={"max_retries": 0}))
        store.create("a", b"x")
        s3.fault = lambda *_: (403, False)
        calls = [lambda: store.get("a"), lambda: store.get_tail("a", 1), lambda: store.create("b", b"")]
        for call in [*calls, lambda: list(store.list(""))]:
            with pytest.raises(StoreError, match=r"S3Store\(bucket=.bucket., prefix=.*403.*credentials") as caught:
                call()
            assert not isinstance(caught.value, NotFound)
            assert SECRET not in "".join(traceback.format_exception(caught.value))
        s3.fault = None
        absent = open_store("s3://nobucket/x")
        with pytest.raises(StoreError, match="NoSuchBucket"):
            absent.create("a", b"x")
        with pytest.raises(NotFound, match="no such bucket"):
            absent.get("a")
        with pytest.raises(StoreError, match="NoSuchBucket"):
            list(absent.list(""))

    def test_too_large(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastkd.cache.stores.objects.MAX_SIZE", 10)
        with pytest.raises(StoreError, match=r"has 11 bytes, .* Make the shards smaller"):
            open_store("s3://bucket/x").create("a", b"x" * 11)
        assert s3.requests == []

    def test_azure_sends_the_same_condition(self, s3: S3) -> None:
        """There is no Azure here; but its requests for one blob are understood by S3. Not its listing."""
        store = open_store(
            AzureStore(
                "bucket",
                account_name="account",
                sas_key=f"sv=1&sig={SECRET}",
                endpoint=s3.url,
                prefix=str(uuid.uuid4()),
                client_options={"allow_http": True},
            )
        )
        assert store.create("a", b"0123456789") is True
        assert store.create("a", b"other") is False
        assert store.get("a") == b"0123456789"
        assert store.get_tail("a", 4) == b"6789"
        assert store.get_tail("a", 40) == b"0123456789"
        assert store.create("empty", b"")
        assert store.get_tail("empty", 4) == b""
        with pytest.raises(NotFound):
            store.get_tail("b", 4)

    def test_google_is_asked_for_generation_zero(self) -> None:
        """There is no Google here either: a server that only says that the object is there."""
        conditions = []

        class Taken(Quiet):
            def do_PUT(self) -> None:
                conditions.append(self.headers["x-goog-if-generation-match"])
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(412)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_HEAD(self) -> None:
                self.send_response(200)
                headers = {"Content-Length": "3", "ETag": '"x"', "Last-Modified": "Tue, 24 Nov 2026 02:46:14 GMT"}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Taken) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            store = open_store(
                GCSStore(
                    "bucket",
                    base_url=f"http://127.0.0.1:{server.server_address[1]}",
                    credential_provider=lambda: {"token": "none", "expires_at": None},  # obstore asks no one for one
                    client_options={"allow_http": True, "pool_max_idle_per_host": "0"},
                )
            )
            assert store.create("shards/0", b"abc") is False
            server.shutdown()
            thread.join()
        assert conditions == ["0"]

    def test_spawned_processes(self, s3: S3) -> None:
        store = open_store(f"s3://bucket/{uuid.uuid4()}")
        store.create("a", b"x")
        code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).get('a'))"
        run = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True, check=True)
        assert run.stdout == b"b'x'\n"

    def test_forked_processes_are_told(self, s3: S3) -> None:
        """obstore hangs in a child forked after its use; we say so instead."""
        code = """
import os
from fastkd.cache.stores import open_store
store = open_store("s3://bucket/none")
try:
    store.get("a")
except Exception as error:
    print(type(error).__name__, flush=True)
if os.fork() == 0:
    try:
        store.get("a")
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
os.wait()
"""
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, timeout=60
        )
        first, second = run.stdout.splitlines()
        assert first == "NotFound"
        assert second.startswith("StoreError")
        assert "spawn" in second


class TestHttp:
    def test_password(self, web: str) -> None:
        host = web.removeprefix("http://")
        store = open_store(f"http://user:{SECRET}@{host}/secure")
        assert store.get("spec.json") == b"{}"
        assert store.describe() == f"{web}/secure"
        with pytest.raises(StoreError, match=r"401.*Check the user and password"):
            open_store(f"{web}/secure").get("spec.json")

    def test_a_redirect_does_not_get_the_password(self, web: str) -> None:
        store = open_store(f"http://user:{SECRET}@{web.removeprefix('http://')}/away?sig={SECRET}")
        seen = json.loads(store.get_tail("x", 10_000))
        assert "Authorization" not in seen
        assert seen["Range"] == "bytes=-10000"

    def test_failures(self, web: str) -> None:
        with pytest.raises(StoreError, match=r"IncompleteRead|expected"):
            open_store(f"{web}/broken").get("x")
        for url in ("http://127.0.0.1:1", f"http://user:{SECRET}@127.0.0.1:1/?sig={SECRET}"):
            with pytest.raises(StoreError, match=r"Connection refused.*try again") as caught:
                open_store(url).get("x")
            assert SECRET not in "".join(traceback.format_exception(caught.value))

    def test_timeout(self) -> None:
        import socket

        with socket.create_server(("127.0.0.1", 0)) as silent:
            store = HttpStore(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
            with pytest.raises(StoreError, match="timed out"):
                store.get("x")

    @pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
    def test_a_redirect_stays_with_http(self, web: str, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
        def redirect(self: Quiet) -> None:
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()

        monkeypatch.setattr(Quiet, "do_GET", redirect)
        with pytest.raises(StoreError):
            open_store(web).get("x")


class TestZip:
    def test_damaged(self, tmp_path: Path) -> None:
        path = zipped(tmp_path / "c.zip", zipfile.ZIP_STORED)
        data = bytearray(path.read_bytes())
        data[data.index(bytes(range(256))) + 7] ^= 1
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"'shards/0\.bin' failed: Bad CRC-32.*copy it again"):
            open_store(path).get("shards/0.bin")

    def test_bomb(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a", b"\0" * (100 << 20))
        for call in (open_store(tmp_path / "c.zip").get, lambda k: open_store(tmp_path / "c.zip").get_tail(k, 1)):
            with pytest.raises(StoreError, match="hostile"):
                call("a")

    def test_forked_processes_do_not_share_a_position(self, tmp_path: Path) -> None:
        code = """
import os, sys
from fastkd.cache.stores import open_store
store = open_store(sys.argv[1])
expected = store.get("shards/0.bin")
children = []
for _ in range(4):
    if (pid := os.fork()) == 0:
        os._exit(any(store.get("shards/0.bin") != expected for _ in range(200)))
    children.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
"""
        path = zipped(tmp_path / "c.zip", zipfile.ZIP_DEFLATED)
        subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)


class TestFsspec:
    def test_other_file_systems_are_only_read(self, s3: S3) -> None:
        """obstore's own fsspec file system takes the mode "create" and overwrites."""
        from obstore.fsspec import FsspecStore as ObstoreFileSystem

        fs = ObstoreFileSystem("s3", skip_instance_cache=True)
        root = f"bucket/{uuid.uuid4()}"
        fs.pipe_file(f"{root}/a", b"first", mode="create")
        fs.pipe_file(f"{root}/a", b"second", mode="create")
        assert fs.cat_file(f"{root}/a") == b"second", "no longer so? Then it may be written to"
        store = FsspecStore(fs, root)
        assert store.readonly
        assert store.get("a") == b"second"
        assert list(store.list("")) == [("a", 6)]
        with pytest.raises(ReadOnly, match="does not create exclusively"):
            store.create("b", b"")

    def test_local_links_are_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "a").symlink_to("/etc/passwd")
        with pytest.raises(StoreError, match="symbolic links"):
            FsspecStore(fsspec.filesystem("file"), str(tmp_path / "cache")).get("a")

    def test_failures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fs = fsspec.filesystem("memory")
        store = FsspecStore(fs, f"/{uuid.uuid4()}")

        def fail(*_: object, **__: object) -> None:
            raise OSError(f"https://user:{SECRET}@host/x?sig={SECRET} does not answer")

        for name in ("cat_file", "find"):
            monkeypatch.setattr(fs, name, fail)
        for call in (lambda: store.get("a"), lambda: store.get_tail("a", 1), lambda: list(store.list(""))):
            with pytest.raises(StoreError, match="https://…@host/x\\?… does not answer") as caught:
                call()
            assert SECRET not in "".join(traceback.format_exception(caught.value))


class TestCredentials:
    def secret_stores(self, web: str) -> list[Store]:
        host = web.removeprefix("http://")
        options = {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
        azure = {"account_name": "account", "sas_key": f"sv=1&sig={SECRET}", **options}
        return [
            open_store(f"http://user:{SECRET}@{host}/none?X-Amz-Signature={SECRET}"),
            open_store(HTTPStore(f"http://user:{SECRET}@{host}/none?sig={SECRET}", **options)),
            open_store(AzureStore("container", endpoint=f"{web}/account", **azure)),
            open_store(AzureStore("container", endpoint="http://127.0.0.1:1/account", **azure)),
            open_store(
                S3Store("b", endpoint=web, access_key_id="a", secret_access_key=SECRET, session_token=SECRET, **options)
            ),
            FsspecStore(fsspec.filesystem("http"), f"http://user:{SECRET}@{host}/none"),
            FsspecStore(fsspec.filesystem("http"), f"http://user:{SECRET}@127.0.0.1:1/none"),
        ]

    def test_are_never_shown(self, web: str, caplog: pytest.LogCaptureFixture) -> None:
        for store in self.secret_stores(web):
            said = [repr(store), store.describe()]
            calls = [lambda s=store: s.get("a"), lambda s=store: s.get_tail("a", 2), lambda s=store: list(s.list("a/"))]
            for call in [*calls, lambda s=store: s.create("a", b"")]:
                with pytest.raises(StoreError) as caught:
                    call()
                said.append("".join(traceback.format_exception(caught.value)))
            shown = "\n".join(line for line in "\n".join(said).splitlines() if "    " not in line[:4])
            assert SECRET not in shown, f"{store}: {shown}"
        assert SECRET not in caplog.text

    @pytest.mark.parametrize(
        "text",
        [
            f"https://user:{SECRET}@host/a",
            f"https://user:{SECRET}@{SECRET}@host/a",
            f"GET https://host/a?X-Amz-Signature={SECRET}&b=1 failed",
            f"url='https://host/a?sig={SECRET}'",
            f"secret_access_key={SECRET}",
            f"{{'sas_key': '{SECRET}', 'session_token': '{SECRET}'}}",
            f"Authorization credentials: Bearer {SECRET}",
        ],
    )
    def test_are_cut_out_of_text(self, text: str) -> None:
        from fastkd.cache.credentials import redact

        assert SECRET not in redact(text)

    def test_other_text_is_left_alone(self) -> None:
        from fastkd.cache.credentials import redact

        for text in ("/a/b?c@d", "s3://bucket/a b", "key 'a@b' of http://host:80/x (who? you)", "a=b", "no space left"):
            assert redact(text) == text
