"""What goes into a cache comes out of it, and what must not go in is refused before anything is written."""

import gc
import json
import multiprocessing
import os
import pickle
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_cases import as_sets, make_shard, make_spec

from fastkd.cache import (
    CODECS,
    CacheError,
    CacheSpec,
    Codec,
    Commit,
    CorruptShard,
    StoreError,
    Workspace,
    create_cache,
    open_cache,
    open_store,
)
from fastkd.cache.stores import MemoryStore

SHAPES: dict[str, dict[str, Any]] = {
    "head": {},
    "adaptive": {"mass": 0.6},
    "hybrid": {"k": 5, "draws": 4},
    "adaptive hybrid": {"k": 5, "draws": 4, "mass": 0.4, "draw_temperature": 1.5},
    "draws alone": {"k": 0, "draws": 6},
    "whole vocabulary": {"vocab_size": 6, "k": 64},
    "wide": {"vocab_size": 70000, "k": 3},
    "one temperature": {"temperatures": (1.0,)},
    "columns": {"inputs": ("tokens", "loss_mask", "document")},
    "images": {"inputs": ("example", "augmentation_seed")},
}


def sealed(path: Path, shards: int = 3, **changes: Any) -> tuple[CacheSpec, list[dict[str, Any]]]:
    """A sealed cache at `path`, and what was written."""
    spec = make_spec(**changes)
    written = [make_shard(spec, seed=i) | {"first_sequence": 4 * i} for i in range(shards)]
    with create_cache(path, spec) as writer:
        for i, shard in enumerate(written):
            assert writer.write_shard(i, **shard) == Commit.COMMITTED
        writer.seal()
    return spec, written


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_goes_in_comes_out(tmp_path: Path, shape: str, codec: str) -> None:
    changes = SHAPES[shape]
    if codec == "smallest" and shape == "images":
        pytest.skip("contexts need tokens")
    spec = make_spec(codec=codec, **changes)
    shard = make_shard(spec)
    with create_cache(tmp_path, spec) as writer:
        assert writer.write_shard(7, **shard, first_sequence=12) == "committed"
        assert writer.write_shard(7, **shard, first_sequence=12) == "already there"
    cache = open_cache(tmp_path)
    assert cache.spec == spec
    assert cache.shards == [7]
    read = cache.read_shard(7)
    assert read["ids"].shape == read["logprobs"].shape == (96, spec.width)
    settings = spec.settings
    for got, want in zip(as_sets(read["ids"], read["logprobs"]), as_sets(shard["ids"], shard["logprobs"]), strict=True):
        assert got.keys() == want.keys()
        for token, value in want.items():
            step = max(min(settings.step * np.exp(settings.growth * -value), settings.cap), settings.draw_step)
            assert abs(got[token] - value) <= step / 2 * 1.1
    counted = (shard["logprobs"] > -np.inf).any(1)
    assert np.abs(read["tail"] - shard["tail"])[counted & (shard["tail"][:, 0] > -np.inf)].max(initial=0) <= 1 / 30
    assert (read["tail"][~counted] == -np.inf).all()
    if spec.draws:
        for i in range(96):
            want = {int(a): int(c) for a, c in zip(shard["ids"][i], shard["draws"][i], strict=True) if c}
            assert {int(a): int(c) for a, c in zip(read["ids"][i], read["draws"][i], strict=True) if c} == want
        heads = (read["logprobs"] > -np.inf) & (read["draws"] == 0)
        assert (np.diff(heads.astype(int), axis=1) <= 0).all(), "the head comes first"
    used = read["logprobs"] > -np.inf
    assert (read["outcomes"] == spec.vocab_size - (used & (read.get("draws", np.zeros(1)) == 0)).sum(1)).all()
    assert (read["ids"][~used] == 0).all()
    for name in spec.inputs:
        assert (read[name] == shard["inputs"][name]).all()
        assert read[name].dtype == shard["inputs"][name].dtype
    assert (read["sequence_lengths"] == shard["sequence_lengths"]).all()
    assert read["first_sequence"] == 12
    assert cache.verify(deep=True).ok


