"""The loader: the contents of its steps, the same steps after any resume and on any ranks, and its errors."""

import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_jobs
from cache_cases import make_shard, make_spec
from stream_cases import TRAIN_SHARDS, bits, check, make_cache, ranks, reference, segments, tokens

from fastkd import DistillLoader, kd_loss
from fastkd.cache import Cache, CacheError, CorruptShard, create_cache
from fastkd.errors import StreamError
from fastkd.stream import cached, shard_source
from fastkd.stream.cached import LoaderPass
from fastkd.stream.prefetch import MAX_PLANNED, Prefetcher
from fastkd.stream.step_plan import LoaderProgress, RankShare


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("cache") / "c", draws=3)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [t for t in threading.enumerate() if t not in before and t.name.startswith("fastkd")]
    assert not left


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("limits", [{"micro_tokens": 50}, {"micro_tokens": None, "micro_batch_size": 2}])
def test_micro_batches_hold_what_the_cache_says(cache: Cache, layout: str, limits: Any) -> None:
    expected = reference(cache)
    loader = DistillLoader(cache, batch_size=4, layout=layout, shards_open=3, **limits)
    steps = list(loader)
    for step in steps:
        for batch in step.micro_batches:
            check(batch, expected)
            assert batch.layout == layout
            if limits["micro_tokens"] is not None:
                assert batch.input_ids.numel() <= 50
            elif layout == "padded":
                assert len(batch.input_ids) <= 2
        assert step.count == sum(b.count for b in step.micro_batches)
        assert step.positions == sum(b.positions for b in step.micro_batches)
        assert step.sequences == len({expected[t].sequence for t in tokens(step)})
        numbered = {
            (int(number), expected[segment[0]].sequence)
            for batch in step.micro_batches
            for number, segment in zip(batch.sequences, segments(batch), strict=True)
        }
        assert sorted(number for number, _ in numbered) == list(range(step.sequences))
        assert len({sequence for _, sequence in numbered}) == step.sequences
    train = [t for t, row in expected.items() if row.sequence[0] < TRAIN_SHARDS]
    assert tokens(*steps) == train
    assert len(loader) == len(steps) > 5


def test_documents_may_end_anywhere(tmp_path: Path) -> None:
    """A document that continues in the next sequence is two segments; without documents a sequence is one."""
    spec = make_spec()
    with create_cache(tmp_path / "c", spec) as writer:
        for index, lengths in enumerate((np.array([3, 5, 4]), None)):
            shard = make_shard(spec, 12, sequences=1, uncounted=0) | {"sequence_lengths": [6, 6]}
            shard["inputs"] = {"tokens": np.arange(12) + 100 * index}
            writer.write_shard(index, **shard, document_lengths=lengths, first_sequence=2 * index)
    (step,) = DistillLoader(tmp_path / "c", batch_size=9, shuffle=False, layout="packed")
    (batch,) = step.micro_batches
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 8, 12, 18, 24]
    assert batch.position_ids[0, :12].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.labels[0, :12].tolist() == [1, 2, -100, 4, 5, -100, 7, -100, 9, 10, 11, -100]


def test_masks(cache: Cache) -> None:
    for layout in ("padded", "packed"):
        step = next(iter(DistillLoader(cache, batch_size=3, layout=layout, micro_tokens=None)))
        (batch,) = step.micro_batches
        mask, flat = batch.packing_mask(), batch.input_ids
        of = {token: number for number, segment in enumerate(segments(batch)) for token in segment}
        for row in range(len(flat)):
            for q in range(flat.shape[1]):
                if batch.padding_mask()[row, q]:
                    seen = {int(flat[row, k]) for k in mask[row, 0, q].nonzero().flatten()}
                    token = int(flat[row, q])
                    assert seen == {t for t in of if of[t] == of[token] and t <= token}


@pytest.mark.parametrize("by", [{"batch_size": 3}, {"batch_tokens": 70}])
def test_a_loader_resumes_from_every_step(cache: Cache, by: Any) -> None:
    """Through two epochs and the boundary between them, bit for bit."""

    def new() -> DistillLoader:
        return DistillLoader(cache, **by, seed=3, shards_open=3, micro_tokens=64)

    loader = new()
    expected, states = [], []
    for _ in range(2):
        for step in loader:
            expected.append(bits(step))
            states.append(loader.state_dict())
    assert [step[3] for step in expected] == sorted(step[3] for step in expected)
    for at, state in enumerate(states):
        resumed = new()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        rest = [bits(step) for _ in range(2) for step in resumed]
        assert rest[: len(expected) - at - 1] == expected[at + 1 :]
    resumed = new()
    assert [bits(step) for step in resumed.steps(epochs=2)] == expected
    assert resumed.state_dict()["epoch"] == 2
    resumed.set_epoch(1)
    assert [bits(step) for step in resumed] == [step for step in expected if step[3] == 1]


