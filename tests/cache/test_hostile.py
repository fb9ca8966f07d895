"""Reads are bounded before they happen, are made again before an object is blamed, and fail by name."""

import hashlib
import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_cases import make_shard, make_spec
from forgery import VALUES
from http_server import http_server

from fastkd.cache import Cache, CacheError, CacheSpec, CorruptShard, StoreError, create_cache, open_cache, verify_cache
from fastkd.cache.capture_plan import CapturePlan, read_capture_plan
from fastkd.cache.errors import Refused
from fastkd.cache.manifest import to_parquet
from fastkd.cache.spec import parse_json
from fastkd.cache.stores import HttpStore, MemoryStore, open_store


def sealed(path: Any, shards: int = 2) -> None:
    spec = make_spec(vocab_size=40, k=3)
    with create_cache(path, spec) as writer:
        for i in range(shards):
            writer.write_shard(i, **make_shard(spec, positions=12, seed=i), first_sequence=4 * i)
        writer.seal()


# Bounded reads


@pytest.mark.parametrize("name", ["spec.json", "plan.json", "manifest.parquet", "shards/0.zarr.zip"])
def test_a_sparse_object_of_50_gib_is_refused_unread(tmp_path: Path, name: str) -> None:
    sealed(tmp_path)
    (tmp_path / "plan.json").touch()
    os.truncate(tmp_path / name, 50 * 2**30)

    def read() -> None:
        open_cache(tmp_path).read_shard(0)
        read_capture_plan(open_store(tmp_path))

    tracemalloc.start()
    try:
        with pytest.raises(CacheError, match=re.escape(name)):
            read()
        report = verify_cache(tmp_path)
        assert any("bytes" in problem.what for problem in report.problems)
        assert tracemalloc.get_traced_memory()[1] < 2**30
    finally:
        tracemalloc.stop()