def test_rows_are_best_first(tmp_path: Path) -> None:
    sealed(tmp_path, codec="default")
    logprobs = open_cache(tmp_path).read_shard(0)["logprobs"]
    assert (logprobs[:, 1:] <= logprobs[:, :-1]).all()


def test_outcomes_and_masked_vocabularies(tmp_path: Path) -> None:
    spec = make_spec()
    shard = make_shard(spec, uncounted=0)
    outcomes = np.arange(96) + 100
    with create_cache(tmp_path, spec) as writer:
        writer.write_shard(0, **shard, outcomes=outcomes)
        writer.write_shard(1, **shard, outcomes=17)
    cache = open_cache(tmp_path)
    assert (cache.read_shard(0)["outcomes"] == outcomes).all()
    assert (cache.read_shard(1)["outcomes"] == 17).all()


def test_sequences_across_shards_in_the_order_asked_for(tmp_path: Path) -> None:
    _, written = sealed(tmp_path)
    cache = open_cache(tmp_path)
    numbers = [9, 0, 5, 9, 3]
    got = cache.sequences(numbers)
    tokens = []
    for number in numbers:
        shard = written[number // 4]
        ends = np.cumsum(shard["sequence_lengths"])
        stop = ends[number % 4]
        tokens.append(shard["inputs"]["tokens"][stop - shard["sequence_lengths"][number % 4] : stop])
    assert (got["tokens"] == np.concatenate(tokens)).all()
    assert got["sequence_lengths"].tolist() == [len(t) for t in tokens]
    assert len(got["ids"]) == len(got["tokens"]) == got["sequence_lengths"].sum()
    for missing in (12, -1):
        with pytest.raises(CacheError, match=f"sequence {missing}, which no shard"):
            cache.sequences([0, missing])


@pytest.mark.parametrize("changes", [{}, {"k": 5, "draws": 4, "mass": 0.4}, {"k": 0, "draws": 6}])
def test_reading_into_memory_used_before(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = make_spec(**changes)
    with create_cache(tmp_path, spec) as writer:
        for i, positions in enumerate((96, 40, 200)):
            writer.write_shard(i, **make_shard(spec, positions, seed=i), first_sequence=4 * i)
    cache, space = open_cache(tmp_path), Workspace()
    for i in (0, 1, 2, 1, 0):
        fresh, again = open_cache(tmp_path).read_shard(i), cache.read_shard(i, into=space)
        assert fresh.keys() == again.keys()
        assert all(np.array_equal(fresh[name], again[name]) for name in fresh)
    first, second = cache.read_shard(0, into=space), cache.read_shard(0)
    assert np.shares_memory(first["ids"], again["ids"])
    assert not any(np.shares_memory(first[name], second[name]) for name in first)


def test_the_manifest_is_the_same_before_and_after_sealing(tmp_path: Path) -> None:
    spec = make_spec()
    with create_cache(tmp_path, spec) as writer:
        for i in (4, 0, 2):
            writer.write_shard(i, **make_shard(spec, seed=i), first_sequence=4 * i)
        open_manifest = open_cache(tmp_path).manifest
        table = writer.seal()
        assert writer.seal().equals(table), "sealing again is no error"
    cache = open_cache(tmp_path)
    assert cache.sealed
    assert cache.manifest.equals(open_manifest)
    assert cache.shards == [0, 2, 4]
    assert cache.manifest.column("positions").to_pylist() == [96] * 3
    with pytest.raises(CacheError, match="sealed"), create_cache(tmp_path, spec) as writer:
        writer.write_shard(9, **make_shard(spec))


def test_sealing_refuses_overlapping_sequences(tmp_path: Path) -> None:
    spec = make_spec()
    with create_cache(tmp_path, spec) as writer:
        for i in range(2):
            writer.write_shard(i, **make_shard(spec), first_sequence=3 * i)
        with pytest.raises(CacheError, match="shards 0 and 1 hold some of the same sequences"):
            writer.seal()


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    sealed(tmp_path, teacher="one")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(CacheError, match="teacher: 'one' and 'two'"):
        create_cache(tmp_path, make_spec(teacher="two"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    create_cache(tmp_path, make_spec(teacher="one", notes="notes are free")).close()


BAD: dict[str, tuple[Any, str]] = {
    "id beyond the vocabulary": (lambda s: s["ids"].__setitem__((5, 2), 500), r"ids: row 5, column 2: got 500"),
    "negative id": (lambda s: s["ids"].__setitem__((5, 2), -1), r"ids: row 5, column 2"),
    "head not sorted": (
        lambda s: s["logprobs"].__setitem__((5, 2), -50.0),
        r"logprobs: row 5, column 3.*falling",
    ),
    "nan": (lambda s: s["logprobs"].__setitem__((5, 2), np.nan), r"logprobs: row 5, column 2: got nan"),
    "positive": (lambda s: s["logprobs"].__setitem__((5, 0), 0.5), r"logprobs: row 5, column 0: got 0.5"),
    "hole in the head": (
        lambda s: s["logprobs"].__setitem__((5, 2), -np.inf),
        r"row 5, column 2: got -inf; expected a finite",
    ),
    "last of a head": (
        lambda s: s["logprobs"].__setitem__((5, 7), -np.inf),
        r"ids: row 5, column 7: got \d+; expected id 0",
    ),
    "twins": (lambda s: s["ids"].__setitem__((5, 3), s["ids"][5, 2]), r"ids: row 5: got id \d+ twice"),
    "nan tail": (lambda s: s["tail"].__setitem__((5, 1), np.nan), r"tail: row 5, temperature 1"),
    "infinite tail": (lambda s: s["tail"].__setitem__((5, 1), np.inf), r"tail: row 5, temperature 1"),
    "half a tail": (lambda s: s["tail"].__setitem__((5, 1), -np.inf), r"tail: row 5"),
    "short tail": (lambda s: s.update(tail=s["tail"][:50]), r"tail: got shape \(50, 4\)"),
    "few temperatures": (lambda s: s.update(tail=s["tail"][:, :2]), r"tail: got shape \(96, 2\)"),
    "short ids": (lambda s: s.update(ids=s["ids"][:50]), r"logprobs: got shape"),
    "short tokens": (
        lambda s: s["inputs"].update(tokens=np.zeros(5, int)),
        r"inputs\['tokens'\]: got 5 values; expected 96",
    ),
    "no tokens": (lambda s: s.update(inputs={}), r"inputs: got \[\]"),
    "another column": (lambda s: s["inputs"].update(more=np.zeros(96)), r"inputs: got \['more', 'tokens'\]"),
    "sequences too short": (
        lambda s: s.update(sequence_lengths=[90]),
        r"sequence_lengths: got a sum of 90; expected",
    ),
    "empty sequence": (lambda s: s.update(sequence_lengths=[96, 0]), r"sequence_lengths: element 1: got 0"),
    "documents too long": (lambda s: s.update(document_lengths=[97]), r"document_lengths: element 0: got 97"),
    "draws nobody asked for": (lambda s: s.update(draws=np.ones((96, 8), int)), r"draws: got drawn entries"),
    "too many outcomes": (lambda s: s.update(outcomes=600), r"outcomes: row 0: got 600"),
    "float ids": (lambda s: s.update(ids=s["ids"].astype(float)), r"ids: got float64; expected integers"),
    "integer log-probabilities": (lambda s: s.update(logprobs=s["ids"]), r"logprobs: got int64"),
    "too wide": (lambda s: s.update(ids=np.zeros((96, 9), int)), r"ids: got 9 columns"),
    "no rows": (lambda s: s.update(ids=s["ids"][:0]), r"ids: got 0 rows"),
    "first sequence": (lambda s: s.update(first_sequence=-1), r"first_sequence: got -1"),
    "logits": (lambda s: s.update(logprobs=s["logprobs"] + 9), r"logprobs: row \d+, column 0"),
    "abyss": (lambda s: s["logprobs"].__setitem__((5, 7), -1e9), r"logprobs: row 5, column 7.*at least"),
    "tail above one": (lambda s: s["tail"].__setitem__((5, 0), 45.0), r"tail: row 5, temperature 0: got 45"),
    "lengths that wrap around": (
        lambda s: s.update(sequence_lengths=np.array([2**62] * 4 + [96])),
        r"sequence_lengths: element 0",
    ),
    "entries that vanish in float32": (
        lambda s: s.update(logprobs=np.where(np.arange(8) == 7, -1e300, s["logprobs"].astype(np.float64))),
        r"logprobs: row 0, column 7: got -1e\+300",
    ),
    "masked": (lambda s: s.update(logprobs=np.ma.masked_array(s["logprobs"])), r"logprobs: got a masked array"),
    "ragged outcomes": (lambda s: s.update(outcomes=[[1], [1, 2]]), r"outcomes: got list; expected a NumPy array"),
    "ragged list": (lambda s: s.update(ids=[[1], [1, 2]]), r"ids: got list; expected a NumPy array"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    spec = make_spec()
    shard = make_shard(spec, uncounted=0)
    spoil, message = BAD[case]
    spoil(shard)
    with create_cache(tmp_path, spec) as writer:
        with pytest.raises(CacheError, match=message):
            writer.write_shard(0, **shard)
        future = writer.submit_shard(1, **shard)
        with pytest.raises(CacheError, match=message):
            future.result()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "spec.json"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["draws"].__setitem__((5, 6), -1), r"draws: row 5, column 6: got -1"),
        (lambda s: s["draws"].__setitem__((5, 0), 1), r"draws: row 5, column 0.*before the last top-k"),
        (lambda s: s["draws"].__setitem__((5, 5), 40), r"draws: row 5, column 5: got 40"),
        (lambda s: s.update(draws=s["draws"].astype(np.int64) + (s["draws"] > 0) * 2**32), r"draws: row 0, column 5"),
        (lambda s: s.update(outcomes=0), r"outcomes: row 0: got 0"),
        (lambda s: s.pop("draws"), r"draws: got None"),
    ],
)
def test_bad_draws_are_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    spec = make_spec(k=5, draws=4)
    shard = make_shard(spec, uncounted=0)
    spoil(shard)
    with create_cache(tmp_path, spec) as writer, pytest.raises(CacheError, match=message):
        writer.write_shard(0, **shard)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"vocab_size": True}, "vocab_size"),
        ({"k": -1}, "k: got -1"),
        ({"k": 0}, "k: got 0 with draws=0"),
        ({"k": 8.5}, "k: got 8.5"),
        ({"mass": 1.5}, "mass: got 1.5"),
        ({"mass": 0}, "mass: got 0"),
        ({"temperatures": (2.0,)}, "temperatures"),
        ({"temperatures": (2.0, 1.0)}, "temperatures"),
        ({"temperatures": (1.0, float("nan"))}, "temperatures: got nan"),
        ({"draw_temperature": 0}, "draw_temperature: got 0"),
        ({"codec": "gzip"}, "codec: got 'gzip'; expected one of fast, default, smallest, portable"),
        ({"codec": Codec(compressor="lzma")}, "codec.compressor: got 'lzma'"),
        ({"codec": Codec(step=0)}, "codec.step"),
        ({"codec": Codec(step=1.0, cap=0.5)}, "codec.cap"),
        ({"inputs": ("ids",)}, "inputs: got 'ids'"),
        ({"inputs": ("../up",)}, "inputs: got '../up'"),
        ({"inputs": ("a", "a")}, "inputs"),
        ({"inputs": {"tokens", "loss_mask"}}, "inputs: got {"),
        ({"inputs": "tokens"}, "inputs: got 'tokens'"),
        ({"codec": "smallest", "inputs": ("example",)}, "contexts need"),
        ({"shard_positions": 0}, "shard_positions"),
        ({"teacher": 5}, "teacher: got 5"),
    ],
)
def test_bad_specs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        make_spec(**changes)


