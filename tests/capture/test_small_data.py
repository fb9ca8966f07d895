"""Small data: how much is held out by default, what a cache from before keeps, and what has nothing to predict."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from capture_cases import VOCAB, Causal, contents
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import fastkd
from fastkd.cache import CacheError, open_cache
from fastkd.cache.capture_plan import PLAN_KEY
from fastkd.cache.inspect import inspect_cache
from fastkd.cache.stores import MemoryStore
from fastkd.capture import answers
from fastkd.capture.window_plan import make_window_plan, plan_text, window_plan_settings
from fastkd.data.lengths import LENGTHS_KEY
from fastkd.data.packing import HELD_OUT, default_held_out
from fastkd.errors import DataError, TeacherError
from fastkd.settings import CaptureSettings
from fastkd.teachers.load import load_teacher
from fastkd.utils.text import report_text

SMALL: dict[str, Any] = {"k": 5, "draws": 3, "context": 64, "shard_positions": 512, "batch_tokens": 256}


def held_out(lengths: Any, **settings: Any) -> dict[str, int]:
    """Documents, windows and positions that are held out by default."""
    lengths = np.asarray(lengths, np.int32)
    chosen = window_plan_settings(CaptureSettings(**settings), lengths)
    return make_window_plan(lengths, chosen, "").held_out


@pytest.mark.parametrize(
    ("lengths", "documents", "positions"),
    [
        ([500], 0, 0),
        ([500] * 2, 1, 500),
        ([500] * 9, 1, 500),
        ([500] * 10, 2, 1000),  # a fifth
        ([355] * 100, 12, 4260),  # as many as have 4,096 positions
        ([5000] * 100, 8, 40000),
        ([20] * 100, 20, 400),  # a fifth
        ([5000] * 2000, 20, 100000),  # 1% is enough
    ],
)
def test_how_much_is_held_out(lengths: list[int], documents: int, positions: int) -> None:
    found = held_out(lengths)
    assert (found["documents"], found["positions"]) == (documents, positions)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=300), st.integers(0, 9))
def test_training_data_are_never_eaten(lengths: list[int], seed: int) -> None:
    """Never more than a fifth, of documents and of positions, but for one document or 1%."""
    sizes = np.array(lengths, np.int32)
    fraction, kept = default_held_out(sizes, seed), int(np.count_nonzero(sizes))
    if kept < 2:
        assert fraction == 0
        return
    found = held_out(lengths, seed=seed)
    least = max(1, round(HELD_OUT * kept))
    assert least <= found["documents"] == max(1, round(fraction * kept))
    if found["documents"] > least:
        assert found["documents"] <= kept / 5
        assert found["positions"] <= sizes.sum() / 5
        assert fraction == found["documents"] / kept
    else:
        assert fraction == HELD_OUT


def test_documents_with_nothing_to_predict_do_not_count() -> None:
    lengths = np.where(np.arange(200) % 2, 1, 900)
    documents = held_out(lengths)["documents"]
    order = make_window_plan(lengths, window_plan_settings(CaptureSettings(), lengths.astype(np.int32)), "").order
    assert np.count_nonzero(lengths[order[-documents:]] > 1) == 8
    # of an example, the only position is one to predict
    assert default_held_out(np.ones(100, np.int32), 0, predicting=1) == 0.2
    assert default_held_out(np.ones(100_000, np.int32), 0, predicting=1) == 0.04096


def documents(count: int, length: int = 30) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, VOCAB, (count, length)).tolist()


def capture(out: Any, data: Any, **changes: Any) -> Any:
    return fastkd.capture(Causal(), data, out, **{**SMALL, "fingerprint": "it", **changes})


@pytest.mark.parametrize("lost", [(), (PLAN_KEY,), ("spec.json",), (PLAN_KEY, LENGTHS_KEY)])
def test_a_cache_from_before_keeps_its_split(lost: tuple[str, ...]) -> None:
    """Its plan has 1%: the same command goes on with that, also if its plan or its spec is lost."""
    store: Any = MemoryStore()
    capture(store, documents(60), held_out=HELD_OUT, shards=[0])
    for key in lost:
        store._objects.pop(key)
    report = capture(store, documents(60))
    assert (report.complete, report.plan["held_out"]) == (True, 1)
    whole: Any = MemoryStore()
    capture(whole, documents(60), held_out=HELD_OUT)
    assert contents(store) == contents(whole)
    fresh: Any = MemoryStore()
    assert capture(fresh, documents(60)).plan["held_out"] == 12
    other: Any = MemoryStore()
    capture(other, documents(60), held_out=0.5, shards=[0])
    with pytest.raises(CacheError, match=r"held_out: 0\.5 and 0\.2"):
        capture(other, documents(60))
    for key in (PLAN_KEY, LENGTHS_KEY):
        other._objects.pop(key)
    with pytest.raises(CacheError, match=r"held_out, .* is another one; plan.json, which is lost, said which") as said:
        capture(other, documents(60))
    assert not re.search("[0-9a-f]{16}", str(said.value))
    with pytest.raises(CacheError, match=r"\(there, and now: data: sha256 \w{12}… and \w{12}…\)"):
        capture(other, documents(61))


def context_of(lengths: list[int], longest: int | None = None, **settings: Any) -> int:
    given = np.asarray(lengths, np.int32)
    return window_plan_settings(CaptureSettings(**settings), given, longest=longest).context


def test_small_data_are_packed_into_windows_that_hold_the_longest_document() -> None:
    assert context_of([100] * 50) == 256
    assert context_of([100, 257]) == context_of([512]) == 512
    assert context_of([513]) == 1024
    assert context_of([5000, 3]) == context_of([100] * 200_000) == context_of([100], packing="keep") == 2048
    assert context_of([100], overlap=300) == 2048
    assert context_of([600], longest=300) == 300
    assert context_of([100], context=77) == 77


@pytest.mark.parametrize("lost", [(), (PLAN_KEY, LENGTHS_KEY)])
@pytest.mark.parametrize("held", [None, HELD_OUT])
def test_a_cache_from_before_keeps_its_context(lost: tuple[str, ...], held: float | None) -> None:
    given: dict[str, Any] = {"context": 2048, "shard_positions": 2048}
    store: Any = MemoryStore()
    capture(store, documents(160), held_out=held, shards=[0], **given)
    for key in lost:
        store._objects.pop(key)
    assert capture(store, documents(160), context=None, shard_positions=2048).complete
    assert json.loads(store.get(PLAN_KEY))["settings"]["context"] == 2048
    fresh: Any = MemoryStore()
    capture(fresh, documents(160), context=None, shard_positions=2048)
    assert json.loads(fresh.get(PLAN_KEY))["settings"]["context"] == 256


def test_workers_agree_without_talking() -> None:
    """Both plan by themselves; the second finds the plan that it has made."""
    store: Any = MemoryStore()
    capture(store, documents(60), shards=[0])
    first = open_cache(store).spec.provenance.plan_sha256
    report = capture(store, documents(60), rank=1, world_size=2)
    assert report.complete
    assert open_cache(store).spec.provenance.plan_sha256 == first


def test_what_is_held_out_is_said(tmp_path: Path) -> None:
    events: list[Any] = []
    capture(tmp_path / "cache", [*documents(60), [5], []], progress=events.append)
    (plan,) = [event for event in events if event["event"] == "plan"]
    assert plan["text"].startswith(
        "plan: 62 documents (1 empty, left out; 1 of one token, with nothing to predict; 12 held out, with 360 "
        "positions), "
    )
    assert (plan["held_out"], plan["held_out_positions"], plan["nothing_to_predict"]) == (12, 360, 1)
    cache = open_cache(tmp_path / "cache")
    # plan.json has what it had
    assert "held_out_positions" not in json.loads(cache.store.get(PLAN_KEY))["totals"]
    report = inspect_cache(cache)
    assert report["held_out"] == {"documents": 12, "sequences": 6, "positions": 360}
    assert "held out          12 documents, 6 sequences, 360 positions" in report_text(report)
    (tmp_path / "cache" / PLAN_KEY).unlink()
    assert "held out          not known: there is no plan.json" in report_text(inspect_cache(cache))


def test_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got 3 documents of one token each, with a context of 64; expected two tokens"):
        capture(tmp_path / "cache", [[1], [2], [], [3]])
    with pytest.raises(DataError, match="of one token each, with a context of 1;"):
        capture(tmp_path / "cache", documents(3), context=1)
    assert not list(tmp_path.glob("cache/*.json"))


def test_most_of_the_data_held_out_is_said() -> None:
    lengths = np.full(10, 20, np.int32)
    for share, said in ((0.9, True), (0.2, False)):
        plan = make_window_plan(lengths, window_plan_settings(CaptureSettings(held_out=share), lengths), "")
        text = plan_text(plan.counts(text=True), plan.settings.context, "split")
        assert ("held out than are left to train on" in text) is said


def test_more_entries_than_outcomes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"k: got 60000; expected at most {VOCAB}, the outcomes of this teacher"
    with pytest.raises(TeacherError, match=message):
        capture(tmp_path / "cache", documents(3), k=60_000)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())
    store: Any = MemoryStore()
    with monkeypatch.context() as patch:  # the default is not asked for
        patch.setattr(answers, "_DEFAULT_K", (200,))
        assert not capture(store, documents(60), k=200, shards=[0]).complete
    assert capture(store, documents(60), k=200).complete, "a cache from before is continued"


@pytest.mark.parametrize(
    "change",
    [{"temperatures": (1.0, 1e9)}, {"draw_temperature": 1e-9}, {"mass": 0.0}, {"k": 0, "draws": 0}, {"k": -1}],
)
def test_values_that_no_teacher_can_serve(change: dict[str, Any]) -> None:
    """Before the teacher is asked for anything: here there is none."""
    with pytest.raises((DataError, CacheError), match=f"{next(iter(change))}: got"):
        fastkd.capture("no-such-teacher", documents(3), MemoryStore(), **change)


def test_a_config_is_enough_to_refuse(tmp_path: Path) -> None:
    """Before weights are loaded, of which there are none here."""
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 300, "n_positions": 64}}))

    def refused(**settings: Any) -> str:
        with pytest.raises(TeacherError) as caught:
            fastkd.capture(str(tmp_path), documents(3), MemoryStore(), **settings)
        return str(caught.value)

    assert "k: got 301; expected at most 300" in refused(k=301)
    assert "context: got 65; expected at most 64" in refused(context=65)
    assert "k: got" not in refused()
    assert "k: got" not in refused(k=300)
    with pytest.raises(TeacherError, match="transformers"):
        load_teacher(tmp_path)
