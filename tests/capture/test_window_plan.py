"""The plan: every token in one counted place, nothing that mixes what must not mix, and always the same plan."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fastkd.cache import CacheSpec, create_cache, open_cache
from fastkd.capture.rows import TEXT, read_shard_rows, teacher_inputs
from fastkd.capture.window_plan import WindowPlan, WindowPlanSettings, make_window_plan
from fastkd.data.documents import open_documents
from fastkd.data.packing import pack
from fastkd.errors import DataError


@st.composite
def plans(draw: st.DrawFn) -> WindowPlan:
    """A plan for up to 40 documents of up to 60 tokens, by any settings."""
    lengths = draw(st.lists(st.integers(0, 60), min_size=2, max_size=40))
    lengths[:2] = [max(1, n) for n in lengths[:2]]
    on_long = draw(st.sampled_from(["split", "truncate"]))
    context = draw(st.integers(1, 70))
    settings = WindowPlanSettings(
        context=context,
        packing=draw(st.sampled_from(["pack", "keep"])),
        on_long=on_long,
        overlap=draw(st.integers(0, context - 1)) if on_long == "split" else 0,
        shard_positions=context + draw(st.integers(0, 200)),
        batch_tokens=draw(st.integers(1, 200)),
        held_out=draw(st.sampled_from([0, 0.1, 0.5, 0.99])),
        seed=draw(st.integers(0, 2**63 - 1)),
    )
    return make_window_plan(lengths, settings, "dataset")


def split_of(plan: WindowPlan) -> dict[int, bool]:
    """Whether each document is held out, from the shards alone; no document may be both."""
    found: dict[int, bool] = {}
    for index in range(plan.shards):
        shard = plan.shard(index)
        for document in shard.document.tolist():
            assert found.setdefault(document, shard.held_out) == shard.held_out
    return found


class Segment(NamedTuple):
    """Tokens start to stop of a document. is_context: repeated as context only, without targets."""

    document: int
    start: int
    stop: int
    is_context: bool


def window(plan: WindowPlan, number: int) -> list[Segment]:
    """The segments of a window, in order; repeated context is a separate segment."""
    shard = plan.shard(int(np.searchsorted(plan.shard_windows, number, side="right")) - 1)
    first = number - shard.first_window
    segments = []
    for i in range(*shard.window_starts[first : first + 2].tolist()):
        document, start, stop = int(shard.document[i]), int(shard.start[i]), int(shard.stop[i])
        middle = start + int(shard.context[i])
        if middle > start:
            segments.append(Segment(document, start, middle, True))
        segments.append(Segment(document, middle, stop, False))
    return segments


some = hypothesis_settings(max_examples=100, deadline=None)


@some
@given(plans())
def test_every_token_is_in_one_counted_place(plan: WindowPlan) -> None:
    settings = plan.settings
    counted = {(d, t): 0 for d, n in enumerate(plan.lengths.tolist()) for t in range(n)}
    for number in range(plan.windows):
        for piece in window(plan, number):
            assert 0 <= piece.start < piece.stop
            if not piece.is_context:
                for token in range(piece.start, piece.stop):
                    counted[piece.document, token] += 1
    kept = settings.context if settings.on_long == "truncate" else 10**9
    assert all(times == (token < kept) for (_, token), times in counted.items())
    totals = plan.totals
    assert totals["tokens"] == sum(counted.values())
    assert totals["dropped_tokens"] == len(counted) - totals["tokens"]
    assert totals["positions"] == sum(plan.shard(i).window_lengths.sum() for i in range(plan.shards))
    assert totals["skipped"] == int((plan.lengths == 0).sum())
    assert totals["long"] == int((plan.lengths > settings.context).sum())


@some
@given(plans())
def test_windows_and_their_context(plan: WindowPlan) -> None:
    settings = plan.settings
    for number in range(plan.windows):
        pieces = window(plan, number)
        assert sum(p.stop - p.start for p in pieces) <= settings.context
        for before, piece in zip([None, *pieces], pieces, strict=False):
            if piece.is_context:
                assert piece.stop - piece.start == settings.overlap > 0
            elif piece.start:
                # a later part of a document has its context just before it
                context = before if settings.overlap else None
                assert context is None or (context.document, context.stop) == (piece.document, piece.start)
        whole = [p for p in pieces if not p.is_context]
        assert len(whole) == 1 or settings.packing == "pack"
        if settings.packing == "keep" and plan.lengths[whole[0].document] <= settings.context:
            assert (whole[0].start, whole[0].stop) == (0, plan.lengths[whole[0].document])


@some
@given(plans())
def test_no_short_document_is_cut(plan: WindowPlan) -> None:
    lengths = plan.lengths.tolist()
    for number in range(plan.windows):
        for piece in window(plan, number):
            if lengths[piece.document] <= plan.settings.context:
                assert piece == (piece.document, 0, lengths[piece.document], False)


@some
@given(plans())
def test_the_held_out_documents(plan: WindowPlan) -> None:
    held_out = split_of(plan)
    kept = np.flatnonzero(plan.lengths)
    assert sorted(held_out) == kept.tolist()
    fraction = plan.settings.held_out
    expected = min(max(1, round(fraction * len(kept))), len(kept) - 1) if fraction else 0
    assert sum(held_out.values()) == plan.totals["held_out"] == expected
    # it is the documents and the seed that decide, nothing else
    other = make_window_plan(plan.lengths, WindowPlanSettings(7, held_out=fraction, seed=plan.settings.seed), "another")
    assert split_of(other) == held_out
    assert [plan.shard(i).held_out for i in range(plan.shards)] == sorted(
        plan.shard(i).held_out for i in range(plan.shards)
    )


@some
@given(plans())
def test_shards_and_batches_are_partitions(plan: WindowPlan) -> None:
    settings = plan.settings
    windows, documents = 0, -1
    for index in range(plan.shards):
        shard = plan.shard(index)
        lengths = shard.window_lengths
        assert shard.first_window == windows
        assert lengths.sum() == plan.shard_rows[index + 1] - plan.shard_rows[index]
        assert 0 < lengths.sum() <= settings.shard_positions
        assert lengths.min() > 0
        # shards follow the order of the documents, so that a shard is read from one stretch of a file
        if index != plan.train_shards:
            assert shard.document.min() >= documents
        documents = shard.document.max()
        pieces = shard.stop - shard.start
        batches = plan.batches(index)
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(pieces)))
        sizes = [pieces[batch] for batch in batches]
        for size in sizes:
            assert len(size) == 1 or len(size) * size.max() <= settings.batch_tokens
        assert all((np.diff(np.concatenate(sizes)) <= 0).tolist())
        for size, after in pairwise(sizes):
            assert (len(size) + 1) * size.max() > settings.batch_tokens >= 0 < len(after)
        windows += len(lengths)
    assert windows == plan.windows


@some
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 60))
def test_packing_leaves_no_two_windows_that_could_be_one(lengths: list[int], context: int) -> None:
    windows, count = pack(np.array(lengths, np.int32), context)
    room = np.bincount(windows, lengths, minlength=count) if lengths else np.zeros(0)
    assert len(room) == count
    assert (room <= context).all()
    smallest = np.sort(room)[:2]
    assert len(smallest) < 2 or smallest.sum() > context


def test_packing_is_best_fit() -> None:
    windows, count = pack(np.array([3, 7, 5, 2, 4, 10, 7], np.int32), 10)
    # 10 | 7 3 | 7 2 | 5 4: the 3 fills what the first 7 leaves, the 2 goes where least is left over
    assert (windows.tolist(), count) == ([1, 1, 3, 2, 3, 0, 2], 4)


@some
@given(plans(), st.randoms(use_true_random=False))
def test_rows_are_the_windows(plan: WindowPlan, random: Any) -> None:
    """Whatever the order in which shards are read, and where each lies after the documents' tokens say so."""
    documents = [np.arange(n) + 1000 * d for d, n in enumerate(plan.lengths.tolist())]
    source = open_documents(documents)
    order = list(range(plan.shards))
    random.shuffle(order)
    for index in order:
        found = read_shard_rows(plan, source, index)
        count = len(plan.shard(index).window_lengths)
        expected: dict[str, list[Any]] = {"tokens": [], "mask": [], "numbers": [], "sequences": [], "documents": []}
        for number in range(found.first_sequence, found.first_sequence + count):
            expected["sequences"].append(0)
            for piece in window(plan, number):
                length = piece.stop - piece.start
                expected["tokens"] += documents[piece.document][piece.start : piece.stop].tolist()
                expected["mask"] += [not piece.is_context] * length
                expected["sequences"][-1] += length
                # a piece and the context before it are one
                expected["numbers"] += [(piece.document << 31) + t for t in range(piece.start, piece.stop)]
                if piece.is_context or piece.start == 0 or not plan.settings.overlap:
                    expected["documents"].append(length)
                else:
                    expected["documents"][-1] += length
        tokens = found.inputs["tokens"]
        assert tokens.tolist() == expected["tokens"]
        assert found.counts.tolist() == found.inputs["loss_mask"].tolist() == expected["mask"]
        assert found.row_numbers(np.arange(len(found))).tolist() == expected["numbers"]
        assert found.inputs["document"].tolist() == [n >> 31 for n in expected["numbers"]]
        assert found.sequence_lengths.tolist() == expected["sequences"]
        assert found.document_lengths.tolist() == expected["documents"]
        begins = np.cumsum(found.document_lengths) - found.document_lengths
        assert (tokens[begins] == 1000 * found.document + found.start).all()
        for places in plan.batches(index):
            padded = teacher_inputs(found, source, places)
            for row, place in zip(padded.tolist(), places.tolist(), strict=True):
                piece = tokens[begins[place] :][: found.document_lengths[place]].tolist()
                assert row == piece + [0] * (len(row) - len(piece))