def test_epochs(cache: Cache) -> None:
    loader = DistillLoader(cache, batch_tokens=70)
    first = [bits(step) for step in loader]
    second = [bits(step) for step in loader]
    assert len(first) == len(second) == len(loader)
    assert first != second
    loader.set_epoch(0)
    steps = iter(loader)
    assert bits(next(steps)) == first[0]
    loader.set_epoch(0)  # where it is already: it stays
    assert loader.state_dict()["steps"] == 1
    assert [bits(step) for step in loader] == first[1:]
    assert list(steps) == []  # another one iterates now
    other = DistillLoader(cache, batch_tokens=70, seed=1)
    assert [bits(step) for step in other] != first


def test_a_finished_epoch_is_finished_once(cache: Cache) -> None:
    """Resumed after the last step of an epoch, it yields no more of that epoch, and then the next one."""
    loader = DistillLoader(cache, batch_size=5)
    for _ in loader:
        state = loader.state_dict()
    loader = DistillLoader(cache, batch_size=5)
    loader.load_state_dict(state)
    loader.set_epoch(0)
    assert list(loader) == []
    assert {step.epoch for step in loader} == {1}


@pytest.mark.parametrize("by", [{"batch_size": 7}, {"batch_tokens": 130}])
def test_other_numbers_of_ranks_resume_with_the_same_steps(cache: Cache, by: Any) -> None:
    settings = {**by, "shards_open": 4, "micro_tokens": 40}
    alone, end = ranks(cache, 1, **settings)
    first, state = ranks(cache, 2, stop=2, **settings)
    for world_size in (1, 3, 4):
        rest, after = ranks(cache, world_size, state, **settings)
        assert after == end
        for shares, (whole,) in zip([*first, *rest], alone, strict=True):
            assert tokens(*shares) == tokens(whole)
            for share in shares:
                assert (share.count, share.positions, share.sequences) == (
                    whole.count,
                    whole.positions,
                    whole.sequences,
                )
            # as many on each: all ranks go forward and backward equally often
            assert len({len(share.micro_batches) for share in shares}) == 1
            assert sum(b.count for share in shares for b in share.micro_batches) == whole.count


def test_an_empty_micro_batch_has_no_loss(cache: Cache) -> None:
    shares = ranks(cache, 4, batch_size=4, micro_tokens=24)[0]
    empty = [b for step in shares for share in step for b in share.micro_batches if not b.positions]
    assert empty
    for batch in empty:
        logits = torch.randn(1, 1, 500, requires_grad=True)
        loss = kd_loss(logits, batch.targets, batch.labels, num_items=7).loss
        loss.backward()
        assert float(loss.detach()) == 0
        assert logits.grad is not None
        assert not logits.grad.any()


def test_the_loss_of_a_step_does_not_depend_on_how_it_is_cut(cache: Cache) -> None:
    torch.manual_seed(0)
    table = torch.randn(2000, 500, dtype=torch.float64)
    losses = []
    for settings in ({}, {"micro_tokens": 30}, {"layout": "packed"}, {"layout": "packed", "micro_batch_size": 1}):
        step = next(iter(DistillLoader(cache, batch_size=6, **settings)))
        parts = []
        for batch in step.micro_batches:
            # tokens here lie above the vocabulary
            labels = torch.where(batch.labels < 0, batch.labels, batch.labels % 500)
            parts.append(kd_loss(table[batch.input_ids], batch.targets, labels, num_items=step.count).loss)
        losses.append(float(sum(parts)))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)


def test_two_processes(cache: Cache, tmp_path: Path) -> None:
    train_jobs.run(train_jobs.count_steps, cache.store.describe(), tmp_path, ranks=2)
    expected = str([step.count for step in DistillLoader(cache, batch_size=5)])
    assert [(tmp_path / f"counts-{rank}").read_text() for rank in range(2)] == [expected, expected]