class Endless(http.server.BaseHTTPRequestHandler):
    """Whatever is asked for: bytes without an end, or one byte at a time; ranges are ignored."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path.startswith("/long"):
            self.send_header("Content-Length", str(50 * 2**30))
        self.end_headers()
        try:
            while True:
                self.wfile.write(b" " if self.path.startswith("/drip") else bytes(2**20))
                time.sleep(0.02 if self.path.startswith("/drip") else 0)
        except OSError:
            pass


@pytest.mark.parametrize("path", ["endless", "long", "drip"])
def test_an_endless_or_dripping_body_is_given_up(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOST_BYTES", "MOST_SKIPPED"):
        monkeypatch.setattr(f"fastkd.cache.stores.http.{name}", 2**25)
    with http_server(Endless) as url:
        store = HttpStore(f"{url}/{path}", timeout=1)
        tracemalloc.start()
        try:
            for call in (lambda: store.get("spec.json"), lambda: store.get_tail("spec.json", 1000)):
                begun = time.monotonic()
                with pytest.raises(StoreError, match=r"'spec\.json' failed: got (more than|\d+ bytes in)"):
                    call()
                assert time.monotonic() - begun < 20
            assert tracemalloc.get_traced_memory()[1] < 2**27
        finally:
            tracemalloc.stop()


# Reads are made again


class Flipping(MemoryStore):
    """Flips a bit of the first `times` reads of each object; of every read from `times` = 1000 on."""

    def __init__(self, store: Any, times: int) -> None:
        super().__init__("flipping")
        self._store, self._times, self.reads = store, times, dict[str, int]()

    def _entries(self, folders: list[str]) -> Any:
        return self._store._entries(folders)

    def _read(self, key: str, length: int | None) -> bytes:
        data = bytearray(self._store._read(key, length))
        self.reads[key] = self.reads.get(key, 0) + 1
        if self.reads[key] <= self._times:
            data[len(data) // 2] ^= 4
        return bytes(data)


CALLS: dict[str, Callable[[Cache], Any]] = {
    "read_shard": lambda cache: cache.read_shard(0),
    "attributes": lambda cache: cache.attributes(0),
    "sequence_lengths": lambda cache: cache.sequence_lengths(0),
    "manifest": lambda cache: cache.manifest.num_rows,
    "verify": lambda cache: cache.verify().problems,
    "zarr_group": lambda cache: sorted(cache.zarr_group(0)),
}


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification:UserWarning")
@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_a_bit_flipped_in_transit_is_no_damage(call: str, seal: bool) -> None:
    store, spec = MemoryStore(), make_spec(vocab_size=40, k=3)
    with create_cache(store, spec) as writer:
        writer.write_shard(0, **make_shard(spec, positions=12))
        if seal:
            writer.seal()
    expected = CALLS[call](open_cache(store))
    found = CALLS[call](open_cache(Flipping(store, 1)))
    assert str(found) == str(expected)
    with pytest.raises(CacheError, match=r"spec\.json"):
        open_cache(Flipping(store, 1000))
    if call in ("read_shard", "zarr_group"):
        bad = Cache(Flipping(store, 1000), spec, None)
        with pytest.raises(CorruptShard, match=r"Delete shards/0\.zarr\.zip"):
            CALLS[call](bad)
        assert not bad.verify().ok


# JSON


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1, "a": 2}',
        b'{"b": {"a": 1, "a": 1}}',
        '{"a": 1}'.encode("utf-16"),
        '{"a": 1}'.encode("utf-8-sig"),
        b'{"a": "\xff"}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1} x',
        b'{"a": ' + b"1" * 5000 + b"}",
        b"[" * 10**5,
        b" " * (2**22 + 1),
    ],
)
def test_json_is_utf_8_with_distinct_members_and_nothing_else(data: bytes) -> None:
    assert parse_json(b'{"a": {"b": [1, null]}}', "spec.json") == {"a": {"b": [1, None]}}
    with pytest.raises(CacheError, match=r"spec\.json"):
        parse_json(data, "spec.json")


def test_a_member_that_occurs_twice_in_a_spec(tmp_path: Path) -> None:
    sealed(tmp_path)
    text = (tmp_path / "spec.json").read_text()
    (tmp_path / "spec.json").write_text(text.replace('"format":', '"format": "other", "format":', 1))
    with pytest.raises(CacheError, match=r"spec\.json.*'format' occurs twice"):
        open_cache(tmp_path)


# Files that are none, and names


def spoil(path: Path, how: str) -> None:
    path.unlink()
    if how == "fifo":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to("/etc/hostname")
    else:
        path.mkdir()


@pytest.mark.parametrize("how", ["fifo", "link", "folder"])
@pytest.mark.parametrize("name", ["spec.json", "manifest.parquet", "shards/0.zarr.zip"])
def test_what_is_no_file_is_an_error_for_good(tmp_path: Path, name: str, how: str) -> None:
    """Refused: a scheduler must not run the same command again."""
    sealed(tmp_path)
    spoil(tmp_path / name, how)
    with pytest.raises(Refused, match=re.escape(name)):
        open_cache(tmp_path).read_shard(0)
    if name.startswith("shards"):
        problems = verify_cache(tmp_path).problems
        assert [problem.shard for problem in problems] == [0]
        assert name in str(problems[0])
    code = "import sys; from fastkd.cli.main import main; sys.exit(main(sys.argv[1:]))"
    run = subprocess.run([sys.executable, "-c", code, "verify", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr


def test_control_characters_of_a_file_name_stay_out_of_messages(tmp_path: Path) -> None:
    sealed(tmp_path)
    for name in ("\x1b[2J.zarr.zip", "a\nb", "\x9b31m", "\udcff"):
        (tmp_path / "shards" / name).write_bytes(b"")
    problems = [str(problem) for problem in verify_cache(tmp_path).problems]
    assert len(problems) == 4
    assert all(text.isprintable() for text in problems)


# Manifests that somebody made up


def forged_manifest(table: pa.Table, name: str, value: Any) -> pa.Table:
    column = table.schema.get_field_index(name)
    values = [value, *table.column(name).to_pylist()[1:]]
    return table.set_column(column, table.schema.field(name), pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("first_sequence", "sequences", "positions", "bytes") for value in (-1, 2**62)),
        *((name, 1) for name in ("sequences", "positions", "counted", "head_entries", "draw_entries")),
        ("first_sequence", 3),
        ("shard", -1),
        ("written", 2**63 - 1),
        ("attempt", "\x1b[2J" * 8),
        ("object_sha256", bytes(32)),
    ],
)
def test_a_forged_manifest_is_refused_or_found(tmp_path: Path, name: str, value: Any) -> None:
    sealed(tmp_path)
    good = open_cache(tmp_path)
    truth = good.read_shard(0)
    data = to_parquet(forged_manifest(good.manifest, name, value), good.spec.hash)
    (tmp_path / "manifest.parquet").write_bytes(data)
    try:
        cache = open_cache(tmp_path)
        found = [cache.read_shard(0), cache.sequences([0, 5])]
    except CacheError as error:
        assert "manifest" in str(error) or "shard 0" in str(error) or "sequence" in str(error)
    else:
        assert np.array_equal(found[0]["ids"], truth["ids"])
    assert not verify_cache(tmp_path).ok


def test_a_manifest_of_other_types_is_refused(tmp_path: Path) -> None:
    sealed(tmp_path)
    table = open_cache(tmp_path).manifest
    for name in table.column_names:
        for kind in (pa.int32(), pa.uint64(), pa.float64(), pa.string(), pa.binary(), pa.bool_()):
            if kind == table.schema.field(name).type:
                continue
            other = table.set_column(
                table.schema.get_field_index(name), name, pa.nulls(len(table), kind).fill_null(_any(kind))
            )
            pq.write_table(other, tmp_path / "manifest.parquet")
            with pytest.raises(CacheError, match=r"manifest\.parquet: "):
                open_cache(tmp_path)


def _any(kind: pa.DataType) -> pa.Scalar:
    values = {pa.string(): "x", pa.binary(): b"x", pa.bool_(): True}
    return pa.scalar(values.get(kind, 1), kind)


def test_errors_of_a_store_are_named_and_final_where_they_are() -> None:
    class Denied(MemoryStore):
        def _read(self, key: str, length: int | None) -> bytes:
            raise PermissionError(13, "Permission denied") if key == "a" else MemoryError

    with pytest.raises(Refused, match="'a' failed: Permission denied"):
        Denied().get("a")
    with pytest.raises(StoreError, match="'b' failed: MemoryError"):
        Denied().get("b")


def test_settings_of_every_type_are_refused_or_mean_the_same() -> None:
    """Every member of spec.json and plan.json x every kind of value, with the hash that its writer would give it."""
    spec = make_spec(draws=2, mass=0.5, inputs=("tokens", "mask"))
    refused = taken = 0
    for place in ((), ("spec",), ("spec", "codec"), ("provenance",)):
        good = json.loads(spec.to_json())
        members = good
        for name in place:
            members = members[name]
        for name, value in itertools.product([*members, "more"], VALUES):
            document = json.loads(spec.to_json())
            inner = document
            for step in place:
                inner = inner[step]
            inner[name] = value
            hashed = {**document["spec"], "notes": ""} if isinstance(document.get("spec"), dict) else {}
            text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
            if place[:1] == ("spec",):
                document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
            try:
                found = CacheSpec.from_json(json.dumps(document).encode())
            except CacheError as error:
                assert "spec.json" in str(error)
                refused += 1
            else:
                assert found.hash == document["sha256"]
                taken += 1
    assert refused > 5 * taken > 0


def test_plans_of_every_type_are_refused_or_mean_the_same() -> None:
    plan = CapturePlan({"context": 8}, "d" * 64, {"shards": 3, "windows": 9}, 2, "a" * 64)
    refused = 0
    for name, value in itertools.product([*json.loads(plan.to_json()), "totals.shards", "totals.windows"], VALUES):
        document = json.loads(plan.to_json())
        inner, last = (document["totals"], name[7:]) if "." in name else (document, name)
        inner[last] = value
        content = {n: v for n, v in document.items() if n != "content_sha256"}
        if name != "content_sha256":
            text = json.dumps(content, sort_keys=True, separators=(",", ":"))
            document["content_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        try:
            found = CapturePlan.from_json(json.dumps(document).encode())
        except CacheError as error:
            assert "plan.json" in str(error)
            refused += 1
        else:
            assert found.shards < 2**26
            assert json.loads(found.to_json()) == document or name in ("content_sha256", "version")
    assert refused > 150
    with pytest.raises(CacheError, match=r"totals\.shards: got 1000000000"):
        CapturePlan.from_json(json.dumps(json.loads(plan.to_json()) | {"totals": {"shards": 10**9}}).encode())