@some
@given(plans())
def test_a_plan_is_made_again_from_its_json(plan: WindowPlan) -> None:
    data = plan.to_json()
    assert len(data) < 2000
    again = WindowPlan.from_json(data, plan.lengths)
    assert again.hash == plan.hash
    assert again.settings == plan.settings
    changed = plan.lengths.copy()
    changed[0] += 1
    with pytest.raises(DataError, match="these lengths give another plan"):
        WindowPlan.from_json(data, changed)


WINDOWS = [
    [(6, 0, 16, False)],
    [(0, 0, 5, False), (4, 0, 2, False), (5, 0, 9, False)],
    [(6, 13, 16, True), (6, 16, 17, False), (7, 0, 1, False)],
    [(9, 0, 8, False)],
    # held out
    [(2, 0, 16, False)],
    [(2, 13, 16, True), (2, 16, 29, False)],
    [(2, 26, 29, True), (2, 29, 30, False)],
    [(3, 0, 16, False)],
    [(8, 0, 11, False)],
]
BATCHES = [[0, 3], [1, 4, 2, 5], [0], [0, 1], [2], [0, 1]]
GOLDEN = WindowPlanSettings(16, overlap=3, shard_positions=40, batch_tokens=33, held_out=0.3, seed=5)


def golden() -> WindowPlan:
    return make_window_plan(np.array([5, 0, 30, 16, 2, 9, 17, 1, 11, 8]), GOLDEN, "dataset")


