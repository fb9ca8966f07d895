"""The order, the mixture and the steps, on lists: without a cache."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastkd.errors import StreamError
from fastkd.stream.division import packed_micro_batches, padded_micro_batches
from fastkd.stream.epoch_order import Epoch, order, permutation
from fastkd.stream.mixture import SequenceStream
from fastkd.stream.step_plan import LoaderProgress, RankShare, StepPlan, split_over_ranks

some = hypothesis_settings(max_examples=60, deadline=None)
sizes = st.lists(st.integers(1, 30), min_size=1, max_size=12).map(np.array)
opens = st.integers(1, 14)
seeds = st.integers(0, 2**63 - 1)


def whole(epoch: Epoch) -> list[tuple[int, int]]:
    taken = epoch.take(0, len(epoch))
    return list(zip(taken.shard.tolist(), taken.sequence.tolist(), strict=True))


@some
@given(sizes, seeds, st.integers(0, 2**40), opens, st.booleans())
def test_an_epoch_has_every_sequence_once(
    counts: NDArray[Any], seed: int, epoch: int, shards_open: int, shuffle: bool
) -> None:
    found = whole(order(counts, seed, epoch, shards_open=shards_open, shuffle=shuffle))
    data = [(shard, i) for shard, n in enumerate(counts.tolist()) for i in range(n)]
    assert sorted(found) == data
    if not shuffle:
        assert found == data


@some
@given(sizes, seeds, opens, st.data())
def test_slices_agree_with_the_whole(counts: NDArray[Any], seed: int, shards_open: int, data: st.DataObject) -> None:
    expected = whole(order(counts, seed, 3, shards_open=shards_open))
    asked = order(counts, seed, 3, shards_open=shards_open)
    for _ in range(4):  # in any order, and again
        start = data.draw(st.integers(0, len(asked) - 1))
        stop = data.draw(st.integers(start + 1, len(asked)))
        taken = asked.take(start, stop)
        assert list(zip(taken.shard.tolist(), taken.sequence.tolist(), strict=True)) == expected[start:stop]


@some
@given(sizes, seeds, opens)
def test_what_is_open_is_bounded(counts: NDArray[Any], seed: int, shards_open: int) -> None:
    """Every shard is open once, never are more open than `shards_open`, and open shards have different lanes."""
    epoch = order(counts, seed, 0, shards_open=shards_open)
    taken = epoch.take(0, len(epoch))
    seen: set[int] = set()
    before: set[int] = set()
    for place in range(len(epoch)):
        now = set(epoch.open_at(place).tolist())
        assert int(taken.shard[place]) in now
        assert len(now) == min(shards_open, len(counts))
        assert not (now - before) & seen, "a shard was opened twice"
        seen |= now
        before = now
    lane = {}
    for shard, at in zip(taken.shard.tolist(), taken.lane.tolist(), strict=True):
        assert lane.setdefault(shard, at) == at < shards_open
    for place in range(len(epoch)):
        lanes = [lane[shard] for shard in epoch.open_at(place).tolist()]
        assert len(set(lanes)) == len(lanes)


def test_epochs_and_seeds_differ() -> None:
    counts = np.full(9, 40)
    orders = [tuple(whole(order(counts, seed, epoch, shards_open=3))) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6
    first = [place[0] for place in orders]
    assert len(set(first)) > 3


def golden() -> list[int]:
    taken = order(np.array([5, 3, 8, 1, 4]), 7, 2, shards_open=3).take(4, 14)
    mixed = SequenceStream(
        [np.array([4, 4]), np.array([3])], [Fraction(2, 3), Fraction(1, 3)], 5, shards_open=2, shuffle=True
    )
    some = mixed.take(1000, 1010)
    both = np.concatenate([taken.shard * 10 + taken.sequence, some.source * 100 + some.shard * 10 + some.sequence])
    numbers: list[int] = both.tolist()
    return numbers


ORDER = [12, 24, 22, 21, 11, 4, 25, 40, 0, 41, 101, 12, 3, 11, 13, 12, 101, 1, 3, 10]


def test_the_order_has_not_changed() -> None:
    """If this fails, old states cannot be resumed: change VERSION of the loader."""
    assert golden() == ORDER


def test_the_order_is_the_same_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_order import golden; print([int(i) for i in golden()])"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(golden())


def test_a_slice_of_a_very_large_cache_is_cheap() -> None:
    """1e12 positions in a million shards: a slice touches the permutations of one window."""
    shards = 10**6
    epoch = order(np.full(shards, 2048), 1, 5, shards_open=8)
    assert len(epoch) == 2048 * shards
    taken = epoch.take(10**9, 10**9 + 4096)
    assert len(np.unique(taken.shard)) <= 11
    assert len(set(zip(taken.shard.tolist(), taken.sequence.tolist(), strict=True))) == 4096
    assert set(taken.shard.tolist()) <= set(epoch.open_at(10**9).tolist()) | set(epoch.open_at(10**9 + 4095).tolist())
    kept = epoch.shards.nbytes + epoch.begins.nbytes + 8 * 2048 * epoch._shuffled.cache_info().currsize
    assert kept < 20 * shards


def test_more_shards_open_shuffle_better() -> None:
    counts = np.full(64, 64)
    together = []
    for shards_open in (1, 4, 16, 64):
        taken = order(counts, 0, 0, shards_open=shards_open).take(0, 64 * 64)
        together.append(float((np.diff(taken.shard) == 0).mean()))
    for share, shards_open in zip(together, (1, 4, 16, 64), strict=True):
        assert abs(share - 1 / shards_open) < 0.03


@pytest.mark.parametrize("count", [1, 2, 100, 5000])
def test_permutations_are_permutations(count: int) -> None:
    found = permutation(count, 3, 2**64 - 1)
    assert sorted(found.tolist()) == list(range(count))
    assert count < 100 or permutation(count, 4, 2**64 - 1).tolist() != found.tolist()


@some
@given(st.lists(st.tuples(sizes, st.integers(1, 50)), min_size=1, max_size=4), seeds, st.data())
def test_a_mixture_keeps_to_its_shares(sources: list[tuple[NDArray[Any], int]], seed: int, data: st.DataObject) -> None:
    total = sum(weight for _, weight in sources)
    parts = [Fraction(weight, total) for _, weight in sources]
    stream = SequenceStream([counts for counts, _ in sources], parts, seed, shards_open=3, shuffle=True)
    taken = stream.take(0, 1024)
    ends = np.arange(stream.block, 1024, stream.block)
    for j, part in enumerate(parts):
        until = (taken.source == j).cumsum()[ends - 1]
        assert (abs(until * part.denominator - part.numerator * ends) <= part.denominator).all()
    # every source is gone through in its own epochs
    for j, (counts, _) in enumerate(sources):
        here = taken.source == j
        shard, sequence = taken.shard[here], taken.sequence[here]
        assert ((sequence >= 0) & (sequence < counts[shard])).all()
        numbers, once = (counts.cumsum() - counts)[shard] + sequence, int(counts.sum())
        whole = numbers[: len(numbers) // once * once].reshape(-1, once)
        assert (np.sort(whole, 1) == np.arange(once)).all()
    start = data.draw(st.integers(0, 1000))
    stop = data.draw(st.integers(start + 1, 1024))
    for whole_column, column in zip(taken, stream.take(start, stop), strict=True):
        assert whole_column[start:stop].tolist() == column.tolist()


def test_sources_of_one_size_have_different_orders() -> None:
    counts = np.array([500])
    stream = SequenceStream([counts, counts], [Fraction(1, 2)] * 2, 0, shards_open=2, shuffle=True)
    taken = stream.take(0, 1000)
    assert taken.sequence[taken.source == 0].tolist() != taken.sequence[taken.source == 1].tolist()


class Lists(NamedTuple):
    """What a plan needs of a `ShardTable`, from lists: the positions of each sequence of each shard."""

    of: list[list[int]]

    @property
    def positions(self) -> NDArray[Any]:
        return np.array([sum(shard) for shard in self.of])

    @property
    def first(self) -> NDArray[Any]:
        return np.zeros(len(self.of), np.int64)

    def lengths(self, row: int) -> NDArray[Any]:
        return np.array(self.of[row])


class Data(NamedTuple):
    """Sources of a stream, and the size of its steps."""

    tables: list[Lists]
    seed: int
    size: dict[str, Any]

    def plan(self) -> StepPlan:
        counts = [np.array([len(shard) for shard in t.of]) for t in self.tables]
        parts = [Fraction(1, len(counts))] * len(counts)
        stream = SequenceStream(counts, parts, self.seed, shards_open=2, shuffle=True)
        tables: Any = self.tables
        return StepPlan(stream, tables, **self.size, keep=4)

    def shares(self, progress: LoaderProgress, rank: int, world_size: int, epochs: int = 1) -> list[RankShare]:
        return list(self.plan().shares(progress, rank=rank, world_size=world_size, epochs=epochs))


def sequences(*of: RankShare) -> list[tuple[tuple[int, int], int]]:
    """The sequences of these shares, sorted."""
    return sorted((key, i) for share in of for key, numbers in share.shards.items() for i in numbers.tolist())


@st.composite
def datasets(draw: st.DrawFn) -> Data:
    shard = st.lists(st.integers(1, 20), min_size=1, max_size=12)
    tables = draw(st.lists(st.lists(shard, min_size=1, max_size=4), min_size=1, max_size=2))
    size: dict[str, Any] = {"batch_size": None, "batch_tokens": None}
    size |= draw(st.one_of(st.builds(lambda n: {"batch_size": n}, st.integers(1, 9)),
                           st.builds(lambda n: {"batch_tokens": n}, st.integers(20, 99))))  # fmt: skip
    return Data([Lists(t) for t in tables], draw(seeds), size)


@some
@given(datasets())
def test_seeking_is_where_iterating_comes_to(data: Data) -> None:
    """For every step of three epochs, in any order, and the end of each."""
    after = [share.after for share in data.shares(LoaderProgress(), 0, 1, epochs=3)]
    plan = data.plan()
    for progress in sorted(after, key=lambda p: hash((p.sequences, p.epoch))):
        assert plan.seek(progress.epoch, progress.number) == progress
    for epoch in range(3):
        steps = sum(progress.epoch == epoch for progress in after)
        assert plan.seek(epoch, 0) == LoaderProgress(epoch)
        with pytest.raises(StreamError, match=f"step: got {steps + 1}; expected at most {steps}, .*epoch {epoch}"):
            plan.seek(epoch, steps + 1)


@some
@given(datasets(), st.integers(1, 4), st.integers(1, 4), st.data())
def test_ranks_may_change_at_any_step(data: Data, before: int, after: int, drawn: st.DataObject) -> None:
    """Any number of ranks resumes with the same steps, and each step is divided completely."""
    alone = data.shares(LoaderProgress(), 0, 1, epochs=2)
    ours = [data.shares(LoaderProgress(), rank, before, epochs=2) for rank in range(before)]
    assert all([s.after for s in rank] == [s.after for s in alone] for rank in ours)
    assert [sequences(*step) for step in zip(*ours, strict=True)] == [sequences(s) for s in alone]
    at = drawn.draw(st.integers(0, len(alone) - 1))
    state = alone[at].after
    theirs = [data.shares(state, rank, after) for rank in range(after)]
    rest = [s for s in alone[at + 1 :] if s.after.epoch == state.epoch]
    assert [sequences(*step) for step in zip(*theirs, strict=True)] == [sequences(s) for s in rest]


@some
@given(datasets())
def test_steps_by_positions(data: Data) -> None:
    batch_tokens = data.size["batch_tokens"]
    if batch_tokens is None:
        return
    found = data.shares(LoaderProgress(), 0, 1)
    done = 0
    for number, share in enumerate(found):
        size = sum(data.tables[key[0]].of[key[1]][i] for key, i in sequences(share))
        longest = max(data.tables[key[0]].of[key[1]][i] for key, i in sequences(share))
        assert share.after.number - 1 == number == -(-done // batch_tokens)
        assert size < batch_tokens + longest
        done += size
        assert share.after.positions == done
        assert number * batch_tokens < done <= (number + 1) * batch_tokens
    if len(data.tables) == 1:
        assert done == data.tables[0].positions.sum()
        assert len(found) == -(-done // batch_tokens)


@some
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), min_size=1, max_size=60), st.integers(1, 8))
def test_ranks_share_a_step(items: list[tuple[int, int]], world_size: int) -> None:
    lanes, weights = (np.array(column) for column in zip(*items, strict=True))
    parts = split_over_ranks(lanes, weights, world_size)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(items)))
    for part in parts:
        # to within half a sequence at either end
        assert abs(int(weights[part].sum()) - weights.sum() / world_size) <= weights.max()
    in_order = [lane for part in parts for lane in lanes[part].tolist()]
    assert in_order == sorted(in_order), "a rank finds its share in neighbouring lanes"
    if len(items) >= world_size:
        assert all(len(part) for part in split_over_ranks(lanes, np.ones_like(weights), world_size))


@some
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.one_of(st.none(), st.integers(1, 200)),
    st.one_of(st.none(), st.integers(1, 7)),
)
def test_micro_batches_keep_to_their_limits(lengths: list[int], tokens: int | None, rows: int | None) -> None:
    array = np.array(lengths)
    for cut, size in ((padded_micro_batches, lambda x: len(x) * x.max()), (packed_micro_batches, lambda x: x.sum())):
        parts = cut(array, tokens, rows)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
        for part in parts:
            assert len(part) == 1 or tokens is None or size(array[part]) <= tokens
            assert rows is None or len(part) <= rows
            assert (np.diff(part) > 0).all()