def test_a_spec_survives_its_file_and_its_hash_leaves_out_the_notes() -> None:
    spec = make_spec(codec=Codec(step=0.1, cap=0.5), notes="Grüße", mass=0.5, inputs=("tokens", "loss_mask"))
    again = CacheSpec.from_json(spec.to_json())
    assert again == spec
    assert make_spec(notes="one").hash == make_spec(notes="two").hash != make_spec(teacher="other").hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "got format version 2; expected 1"),
        (lambda d: d.update(required=[*d["required"], "tensor-trains"]), "required features tensor-trains"),
        (lambda d: d.update(format="other"), "not the spec of a fastkd cache"),
        (lambda d: d["spec"].update(k=9), "its hash differs"),
        (lambda d: d["spec"].update(surprise=1), "surprise.*; expected "),
        (lambda d: d.pop("spec"), "`spec` is missing"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path, change: Any, message: str) -> None:
    document = json.loads(make_spec().to_json())
    change(document)
    (tmp_path / "spec.json").write_text(json.dumps(document))
    with pytest.raises(CacheError, match=message):
        open_cache(tmp_path)


def test_optional_features_are_no_obstacle(tmp_path: Path) -> None:
    document = json.loads(make_spec().to_json())
    document["optional"] = ["poetry"]
    (tmp_path / "spec.json").write_text(json.dumps(document))
    assert open_cache(tmp_path).spec == make_spec()