def test_the_rules_have_not_changed() -> None:
    """Where this fails the rules make other plans: VERSION has to change, or caches are continued by another plan."""
    plan = golden()
    assert plan.hash == "126c9a0cfe57daaed48ab1951ac74285f0118d62c41b11fef6c85620ba2fda44"
    assert [window(plan, w) for w in range(plan.windows)] == WINDOWS
    assert [batch.tolist() for i in range(plan.shards) for batch in plan.batches(i)] == BATCHES


def test_the_hash_is_the_same_in_another_process() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_window_plan import golden; print(golden().hash)"
    out = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == golden().hash


@pytest.mark.parametrize("change", [{"seed": 6}, {"overlap": 2}, {"batch_tokens": 21}, {"packing": "keep"}])
def test_the_hash_follows_settings_and_dataset(change: dict[str, Any]) -> None:
    lengths = golden().lengths
    assert make_window_plan(lengths, replace(GOLDEN, **change), "dataset").hash != golden().hash
    assert make_window_plan(lengths, GOLDEN, "other").hash != golden().hash
    assert make_window_plan(lengths.astype(np.uint16), GOLDEN, "dataset").hash == golden().hash


def test_a_plan_keeps_its_own_lengths() -> None:
    lengths = np.array([3, 4], np.int32)
    plan = make_window_plan(lengths, WindowPlanSettings(8), "")
    before = plan.hash
    lengths[0] = 8
    assert make_window_plan([3, 4], WindowPlanSettings(8), "").hash == before
    with pytest.raises(ValueError, match="read-only"):
        plan.lengths[0] = 8