def test_mixtures(cache: Cache, tmp_path: Path) -> None:
    """Positions are shared by the weights; rows with fewer entries, or without draws, are padded."""
    other = make_cache(tmp_path / "other", seed=1, first_token=10_000, k=5)
    expected = reference(cache) | reference(other)
    loader = DistillLoader([(cache, 3), (other, 1)], batch_size=6, shards_open=3)
    seen: list[int] = []
    for step in loader.steps(epochs=3):
        for batch in step.micro_batches:
            check(batch, expected)
            assert batch.targets.ids.shape[1] == 11
            assert batch.targets.draws is not None
            filled = batch.targets.logprobs[batch.input_ids.flatten()[batch.targets.index] >= 10_000][:, 5:]
            assert bool((filled == -torch.inf).all())
        seen += tokens(step)
    share = np.mean(np.array(seen) < 10_000)
    assert abs(share - 0.75) < 0.03
    assert len(loader) == -(-sum(len(s) for s in [_sequences(cache), _sequences(other)]) // 6)
    assert abs(len(DistillLoader([(cache, 3), (other, 1)], batch_tokens=90)) * 90 - len(seen) / 3) < 200
    again = DistillLoader([(cache, 3), (other, 1)], batch_size=6, shards_open=3)
    again.load_state_dict(loader.state_dict())
    assert bits(next(iter(again))) == bits(next(iter(loader)))


def _sequences(cache: Cache) -> set[tuple[int, int]]:
    loader = DistillLoader(cache, batch_size=1000, shuffle=False)
    expected = reference(cache)
    return {expected[t].sequence for step in loader for t in tokens(step)}


def test_splits_never_meet(cache: Cache) -> None:
    train, held_out = (tokens(*DistillLoader(cache, batch_size=8, split=s)) for s in ("train", "held_out"))
    assert train
    assert held_out
    assert sorted(train + held_out) == sorted(reference(cache))
    arrays = [cache.read_shard(i) for i in cache.shards]
    document = {t: d for a in arrays for t, d in zip(a["tokens"].tolist(), a["document"].tolist(), strict=True)}
    assert not {document[t] for t in train} & {document[t] for t in held_out}


@pytest.mark.parametrize("skip", [0, 1, 4, 11])
@pytest.mark.parametrize("max_positions", [None, 30, 100, 333])
def test_skip_and_max_positions(cache: Cache, skip: int, max_positions: int | None) -> None:
    expected = reference(cache)
    in_order: dict[tuple[int, int], list[int]] = {}
    for token, row in sorted(expected.items()):
        if row.sequence[0] < TRAIN_SHARDS:
            in_order.setdefault(row.sequence, []).append(token)
    wanted: list[int] = []
    for some in list(in_order.values())[skip:]:
        if max_positions is not None and len(wanted) + len(some) > max_positions:
            break
        wanted += some
    loader = DistillLoader(cache, batch_tokens=40, skip=skip, max_positions=max_positions, shards_open=2)
    steps = list(loader)
    assert tokens(*steps) == wanted
    assert len(steps) == len(loader) == -(-len(wanted) // 40)
    for step in steps:
        for batch in step.micro_batches:
            check(batch, expected)


def test_without_shuffling_the_order_is_the_data(cache: Cache) -> None:
    loader = DistillLoader(cache, batch_size=2, shuffle=False, layout="packed")
    seen = [t for step in loader for b in step.micro_batches for t in b.input_ids.flatten().tolist()]
    assert seen == sorted(seen)


def test_shards_in_memory_are_bounded(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most, reads = 0, 0, 0
    lock = threading.Lock()
    read, release = LoaderPass._read, LoaderPass._release

    def counted_read(self: LoaderPass, key: Any) -> Any:
        nonlocal held, most, reads
        with lock:
            held, reads = held + 1, reads + 1
            most = max(most, held)
        return read(self, key)

    def counted_release(self: LoaderPass, shard: Any) -> None:
        nonlocal held
        with lock:
            held -= 1
        release(self, shard)

    monkeypatch.setattr(LoaderPass, "_read", counted_read)
    monkeypatch.setattr(LoaderPass, "_release", counted_release)
    steps = list(DistillLoader(cache, batch_size=1, shards_open=3, threads=1))
    assert len(steps) > 20
    assert reads == TRAIN_SHARDS  # each once
    assert most == 4
    held = most = reads = 0
    # a step of more shards than the bound still comes
    assert len(list(DistillLoader(cache, batch_size=1000, shards_open=1, threads=1))) == 1
    assert reads == TRAIN_SHARDS
    # what stays open is not read again in the next epoch
    reads = 0
    steps = list(DistillLoader(cache, batch_size=8, shards_open=99).steps(epochs=3))
    assert reads == TRAIN_SHARDS
    assert {s.epoch for s in steps} == {0, 1, 2}


def test_planning_is_bounded() -> None:
    """One shard holds everything, for epochs without end: only the number of planned steps ends planning."""
    drawn = 0

    def shares() -> Iterator[RankShare]:
        nonlocal drawn
        while True:
            drawn += 1
            yield RankShare(drawn, {(0, 0): np.zeros(1, np.int64)}, {(0, 0)}, LoaderProgress())

    read: Any = lambda key: key  # noqa: E731
    ahead = Prefetcher(
        shares(), read, lambda share, shards: share.sequences, lambda shard: None, shards=2, steps=2, threads=1
    )
    try:
        assert [ahead.next() for _ in range(5)] == [1, 2, 3, 4, 5]
        while drawn < MAX_PLANNED:
            time.sleep(0.001)
        time.sleep(0.1)  # for tens of thousands
        # taken, ready, in the assembler's hands, planned, in the planner's hands
        assert drawn <= 5 + 2 + 1 + MAX_PLANNED + 1
    finally:
        ahead.close()


def test_memory_grows_with_open_shards(cache: Cache) -> None:
    few, many = (DistillLoader(cache, batch_size=2, shards_open=n).memory for n in (1, 8))
    assert 0 < few < many


def test_leaving_the_loop_ends_the_threads(cache: Cache) -> None:
    before = set(threading.enumerate())  # those of other tests' teachers stay for the next call
    loader = DistillLoader(cache, batch_size=1)
    for _ in loader:
        break
    assert not {t.name for t in set(threading.enumerate()) - before if t.name.startswith("fastkd")}
    steps = iter(loader)
    next(steps)
    loader.close()
    state = loader.state_dict()
    assert list(steps) == []
    assert loader.state_dict() == state


def test_a_step_that_is_dropped_is_gone(cache: Cache) -> None:
    steps = iter(DistillLoader(cache, batch_size=1))
    step = next(steps)
    dropped = weakref.ref(step)
    del step
    assert dropped() is None
    next(steps)


def test_an_interrupted_consumer_leaves_no_thread(cache: Cache) -> None:
    def train() -> None:
        for step in DistillLoader(cache, batch_size=1):
            raise KeyboardInterrupt(step)

    with pytest.raises(KeyboardInterrupt):
        train()


def damaged(place: Path) -> Cache:
    cache = make_cache(place)
    shard = place / "shards" / "3.zarr.zip"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    return cache


@pytest.mark.parametrize("by", [{"batch_size": 1}, {"batch_tokens": 24}])
def test_a_damaged_shard_is_named_when_its_step_is_due(tmp_path: Path, by: Any) -> None:
    loader = DistillLoader(damaged(tmp_path / "c"), **by, shuffle=False)
    found: list[int] = []

    def train() -> None:
        for step in loader:
            found.extend(tokens(step))

    with pytest.raises(CorruptShard, match=r"shard 3 of .*differ from its sha256"):
        train()
    # what lies before it was handed out
    whole = make_cache(tmp_path / "whole")
    before = [t for t, row in sorted(reference(whole).items()) if row.sequence[0] < 3]
    assert found == before[: len(found)]
    assert len(found) > len(before) - 24


def test_errors_of_any_thread_come_out_whole(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("made up")

    for name, module in (("gather", shard_source), ("open_shard", cached)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            loader = DistillLoader(cache, batch_size=2)
            with pytest.raises(ZeroDivisionError, match="made up") as caught:
                next(iter(loader))
            assert "fail" in [entry.name for entry in caught.traceback]
            with pytest.raises(ZeroDivisionError):
                next(iter(loader))
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "sequence_lengths", fail)
        with pytest.raises(ZeroDivisionError, match="made up"):
            next(iter(DistillLoader(cache, batch_tokens=50)))


def test_missing_shards_are_named(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c", leave_out=(2, 5, TRAIN_SHARDS), seal=False)
    with pytest.raises(StreamError, match=r"2 of the 13 shards of this split are missing \(15.4%; the first is 2\)"):
        DistillLoader(cache, batch_size=2)
    with pytest.raises(StreamError, match="1 of the 3 shards of this split is missing"):
        DistillLoader(cache, batch_size=2, split="held_out")
    loader = DistillLoader(cache, batch_size=2, allow_partial=True)
    there = [t for t, row in reference(cache).items() if row.sequence[0] < TRAIN_SHARDS]
    assert tokens(*loader) == there
    unplanned = make_cache(tmp_path / "u", leave_out=(2,), seal=False, planned=False)
    with pytest.raises(StreamError, match="1 of the 16 shards of this split is missing"):
        DistillLoader(unplanned, batch_size=2)
    sealed = make_cache(tmp_path / "s", leave_out=(2,), planned=False)
    assert tokens(*DistillLoader(sealed, batch_size=2)) == sorted(reference(sealed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "batch_size, batch_tokens: got None and None; expected exactly one of the two"),
        ({"batch_size": 2, "batch_tokens": 2}, "batch_size, batch_tokens: got 2 and 2"),
        ({"batch_size": 0}, "batch_size: got 0; expected an integer of at least 1"),
        ({"batch_size": 2.0}, r"batch_size: got 2\.0"),
        ({"batch_size": True}, "batch_size: got True"),
        ({"batch_size": 2, "micro_tokens": 0}, "micro_tokens: got 0"),
        ({"batch_size": 2, "seed": -1}, "seed: got -1; expected an integer of at least 0"),
        ({"batch_size": 2, "layout": "ragged"}, "layout: got 'ragged'; expected one of padded, packed"),
        ({"batch_size": 2, "decode": "device"}, "decode: got 'device'; expected no value.*on the host now"),
        ({"batch_size": 2, "split": "test"}, "split: got 'test'; expected one of train, held_out"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "rank: got 2; expected 0 to 1"),
        ({"batch_size": 2, "world_size": 2}, "reduce: got None; expected a function for 2 ranks.*summed_over"),
        (
            {"batch_size": 2, "world_size": 3, "reduce": print},
            "world_size: got 3 ranks; expected at most 2, the sequences per step",
        ),
        ({"batch_tokens": 99, "world_size": 999, "reduce": print}, "world_size: got 999 ranks"),
        ({"batch_size": 2, "skip": 10**6}, "skip: got 1000000, which leaves nothing"),
        ({"batch_size": 2, "max_positions": 1}, "max_positions: got 1, which leaves nothing"),
    ],
)
def test_bad_settings_are_named(cache: Cache, settings: Any, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        DistillLoader(cache, **settings)


def test_a_sequence_longer_than_a_step_is_named(cache: Cache) -> None:
    with pytest.raises(StreamError, match=r"batch_tokens: got 10; expected at least \d+, .* sequence in shard"):
        next(iter(DistillLoader(cache, batch_tokens=10)))


def test_bad_caches_are_named(cache: Cache, tmp_path: Path) -> None:
    def no(given: Any, message: str, **settings: Any) -> None:
        with pytest.raises(StreamError, match=message):
            DistillLoader(given, batch_size=2, **settings)

    no([], "cache: got an empty mixture")
    no([cache, (cache, 1)], "pairs of a cache and its weight")
    no([(cache, 0)], "got the weight 0 for")
    no([(cache, float("nan"))], "got the weight nan for")
    no([(cache, 1), (cache, 1)], "skip, max_positions: got a mixture; expected one cache", skip=1)
    no([(cache, 1), (cache, 1e-9)], "comes to .* of the sequences")
    for name, change in (
        ("vocab_size", {"vocab_size": 400}),
        ("temperatures", {"temperatures": (1.0, 2.0)}),
        ("tokenizer", {"tokenizer": "another"}),
    ):
        other = make_cache(tmp_path / name, documents=5, **change)
        no([(cache, 1), (other, 1)], f"cannot be mixed: {name} is .* in one and .* in the other")
    unplanned = make_cache(tmp_path / "u", planned=False)
    no(unplanned, "split: got 'held_out', but .* has no plan.json", split="held_out")
    none = make_cache(tmp_path / "n", held_out=0.0)
    no(none, "split: got 'held_out', but .* was captured with held_out=0", split="held_out")
    with create_cache(tmp_path / "e", make_spec(inputs=("example",))) as writer:
        writer.write_shard(0, **make_shard(make_spec(inputs=("example",))))
    no(
        tmp_path / "e",
        "got input columns example; expected `tokens` for text, or example and augmentation_seed for examples",
    )
    spec = make_spec()
    with create_cache(tmp_path / "o", spec) as writer:
        for index in (0, 1):
            writer.write_shard(index, **make_shard(spec), first_sequence=index)
    no(tmp_path / "o", "shards 0 and 1 hold some of the same sequences")
    with create_cache(tmp_path / "nothing", spec):
        pass
    no(tmp_path / "nothing", "got no shard of split 'train'")
    with create_cache(tmp_path / "bad", spec) as writer:
        writer.write_shard(0, **make_shard(spec))
        writer.store.create("plan.json", b'{"format": "fastkd-plan", "train_shards": -1, "totals": {"shards": 1}}')
    with pytest.raises(CacheError, match=r"bad: plan\.json: settings: got None; expected dict"):
        DistillLoader(tmp_path / "bad", batch_size=2)
    with pytest.raises(CacheError, match="nowhere: not there"):
        DistillLoader(tmp_path / "nowhere", batch_size=2)


def test_states_of_others_are_refused(cache: Cache, tmp_path: Path) -> None:
    loader = DistillLoader(cache, batch_size=2)
    state = loader.state_dict()

    def no(given: Any, message: str) -> None:
        with pytest.raises(StreamError, match=message):
            loader.load_state_dict(given)

    no({**state, "version": 2}, "state: got version 2; expected 1")
    no({}, "state: got version None")
    no({"version": 1}, "state: got no fingerprint")
    no({**state, "sequences": 10**6}, "state: got 1000000 sequences; expected at most")
    no({**state, "epoch": "one"}, "state: epoch: got 'one'")
    for change, named in (
        ({"seed": 1}, "seed: 1 there, 0 here"),
        ({"shards_open": 2}, "shards_open: 2 there, 8 here"),
        ({"split": "held_out"}, "split: 'held_out' there, 'train' here"),
        ({"skip": 1}, "skip: 1 there, 0 here"),
        ({"batch_size": 3}, "batch_size: 3 there, 2 here"),
    ):
        other = DistillLoader(cache, **{"batch_size": 2, **change})
        no(other.state_dict(), f"other settings: .*{named}")
    other = DistillLoader(make_cache(tmp_path / "c", seed=9), batch_size=2)
    no(other.state_dict(), "other settings: caches: .*there")


@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_student_attends_within_segments(cache: Cache) -> None:
    """Padded with nothing but ids; packed with position_ids and use_cache=False, or with the mask."""
    pytest.importorskip("transformers")
    from fastkd.models.hub import load_transformers

    transformers = load_transformers()
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()

    @torch.no_grad()
    def logits_of(ids: torch.Tensor, **given: Any) -> torch.Tensor:
        logits: torch.Tensor = model(ids, **given).logits
        return logits

    for layout in ("padded", "packed"):
        (batch,) = next(iter(DistillLoader(cache, batch_size=4, layout=layout, micro_tokens=None))).micro_batches
        ways: list[dict[str, Any]] = [{}]
        if layout == "packed":
            ways = [
                {"position_ids": batch.position_ids, "use_cache": False},
                {"position_ids": batch.position_ids, "attention_mask": batch.packing_mask()},
            ]
        for way in ways:
            logits = logits_of(batch.input_ids, **way).flatten(0, 1)[batch.padding_mask().flatten()]
            alone = torch.cat([logits_of(torch.tensor([segment]))[0] for segment in segments(batch)])
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    # what `padded` is the default for: nothing warns of this
    crossed = logits_of(batch.input_ids, position_ids=batch.position_ids, use_cache=True)[0]
    assert (crossed - alone).abs().max() > 1e-3


def test_devices(cache: Cache) -> None:
    step = next(iter(DistillLoader(cache, batch_size=2, device="meta")))
    assert {t.device.type for b in step.micro_batches for t in b.tensors()} == {"meta"}
    assert step.micro_batches[0].device.type == "meta"


@pytest.mark.gpu
def test_a_gpu_gets_the_same(cache: Cache) -> None:
    here = [bits(step) for step in DistillLoader(cache, batch_size=3)]
    there = [bits(step) for step in DistillLoader(cache, batch_size=3, device="cuda")]
    assert there == here


def test_ahead_is_the_old_name_of_prefetch(cache: Cache) -> None:
    with pytest.warns(DeprecationWarning, match="ahead: this argument is now named prefetch") as caught:
        old = DistillLoader(cache, batch_size=4, ahead=1)
    assert caught[0].filename == __file__
    assert [bits(step) for step in old] == [bits(step) for step in DistillLoader(cache, batch_size=4, prefetch=1)]
    with pytest.raises(StreamError, match="prefetch: got 0"), pytest.warns(DeprecationWarning, match="ahead"):
        DistillLoader(cache, batch_size=4, ahead=0)