def test_no_cache_no_shard(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no cache here"):
        open_cache(tmp_path)
    sealed(tmp_path)
    with pytest.raises(CacheError, match="shard 9"):
        open_cache(tmp_path).read_shard(9)


def test_submitting_does_not_wait_while_the_queue_has_room(tmp_path: Path) -> None:
    spec = make_spec()
    gate, store = threading.Event(), open_store(tmp_path, create=True)
    create, calls = store.create, []

    def held(key: str, data: Any) -> bool:
        calls.append(key)
        assert key == "spec.json" or gate.wait(30)
        return create(key, data)

    store.create = held  # type: ignore[method-assign]
    writer = create_cache(store, spec, threads=1, queue=2)
    futures = [writer.submit_shard(i, **make_shard(spec, seed=i), first_sequence=4 * i) for i in range(3)]
    assert not any(f.done() for f in futures), "the store is still held"
    late = threading.Thread(
        target=lambda: futures.append(writer.submit_shard(3, **make_shard(spec), first_sequence=12))
    )
    late.start()
    time.sleep(0.2)
    assert len(futures) == 3, "a full queue makes the caller wait"
    gate.set()
    late.join(30)
    assert [f.result(30) for f in futures] == [Commit.COMMITTED] * 4
    writer.close()
    assert open_cache(tmp_path).shards == [0, 1, 2, 3]


def test_many_threads_write_what_one_writes(tmp_path: Path) -> None:
    spec = make_spec(codec="smallest", k=5, draws=4)
    for name, threads in (("one", 1), ("many", 4)):
        with create_cache(tmp_path / name, spec, threads=threads) as writer:
            for i in range(8):
                writer.submit_shard(i, **make_shard(spec, seed=i), first_sequence=4 * i)
            writer.seal()
    one, many = (
        open_cache(tmp_path / n).manifest.drop(["object_sha256", "written", "attempt"]) for n in ("one", "many")
    )
    assert one.equals(many)


def _read(cache: Any, queue: Any) -> None:
    queue.put(int(sum(cache.read_shard(i)["ids"].sum() for i in cache.shards)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_cache(tmp_path: Path, method: str) -> None:
    sealed(tmp_path)
    cache = open_cache(tmp_path)
    want = sum(int(cache.read_shard(i)["ids"].sum()) for i in cache.shards)
    cache.sequences([0, 5])
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_read, args=(cache, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [want] * 2
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert pickle.loads(pickle.dumps(cache)).shards == cache.shards


def test_a_sealed_cache_opens_with_two_requests(tmp_path: Path) -> None:
    sealed(tmp_path)
    store, asked = open_store(tmp_path), []
    read = store._object  # type: ignore[attr-defined]

    def counted(key: str, length: int | None) -> bytes:
        asked.append(key)
        return read(key, length)

    store._object = counted  # type: ignore[attr-defined]
    cache = open_cache(store)
    assert cache.shards == [0, 1, 2]
    assert asked == ["spec.json", "manifest.parquet"]


def test_umask_is_honoured(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        sealed(tmp_path / "cache")
    finally:
        os.umask(before)
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_an_error_that_nobody_asked_for_comes_with_the_close_and_spoils_the_seal(tmp_path: Path) -> None:
    spec = make_spec()
    bad = make_shard(spec)
    bad["ids"][5, 2] = -1
    writer = create_cache(tmp_path, spec)
    asked = writer.submit_shard(0, **bad)
    with pytest.raises(CacheError, match="row 5"):
        asked.result()
    writer.submit_shard(1, **bad)
    writer.submit_shard(2, **bad)
    writer.write_shard(3, **make_shard(spec), first_sequence=12)
    with pytest.raises(CacheError, match=r"3 shards failed .* shard 0: ids: row 5"):
        writer.seal()
    assert writer.submit_shard(0, **make_shard(spec)).result() == Commit.COMMITTED
    with pytest.raises(CacheError, match="row 5") as raised:
        writer.close()
    assert len(getattr(raised.value, "__notes__", [])) <= 1
    assert open_cache(tmp_path).shards == [0, 3]
    writer.close()
    for call in (writer.write_shard, writer.submit_shard):
        with pytest.raises(CacheError, match="closed"):
            call(1, **make_shard(spec))


def test_failed_shards_are_let_go_of(tmp_path: Path) -> None:
    spec = make_spec()
    with create_cache(tmp_path, spec) as writer:
        bad = make_shard(spec)
        bad["ids"] = bad["ids"].copy()
        bad["ids"][5, 2] = -1
        alive = weakref.ref(bad["ids"])
        with pytest.raises(CacheError):
            writer.submit_shard(0, **bad).result()
        del bad
        for _ in range(100):  # the pool lets go a moment after the answer
            gc.collect()
            if alive() is None:
                break
            time.sleep(0.02)
        assert alive() is None


def test_nothing_is_added_to_a_cache_that_another_sealed(tmp_path: Path) -> None:
    spec = make_spec()
    one, other = create_cache(tmp_path, spec), create_cache(tmp_path, spec)
    one.write_shard(0, **make_shard(spec))
    other.seal()
    with pytest.raises(CacheError, match="the cache is sealed"):
        one.write_shard(1, **make_shard(spec), first_sequence=4)
    assert open_cache(tmp_path).shards == [0]
    with pytest.raises(CacheError, match="no shard to seal"):
        create_cache(tmp_path / "empty", spec).seal()


def test_the_same_number_for_other_sequences_is_refused(tmp_path: Path) -> None:
    spec = make_spec()
    with create_cache(tmp_path, spec) as writer:
        writer.write_shard(1, **make_shard(spec), first_sequence=4)
        with pytest.raises(CacheError, match=r"another plan \(first_sequence 4 and 8\)"):
            writer.write_shard(1, **make_shard(spec), first_sequence=8)


def test_an_object_that_is_there_and_then_gone_is_not_there(tmp_path: Path) -> None:
    spec = make_spec()
    store = MemoryStore()
    with create_cache(store, spec) as writer:
        store.create = lambda key, data: False  # type: ignore[method-assign]
        with pytest.raises(StoreError, match="was there and is gone"):
            writer.write_shard(0, **make_shard(spec))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_writer_says_that_it_was_forked(tmp_path: Path) -> None:
    writer = create_cache(tmp_path, make_spec())
    child = os.fork()
    if not child:
        try:
            writer.submit_shard(0, **make_shard(make_spec()))
        except CacheError as error:
            os._exit(7 if "another process" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    writer.close()


@pytest.mark.parametrize("numbers", [[1.9], ["2"], [True], [], 3, [[1]], [2**63], [float("nan")]])
def test_numbers_of_sequences_are_numbers(tmp_path: Path, numbers: Any) -> None:
    sealed(tmp_path, 1)
    with pytest.raises(CacheError, match="numbers: got"):
        open_cache(tmp_path).sequences(numbers)


def test_sequences_that_two_shards_claim_are_refused(tmp_path: Path) -> None:
    spec = make_spec()
    with create_cache(tmp_path, spec) as writer:
        for i in range(2):
            writer.write_shard(i, **make_shard(spec, seed=i))
    with pytest.raises(CacheError, match="shards 0 and 1 hold some of the same sequences"):
        open_cache(tmp_path).sequences([0])


def test_columns_of_two_types_are_not_mixed(tmp_path: Path) -> None:
    spec = make_spec()
    with create_cache(tmp_path, spec) as writer:
        for i, kind in enumerate((np.uint64, np.int64)):
            shard = make_shard(spec, seed=i)
            shard["inputs"]["tokens"] = shard["inputs"]["tokens"].astype(kind)
            writer.write_shard(i, **shard, first_sequence=4 * i)
    with pytest.raises(CacheError, match="tokens of types int64 and uint64"):
        open_cache(tmp_path).sequences([0, 4])


def test_a_damaged_shard_is_not_taken_for_a_committed_one(tmp_path: Path) -> None:
    spec, written = sealed(tmp_path)
    (tmp_path / "manifest.parquet").unlink()
    shard = tmp_path / "shards" / "1.zarr.zip"
    shard.write_bytes(shard.read_bytes()[:-100])
    with create_cache(tmp_path, spec) as writer:
        with pytest.raises(CorruptShard, match=r"shard 1 .*Delete shards/1.zarr.zip"):
            writer.write_shard(1, **written[1])
        shard.unlink()
        assert writer.write_shard(1, **written[1]) == Commit.COMMITTED
    assert open_cache(tmp_path).verify().ok


def test_the_manifest_is_plain_parquet(tmp_path: Path) -> None:
    sealed(tmp_path)
    table = pq.read_table(tmp_path / "manifest.parquet")
    assert table.column("first_sequence").to_pylist() == [0, 4, 8]
    assert table.column("counted").to_pylist() == [
        int((open_cache(tmp_path).read_shard(i)["logprobs"] > -np.inf).any(1).sum()) for i in range(3)
    ]


@pytest.mark.parametrize("codec", ["default", "portable"])
def test_sequence_lengths_come_from_the_end_of_a_shard(tmp_path: Path, codec: str) -> None:
    """Of a shard larger than what is read at once, too; what is read there is checked, and nothing else is needed."""
    spec = make_spec(vocab_size=40, k=3, codec=codec, shard_positions=2**16)
    shards = [make_shard(spec, n, seed=n, sequences=s) for n, s in ((12, 3), (25_000, 700))]
    with create_cache(tmp_path / "c", spec) as writer:
        for index, shard in enumerate(shards):
            writer.write_shard(index, **shard, first_sequence=index * 3)
        writer.seal()
    cache = open_cache(tmp_path / "c")
    for index, shard in enumerate(shards):
        assert cache.sequence_lengths(index).tolist() == shard["sequence_lengths"].tolist()
    place = tmp_path / "c" / "shards" / "0.zarr.zip"
    data = bytearray(place.read_bytes())
    at = data.index(b"sequence_lengths/c/0") + len("sequence_lengths/c/0")
    data[at + 2] ^= 1
    place.write_bytes(data)
    with pytest.raises(CorruptShard, match=r'shard 0 of .*, array "sequence_lengths"'):
        cache.sequence_lengths(0)
    with pytest.raises(CacheError, match=r"shard 7: .* has none of this number"):
        cache.sequence_lengths(7)