def test_held_out_documents_are_spread_evenly() -> None:
    plan = make_window_plan(np.ones(100_000, np.int32), WindowPlanSettings(8, held_out=0.1), "")
    held_out = np.sort(plan.order[-10_000:])
    assert np.abs(np.histogram(held_out, 20, (0, 100_000))[0] - 500).max() < 110
    others = [
        make_window_plan(plan.lengths, WindowPlanSettings(8, held_out=0.1, seed=s), "").order[-10_000:] for s in (1, 2)
    ]
    for other in others:
        assert 800 < len(np.intersect1d(held_out, other)) < 1200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 0}, "context: got 0"),
        ({"context": True}, "context: got True"),
        ({"context": 8.0}, r"context: got 8\.0"),
        ({"overlap": -1}, "overlap: got -1"),
        ({"overlap": 8}, r"overlap: got 8; expected less than the context \(8\)"),
        ({"overlap": 1, "on_long": "truncate"}, "overlap: got 1; .*with on_long"),
        ({"packing": "tight"}, "packing: got 'tight'; expected one of pack, keep"),
        ({"on_long": "drop"}, "on_long: got 'drop'; expected one of split, truncate, error"),
        ({"shard_positions": 7}, "shard_positions: got 7; expected at least the context \\(8\\)"),
        ({"batch_tokens": 0}, "batch_tokens: got 0"),
        ({"held_out": 1}, "held_out: got 1; expected a fraction"),
        ({"held_out": float("nan")}, "held_out: got nan"),
        ({"held_out": "0.1"}, "held_out: got '0.1'"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        WindowPlanSettings(**{"context": 8, **change})


@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        ([], WindowPlanSettings(8), "got 0 documents without tokens"),
        ([0, 0], WindowPlanSettings(8), "got 2 documents without tokens"),
        ([3, 9, 10], WindowPlanSettings(8, on_long="error"), "document 1: got 9 tokens \\(2 documents are too long\\)"),
        ([0, 3], WindowPlanSettings(8, held_out=0.1), "held_out: got 0.1 and one document"),
        ([3, -1], WindowPlanSettings(8), "lengths: got int64"),
        ([3.0], WindowPlanSettings(8), "lengths: got float64"),
        ([[3]], WindowPlanSettings(8), r"lengths: got int64 of shape \(1, 1\)"),
        ([2**31], WindowPlanSettings(8), "lengths: got int64"),
    ],
)
def test_bad_lengths_are_named(lengths: Any, settings: WindowPlanSettings, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_window_plan(lengths, settings, "")


def test_numbers_that_are_not_there() -> None:
    plan = golden()
    for number in (-1, plan.shards):
        with pytest.raises(DataError, match=r"shard: got .*; expected 0 to"):
            plan.shard(number)


def test_json_that_is_no_plan() -> None:
    good = json.loads(golden().to_json())
    for bad in (b"", b"[]", b"{}", *(json.dumps(good | c).encode() for c in ({"version": 2}, {"settings": {"a": 1}}))):
        with pytest.raises(DataError, match="cannot be read by this version"):
            WindowPlan.from_json(bad, golden().lengths)


def test_a_document_of_the_largest_length() -> None:
    plan = make_window_plan([2**31 - 1], WindowPlanSettings(2**30, overlap=2**29, shard_positions=2**31 - 1), "")
    assert [window(plan, w)[-1].stop for w in range(plan.windows)] == [2**30, 2**30 + 2**29, 2**31 - 1]


def test_a_changed_dataset_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"ids": [[1, 2], [3]]}), path)
    plan = make_window_plan(open_documents(path).lengths(), WindowPlanSettings(8), "")
    pq.write_table(pa.table({"ids": [[1, 2], [3, 4]]}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 1 .*got 2 tokens; expected 1, as planned"):
        read_shard_rows(plan, open_documents(path), 0)


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.utils.progress.LINE_SECONDS", 0.0)
    make_window_plan([3], WindowPlanSettings(8), "")
    assert capsys.readouterr() == ("", "")
    make_window_plan([3], WindowPlanSettings(8), "", progress=True)
    captured = capsys.readouterr()
    assert not captured.out
    assert "plan: 1 of 1 shards (100.0%)" in captured.err


def test_shards_of_a_plan_make_a_cache(tmp_path: Path) -> None:
    """From conversations to a cache: what counts has targets, and sequences are the plan's windows."""
    said = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because of the long answer"}]
    source = open_documents(
        [said, [], said[:1], said],
        tokenizer=lambda text: list(text.encode()),
        tokenizer_fingerprint="bytes",
        template=lambda chat, ask: "".join(f"{m['role']}:{m['content']}\n" for m in chat) + "assistant:" * ask,
        template_fingerprint="colons",
        loss_on="assistant",
    )
    settings = WindowPlanSettings(30, overlap=4, shard_positions=64)
    plan = make_window_plan(source.lengths(), settings, source.fingerprint())
    spec = CacheSpec(vocab_size=256, k=1, temperatures=(1.0,), shard_positions=64, inputs=TEXT)
    with create_cache(tmp_path / "cache", spec) as writer:
        for index in range(plan.shards):
            some_rows = read_shard_rows(plan, source, index)
            counts = some_rows.counts[:, None]
            writer.write_shard(
                index,
                some_rows.inputs,
                ids=np.zeros((len(counts), 1), np.int32),
                logprobs=np.where(counts, np.float32(-0.5), -np.inf),
                tail=np.where(counts, np.float32(np.log(1 - np.exp(-0.5))), 0),
                sequence_lengths=some_rows.sequence_lengths,
                document_lengths=some_rows.document_lengths,
                first_sequence=some_rows.first_sequence,
            )
        writer.seal()
    cache = open_cache(tmp_path / "cache")
    assert len(cache.shards) == plan.shards > 1
    replies = b""
    arrays = cache.sequences(range(plan.windows))
    # a row that counts predicts the next token; where a window ends it has no label
    tokens, mask = arrays["tokens"], arrays["loss_mask"]
    ends = np.cumsum(arrays["sequence_lengths"]) - 1
    labelled = np.flatnonzero(mask & ~np.isin(np.arange(len(mask)), ends))
    replies = bytes(tokens[labelled + 1].astype(np.uint8))
    assert (arrays["logprobs"][:, 0] > -np.inf).tolist() == mask.tolist()
    assert int(mask.sum()) == 2 * len("because of the long answer\n")
    assert replies.count(b"because") == 2
