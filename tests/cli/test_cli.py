"""The command line: what it prints, where, and with which exit status."""

import json
import shutil
import socketserver
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_cases import unpacked
from feature_cases import make_base, write_feature

from fastkd import __version__
from fastkd.cache import CacheSpec, CacheWriter, create_cache, open_cache, open_writer
from fastkd.cache import inspect as cache_inspect
from fastkd.cache.capture_plan import CapturePlan
from fastkd.cache.manifest import runs, shard_key
from fastkd.cache.shard.container import pack
from fastkd.cli import main as cli
from fastkd.utils.numbers import size_text
from fastkd.utils.text import printable, ranges, without_credentials

VOCAB = 60
SHAPES: dict[str, dict[str, Any]] = {
    "fixed": {"k": 8},
    "hybrid": {"k": 6, "draws": 4, "draw_temperature": 1.5},
    "adaptive": {"k": 12, "mass": 0.8, "codec": "portable"},
}
POSITIONS = (40, 24, 32)  # of the shards
PER_SEQUENCE = 8
SECRET = "hunter2"


def targets(spec: CacheSpec, index: int, positions: int) -> dict[str, Any]:
    """Targets of random logits, every eighth row of which does not count."""
    random = np.random.default_rng(index)
    z = 3 * random.standard_normal((positions, VOCAB))
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    shape = (positions, spec.width)
    ids, draws = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    logprobs = np.full(shape, -np.inf, np.float32)
    tail = np.full((positions, len(spec.temperatures)), -np.inf, np.float32)
    for i in range(positions):
        if i % 8 == 7:
            continue
        order = np.argsort(-logp[i])
        head = min(spec.k, int(np.searchsorted(np.exp(logp[i, order]).cumsum(), spec.mass or 2)) + 1)
        rest = order[head:]
        ids[i, :head], logprobs[i, :head] = order[:head], logp[i, order[:head]]
        tail[i] = [np.log(np.exp(logp[i, rest] / t).sum()) for t in spec.temperatures]
        if spec.draws:
            p = np.exp(logp[i, rest] / spec.draw_temperature)
            times = random.multinomial(spec.draws, p / p.sum())
            drawn = np.flatnonzero(times)
            some = slice(head, head + len(drawn))
            ids[i, some], logprobs[i, some], draws[i, some] = rest[drawn], logp[i, rest[drawn]], times[drawn]
    return {
        "inputs": {"tokens": random.integers(0, VOCAB, positions)},
        "ids": ids,
        "logprobs": logprobs,
        "tail": tail,
        "draws": draws if spec.draws else None,
        "sequence_lengths": [PER_SEQUENCE] * (positions // PER_SEQUENCE),
    }


def write(writer: CacheWriter, index: int, **changes: Any) -> None:
    positions = POSITIONS[index % len(POSITIONS)]
    first = sum(POSITIONS[i % len(POSITIONS)] for i in range(index)) // PER_SEQUENCE
    writer.write_shard(index, **{"first_sequence": first, **targets(writer.spec, index, positions), **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One unsealed cache of each shape. Not to be changed."""
    folder = tmp_path_factory.mktemp("caches")
    for name, shape in SHAPES.items():
        texts = {"teacher": "a teacher", "dataset": f"s3://me:{SECRET}@bucket/text?sig={SECRET}", "notes": "so to say"}
        with create_cache(folder / name, CacheSpec(VOCAB, **shape, **texts)) as writer:
            for index in range(len(POSITIONS)):
                write(writer, index)
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "hybrid", tmp_path / "cache"))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*args: object) -> tuple[int, str, str]:
        status = cli.main([str(a) for a in args])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        assert SECRET not in captured.out + captured.err
        return status, captured.out, captured.err

    return run


@pytest.fixture
def run_json(run: Any) -> Any:
    def run_json(*args: object) -> tuple[int, Any]:
        status, out, _ = run(*args, "--json")
        return status, json.loads(out)  # one object, and nothing else

    return run_json


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def list_directory(self, path: object) -> None:
            self.send_error(404)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://me:{SECRET}@127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def seal(cache: Path) -> None:
    with open_writer(cache) as writer:
        writer.seal()


def shard_file(cache: Path, index: int) -> Path:
    return cache / shard_key(index)


def flip(cache: Path, index: int, member: str) -> None:
    """Flip one bit in the middle of a member of a shard."""
    path = shard_file(cache, index)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(member) + info.file_size // 2] ^= 1
    path.write_bytes(data)


# Arguments


def test_nothing_is_help(run: Any) -> None:
    status, out, err = run()
    assert (status, err) == (0, "")
    assert out == run("--help")[1]
    assert all(word in out for word in ("inspect", "verify", "seal", "--version"))


def test_version(run: Any) -> None:
    assert run("--version") == (0, f"fastkd {__version__}\n", "")


@pytest.mark.parametrize("command", ["inspect", "verify", "seal"])
def test_every_command_has_help(run: Any, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "CACHE" in out
    assert "--json" in out


@pytest.mark.parametrize(
    "args",
    [
        ["inspekt", "x"],
        ["inspect"],
        ["inspect", "x", f"s3://a:{SECRET}@b/c"],
        ["seal", "x", "--deep"],
        ["verify", "-x"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_2(run: Any, args: list[str]) -> None:
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert "fastkd" in err


@pytest.mark.parametrize("command", ["inspect", "verify", "seal"])
@pytest.mark.parametrize("place", ["nowhere", "empty", "file", f"ftp://a:{SECRET}@b/c", "memory://no-cache", "no.zip"])
def test_no_cache_is_2(
    run: Any, run_json: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("text")
    status, out, err = run(command, place)
    assert (status, out) == (2, "")
    assert err.startswith("fastkd: ")
    assert err.count("\n") == 1
    status, report = run_json(command, place)
    assert status == 2
    assert list(report) == ["error"]
    assert not list(Path("empty").iterdir())


# inspect


@pytest.mark.parametrize("shape", SHAPES)
def test_inspect_counts(made: Path, run_json: Any, shape: str) -> None:
    status, report = run_json("inspect", made / shape)
    assert status == 0
    shards = [open_cache(made / shape).read_shard(i) for i in range(len(POSITIONS))]
    used = np.concatenate([s["logprobs"] for s in shards]) > -np.inf
    drawn = np.concatenate([s["draws"] for s in shards]) > 0 if "draws" in shards[0] else used & False
    assert report["positions"] == sum(POSITIONS)
    assert report["sequences"] == sum(POSITIONS) // PER_SEQUENCE
    assert report["counted"] == used.any(1).sum() == sum(POSITIONS) * 7 // 8
    assert (report["head_entries"], report["draw_entries"]) == ((used & ~drawn).sum(), drawn.sum())
    assert report["shards"] == report["arrays"]["shards_read"] == len(POSITIONS)
    assert report["settings"]["k"] == SHAPES[shape]["k"]
    assert report["settings"]["codec"]["name"] == SHAPES[shape].get("codec", "default")
    assert report["sealed"] is False
    size = sum(shard_file(made / shape, i).stat().st_size for i in range(len(POSITIONS)))
    assert report["bytes"] == size
    each = report["arrays"]["bytes_per_position"]
    assert min(each.values()) > 0
    assert sum(each.values()) == pytest.approx(size / sum(POSITIONS)) == pytest.approx(report["bytes_per_position"])
    assert ("draws/values" in each) == (shape == "hybrid")
    assert report["missing"] == {"shards": [], "sequences": [], "objects": [], "listed": True}
    assert report["overlaps"] == report["not_in_manifest"] == report["foreign"] == []


def test_inspect_statistics_are_weighted_by_what_counts(cache: Path, run_json: Any) -> None:
    report = run_json("inspect", cache)[1]
    masses, medians = [], []
    for index, positions in enumerate(POSITIONS):
        wrote = targets(open_cache(cache).spec, index, positions)
        head = np.where(wrote["draws"] == 0, np.exp(wrote["logprobs"].astype(np.float64)), 0).sum(1)
        masses.append(head[np.isfinite(wrote["logprobs"]).any(1)])
        medians.append(np.median(masses[-1]))
    assert report["mass"]["mean"] == pytest.approx(np.concatenate(masses).mean())
    assert report["mass"]["p50"] == pytest.approx(np.average(medians, weights=[len(m) for m in masses]))
    assert 0 < report["entropy"]["p05"] < report["entropy"]["mean"] < report["entropy"]["p95"] < np.log(VOCAB)


@pytest.mark.parametrize("shape", SHAPES)
def test_inspect_text(made: Path, tmp_path: Path, run: Any, shape: str) -> None:
    cache = Path(shutil.copytree(made / shape, tmp_path / "cache"))
    status, out, err = run("inspect", cache)
    assert (status, err) == (0, "")
    assert "not sealed" in out
    assert max(map(len, out.splitlines()[1:])) <= 80
    for word in (
        "a teacher",
        "s3://…@bucket/text?…",
        "so to say",
        "inputs/tokens",
        "mass of the top-k",
        "nothing up to",
    ):
        assert word in out
    assert ("4 at T = 1.5" in out) == (shape == "hybrid")
    assert ("0.8 of the mass" in out) == (shape == "adaptive")
    seal(cache)
    status, sealed, _ = run("inspect", cache)
    assert status == 0
    assert sealed == out.replace("not sealed", "sealed")


def test_inspect_samples_big_caches_and_says_so(
    cache: Path, run: Any, run_json: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_inspect, "MOST_READ", 2)
    assert run_json("inspect", cache)[1]["arrays"]["shards_read"] == 2
    assert "from 2 of 3 shards, evenly chosen" in run("inspect", cache)[1]


def test_inspect_says_what_is_missing(cache: Path, run: Any, run_json: Any) -> None:
    shard_file(cache, 1).unlink()
    with open_writer(cache) as writer:
        write(writer, 5, first_sequence=30)
        write(writer, 6, first_sequence=9)
    (cache / "shards" / "\x1b[2J.tmp").write_text("foreign")
    report = run_json("inspect", cache)[1]
    assert report["missing"]["shards"] == [[1, 1], [3, 4]]
    assert report["missing"]["sequences"] == [[5, 7], [14, 29]]
    assert report["overlaps"] == [[2, 6]]
    assert report["foreign"] == ["shards/\x1b[2J.tmp"]
    out = run("inspect", cache)[1]
    for words in (
        "1, 3-4 (3 in all)",
        "5-7, 14-29 (19 in all)",
        "shards 2 and 6 hold some",
        r"\x1b[2J.tmp is no shard",
    ):
        assert words in out
    assert "\x1b" not in out


def test_inspect_compares_a_sealed_cache_with_what_is_there(cache: Path, run: Any, run_json: Any) -> None:
    seal(cache)
    shutil.copy(shard_file(cache, 0), shard_file(cache, 7))
    shard_file(cache, 1).unlink()
    report = run_json("inspect", cache)[1]
    assert report["missing"]["objects"] == [[1, 1]]
    assert report["not_in_manifest"] == [[7, 7]]
    assert report["arrays"]["shards_read"] == 2
    out = run("inspect", cache)[1]
    assert "of shard 1: in the manifest, but missing in the store" in out
    assert "shard 7: written after the cache was sealed" in out


def test_inspect_an_empty_cache(tmp_path: Path, run: Any, run_json: Any) -> None:
    create_cache(tmp_path / "cache", CacheSpec(VOCAB, 4)).close()
    status, out, _ = run("inspect", tmp_path / "cache")
    assert status == 0
    assert "there are no shards yet" in out
    status, report = run_json("inspect", tmp_path / "cache")
    assert status == 0
    assert (report["shards"], report["positions"], report["bytes_per_position"]) == (0, 0, None)
    assert report["mass"] == dict.fromkeys(("mean", "p05", "p50", "p95"))


def test_inspect_where_nothing_counts(tmp_path: Path, run: Any) -> None:
    with create_cache(tmp_path / "cache", CacheSpec(VOCAB, 4)) as writer:
        n = 8
        writer.write_shard(
            0,
            inputs={"tokens": np.zeros(n, int)},
            ids=np.zeros((n, 4), int),
            logprobs=np.full((n, 4), -np.inf),
            tail=np.zeros((n, 4)),
        )
    status, out, _ = run("inspect", tmp_path / "cache")
    assert status == 0
    assert "0.0% of the positions" in out


@pytest.mark.parametrize(
    "statistics",
    [
        None,
        {"mass": ["x"] * 4, "entropy": [0] * 4},
        {"mass": [2**70] * 4, "entropy": [0] * 4},
        {"mass": [], "entropy": []},
    ],
)
@pytest.mark.parametrize("command", ["inspect", "verify", "seal"])
def test_a_shard_that_lies_about_itself(cache: Path, run: Any, command: str, statistics: object) -> None:
    path = shard_file(cache, 1)
    attributes, arrays = unpacked(path.read_bytes())
    attributes["statistics"] = statistics
    path.write_bytes(pack(arrays, attributes, open_cache(cache).spec.settings, POSITIONS[1]))
    status, out, err = run(command, cache)
    assert status == 1
    assert "shard 1" in out + err


def test_inspect_names_a_damaged_shard(cache: Path, run: Any, run_json: Any) -> None:
    path = shard_file(cache, 2)
    path.write_bytes(path.read_bytes()[:-100])
    status, out, err = run("inspect", cache)
    assert (status, out) == (1, "")
    assert err.startswith(f"fastkd: shard 2 of {cache}")
    assert "shard 2" in run_json("inspect", cache)[1]["error"]


def test_hostile_text_reaches_no_terminal(tmp_path: Path, run: Any, run_json: Any) -> None:
    notes = "\x1b[31mred\ud800 \r\n all is well"
    create_cache(tmp_path / "cache", CacheSpec(VOCAB, 4, notes=notes)).close()
    out = run("inspect", tmp_path / "cache")[1]
    assert r"\x1b[31mred\ud800 all is well" in out
    assert run_json("inspect", tmp_path / "cache")[1]["notes"] == notes


def test_a_zip_and_http(cache: Path, tmp_path: Path, server: str, run: Any, run_json: Any) -> None:
    status, out, err = run("inspect", f"{server}/cache")
    assert (status, out) == (1, "")
    assert "Only a sealed cache" in err
    seal(cache)
    expected = run_json("inspect", cache)[1]
    shutil.make_archive(str(tmp_path / "zipped"), "zip", cache)
    report = run_json("inspect", tmp_path / "zipped.zip")[1]
    assert report == expected | {"cache": str(tmp_path / "zipped.zip")}
    status, report = run_json("inspect", f"{server}/cache")
    assert status == 0
    assert report["missing"].pop("listed") is False
    assert report["arrays"] == expected["arrays"]
    assert "cannot be listed" in run("inspect", f"{server}/cache")[1]
    assert run("verify", tmp_path / "zipped.zip", "--deep")[0] == 0
    status, out, err = run("verify", f"{server}/cache")
    assert status == 0
    assert "no problem found (3 shards" in out
    assert "only the shards in the manifest were checked" in err
    for readonly in (tmp_path / "zipped.zip", f"{server}/cache"):
        status, out, err = run("seal", readonly)
        assert (status, out) == (1, "")
        assert "can only be read" in err
    shard_file(cache, 1).unlink()
    assert run_json("inspect", f"{server}/cache")[1]["missing"]["objects"] == [[1, 1]]
    status, report = run_json("verify", f"{server}/cache")
    assert status == 1
    assert report["problems"] == [
        {"shard": 1, "array": None, "what": "it is in the manifest, and its object is missing", "feature": None}
    ]


# verify


@pytest.mark.parametrize("flags", [[], ["--deep"]], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_verify_finds_nothing_wrong(made: Path, run: Any, run_json: Any, shape: str, flags: list[str]) -> None:
    status, out, err = run("verify", made / shape, *flags)
    assert (status, err) == (0, "")
    assert "no problem found (3 shards, 96 positions" in out
    status, report = run_json("verify", made / shape, *flags)
    assert status == 0
    assert report["ok"] is True
    assert report["deep"] is bool(flags)
    assert (report["shards"], report["positions"], report["problems"]) == (3, 96, [])


@pytest.mark.parametrize("flags", [[], ["--deep"]], ids=str)
@pytest.mark.parametrize("sealed", [False, True])
def test_verify_names_shard_and_array(cache: Path, run: Any, run_json: Any, sealed: bool, flags: list[str]) -> None:
    if sealed:
        seal(cache)
    flip(cache, 1, "head/values/c/0")
    flip(cache, 2, "tail/c/0/0")
    status, out, _ = run("verify", cache, *flags)
    assert status == 1
    lines = out.splitlines()
    assert lines[0].startswith("shard 1, array head/values: its bytes differ")
    assert lines[1].startswith("shard 2, array tail: its bytes differ")
    assert "2 problems found" in lines[2]
    status, report = run_json("verify", cache, *flags)
    assert status == 1
    assert report["ok"] is False
    assert [(p["shard"], p["array"]) for p in report["problems"]] == [(1, "head/values"), (2, "tail")]


def test_verify_decodes_only_when_asked(cache: Path, run: Any) -> None:
    path = shard_file(cache, 1)
    attributes, arrays = unpacked(path.read_bytes())
    arrays["head/firsts"] = arrays["head/firsts"].copy()
    arrays["head/firsts"][0] ^= 1
    path.write_bytes(pack(arrays, attributes, open_cache(cache).spec.settings, POSITIONS[1]))
    assert run("verify", cache)[0] == 0  # whole and hashed, whatever it means
    status, out, _ = run("verify", cache, "--deep")
    assert status == 1
    assert out.startswith("shard 1: its decoded arrays differ")


def test_verify_missing_late_and_foreign(cache: Path, run: Any) -> None:
    shard_file(cache, 1).unlink()
    (cache / "shards" / "notes.txt").write_text("foreign")
    status, out, _ = run("verify", cache)
    assert status == 1
    assert "shard 1: it is missing, between others that exist\n" in out
    assert "the cache: 'shards/notes.txt' is no shard's name\n" in out
    (cache / "shards" / "notes.txt").unlink()
    seal(cache)
    shutil.copy(shard_file(cache, 0), shard_file(cache, 3))
    shard_file(cache, 2).unlink()
    status, out, _ = run("verify", cache)
    assert status == 1
    assert "shard 2: it is in the manifest, and its object is missing\n" in out
    assert "shard 3: its index: got 0; expected 3\n" in out


def test_verify_of_an_unreadable_manifest_looks_at_the_shards(cache: Path, run: Any, run_json: Any) -> None:
    seal(cache)
    manifest = cache / "manifest.parquet"
    manifest.write_bytes(manifest.read_bytes()[:-50])
    flip(cache, 2, "tail/c/0/0")
    status, report = run_json("verify", cache)
    assert status == 1
    assert [p["shard"] for p in report["problems"]] == [None, 2]
    assert report["shards"] == 3
    assert run("verify", cache)[1].startswith("the cache: manifest.parquet: not readable as a manifest")
    for command in ("inspect", "seal"):
        status, out, err = run(command, cache)
        assert (status, out) == (1, "")
        assert err.startswith(f"fastkd: {cache}: manifest.parquet: not readable as a manifest")


@pytest.mark.parametrize("spec", ["", "{}", "\xff", '{"format": "fastkd-cache", "version": 99}', "growth"])
def test_verify_of_an_unreadable_spec(cache: Path, run: Any, run_json: Any, spec: str) -> None:
    if spec == "growth":
        spec = (cache / "spec.json").read_text().replace('"growth": 0.3', '"growth": null')
        assert "null" in spec
    (cache / "spec.json").write_bytes(spec.encode("latin-1"))
    status, out, _ = run("verify", cache)
    assert status == 1
    assert out.startswith("the cache: spec.json: ")
    status, report = run_json("verify", cache)
    assert status == 1
    assert len(report["problems"]) == 1
    assert run("inspect", cache)[0] == 1


def test_verify_of_a_lost_spec(cache: Path, run: Any) -> None:
    (cache / "spec.json").unlink()
    status, out, _ = run("verify", cache)
    assert status == 1
    assert out.startswith("the cache: spec.json is missing, and 3 objects in shards/ exist")


def test_verify_an_empty_cache(tmp_path: Path, run: Any) -> None:
    create_cache(tmp_path / "cache", CacheSpec(VOCAB, 4)).close()
    status, out, _ = run("verify", tmp_path / "cache")
    assert status == 0
    assert "0 shards" in out


def test_progress_off_a_terminal_is_lines(cache: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.utils.progress.LINE_SECONDS", 0.0)
    for command, word in (("verify", "verify"), ("inspect", "scan"), ("seal", "scan")):
        status, _, err = run(command, cache)
        assert status == 0
        assert f"{word}: 2 of 3 shards (66.7%)" in err
        assert run(command, cache, "--json")[2] == ""


# seal


def test_seal(cache: Path, run: Any, run_json: Any) -> None:
    status, out, err = run("seal", cache)
    assert (status, out, err) == (0, f"{cache}: sealed, 3 shards, 96 positions\n", "")
    assert open_cache(cache).sealed
    assert run("seal", cache)[1] == f"{cache}: already sealed, 3 shards, 96 positions\n"
    status, report = run_json("seal", cache)
    assert status == 0
    assert report == {"cache": str(cache), "already": True, "shards": 3, "positions": 96, "missing": [], "features": {}}


def test_what_a_plan_has_beyond_the_last_shard_is_missing_from_a_sealed_cache(cache: Path, run: Any) -> None:
    (cache / "plan.json").write_bytes(CapturePlan({}, "", {"shards": 6}, train_shards=6, sha256="").to_json())
    status, out, err = run("seal", cache)
    assert status == 0
    assert "sealed, 3 shards" in out
    assert "shards 3-5 are missing, and a sealed cache accepts no more. To write them, delete manifest.parquet" in err
    status, out, _ = run("verify", cache)
    assert status == 0
    assert (
        "missing (sealed without them): shards 3-5. Run the same capture again after deleting manifest.parquet" in out
    )


def test_seal_says_what_is_missing(cache: Path, run: Any, run_json: Any) -> None:
    shard_file(cache, 1).unlink()
    status, out, err = run("seal", cache)
    assert status == 0
    assert "sealed, 2 shards" in out
    assert "shard 1 is missing, and a sealed cache accepts no more" in err
    assert run_json("seal", cache)[1]["missing"] == [[1, 1]]


def test_seal_refuses_no_shards(tmp_path: Path, run: Any) -> None:
    create_cache(tmp_path / "cache", CacheSpec(VOCAB, 4)).close()
    status, out, err = run("seal", tmp_path / "cache")
    assert (status, out) == (1, "")
    assert "got a cache without shards" in err
    assert not (tmp_path / "cache" / "manifest.parquet").exists()


def test_seal_refuses_overlaps_and_other_shards(cache: Path, run: Any) -> None:
    with open_writer(cache) as writer:
        write(writer, 3, first_sequence=2)
    status, _, err = run("seal", cache)
    assert status == 1
    assert "hold some of the same sequences" in err
    shard_file(cache, 3).unlink()
    assert run("seal", cache)[0] == 0
    shard_file(cache, 2).unlink()
    status, _, err = run("seal", cache)
    assert status == 1
    assert "it was sealed with other shards than the 2 it has now" in err


def test_open_writer_goes_on(cache: Path, tmp_path: Path) -> None:
    with open_writer(cache) as writer:
        write(writer, 3)
    assert open_cache(cache).shards == [0, 1, 2, 3]
    with pytest.raises(Exception, match="not there"):
        open_writer(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# As a person runs it


def fastkd(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastkd", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_exit_statuses(cache: Path, tmp_path: Path) -> None:
    flip(cache, 1, "head/values/c/0")
    damaged = fastkd("verify", cache)
    assert damaged.returncode == 1
    assert "shard 1, array head/values" in damaged.stdout
    nowhere = fastkd("verify", tmp_path / "nowhere")
    assert (nowhere.returncode, nowhere.stdout) == (2, "")
    plain = fastkd("inspect", cache, env={"PYTHONIOENCODING": "ascii"})
    assert plain.returncode == 0, plain.stderr
    assert r"s3://\u2026@bucket" in plain.stdout


def test_help_and_version_import_nothing_heavy() -> None:
    code = "import sys; from fastkd.cli.main import main; main(['{}']); print(*sys.modules)"
    for argument in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argument)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        loaded = set(done.stdout.split())
        assert "fastkd.cli.main" in loaded
        assert not loaded & {"torch", "triton", "zarr", "numcodecs", "pyarrow", "numpy", "obstore", "tqdm"}


def test_a_reader_that_has_gone(cache: Path) -> None:
    command = [sys.executable, "-m", "fastkd", "inspect", str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_output_that_cannot_be_written(cache: Path) -> None:
    """The status alone says what happened: no traceback, neither at once nor when Python flushes at its end."""
    cases = ((["--help"], 0), (["train", "--help"], 0), (["train", "--nope"], 2), (["inspect", str(cache)], 0))
    with open("/dev/full", "w") as full:
        for arguments, status in cases:
            command = [sys.executable, "-m", "fastkd", *arguments]
            streams: dict[str, Any] = {"stdout": full, "stderr": subprocess.PIPE}
            if status == 2:  # what is printed goes to stderr
                streams = {"stdout": subprocess.PIPE, "stderr": full}
            done = subprocess.run(command, **streams, timeout=120)
            assert (done.returncode, done.stdout or b"", done.stderr or b"") == (status, b"", b"")


def test_an_interrupt_is_no_traceback(cache: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_inspect, "inspect_cache", interrupt)
    assert run("inspect", cache) == (130, "", "fastkd: interrupted\n")


# Words


def test_words() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 99_949, 123_456, 10**9, 5 * 10**18)] == [
        "0 B", "999 B", "1.0 kB", "99.9 kB", "123 kB", "1.0 GB", "5000 PB",
    ]  # fmt: skip
    assert runs({7, 5, 3, 6}) == [[3, 3], [5, 7]]
    assert ranges([[3, 3], [5, 7]]) == "3, 5-7"
    assert ranges([[i, i] for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert printable("a\x1b[0m\nb\ud800é") == "a\\x1b[0m\\nb\\ud800é"
    assert without_credentials("see https://u:p@h/x?sig=1 and s3://b/c, pad_token=0") == (
        "see https://…@h/x?… and s3://b/c, pad_token=0"
    )


# features


def test_features_are_listed_sealed_verified_and_dropped(tmp_path: Path, run: Any, run_json: Any) -> None:
    base = make_base(tmp_path / "cache", seal=True)
    write_feature(tmp_path / "cache", base, kl=2e-3)
    write_feature(tmp_path / "cache", base, 2, name="-1", layer=30, notes='{"step_search": {"kl": 3e-4}}')
    status, out, _ = run("features", tmp_path / "cache")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[:3]] == ["Features", "20", "-1"]
    assert lines[1][1:5] == ["12", "0.06", "180", "3"]
    assert lines[1][6] == "2.0e-03"
    assert lines[2][6] == "3.0e-04"
    found = run_json("features", tmp_path / "cache")[1]["features"]
    assert found["-1"]["missing"] == [[2, 2]]
    assert found["20"]["vectors"] == found["20"]["stored_positions"] == 180
    folder = tmp_path / "cache/features/20"
    assert found["20"]["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    inspected = run("inspect", tmp_path / "cache")[1]
    assert all(line in inspected for line in out.splitlines())
    assert run_json("inspect", tmp_path / "cache")[1]["features"] == found
    status, out, err = run("seal", tmp_path / "cache")
    assert status == 0
    assert "feature 20: sealed, 3 shards" in out
    assert "feature -1 is not sealed: shard 2 is missing" in err
    assert (folder / "manifest.parquet").exists()
    status, out, _ = run("verify", tmp_path / "cache", "--deep")
    assert status == 0
    assert "feature -1: no problem found (2 shards, 120 vectors" in out
    data = bytearray((folder / "shards/1.zarr.zip").read_bytes())
    data[99] ^= 1
    (folder / "shards/1.zarr.zip").write_bytes(data)
    status, out, _ = run("verify", tmp_path / "cache")
    assert status == 1
    assert out.startswith("feature 20, shard 1")
    assert "To repair feature 20" in out
    assert "To repair the cache" not in out
    assert run_json("verify", tmp_path / "cache")[1]["problems"][0]["feature"] == "20"
    status, out, _ = run("features", tmp_path / "cache", "--drop", "20")
    assert (status, "dropped feature 20, 6 objects" in out) == (0, True)
    assert run("verify", tmp_path / "cache")[0] == 0
    status, _, err = run("features", tmp_path / "cache", "--drop", "20")
    assert (status, "there is no feature 20" in err) == (1, True)
    assert run_json("features", tmp_path / "cache", "--drop=-1")[1]["dropped"] == {"-1": 4}
    assert "no features" in run("features", tmp_path / "cache")[1]


@pytest.mark.parametrize("command", [("inspect",), ("inspect", "--json"), ("inspect", "c", "--sample")])
def test_a_long_value_is_not_echoed_whole(command: tuple[str, ...], run: Any) -> None:
    status, out, err = run(*command, "a" * 100_000)
    assert status == 2
    assert "aaa… (99,74" in err
    assert len(out) + len(err) < 1500
