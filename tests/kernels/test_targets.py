"""SparseTargets: shapes, rows, arrays and back, and the teacher at a temperature against the dense teacher."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import GRID, case, same, sparse

from fastkd import KDError, SparseTargets
from fastkd.kernels.targets import FIELDS


def dense_teacher(seed: int = 0, n: int = 6, v: int = 40) -> torch.Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.mark.parametrize("t", [1.0, 1.5, 2.0, 4.0])
def test_at_a_stored_temperature_is_the_dense_teacher(t: float) -> None:
    logits = dense_teacher()
    targets = sparse(logits, 7)
    at = targets.at(t, "bucket", dtype=torch.float64)
    dense = (logits / t).softmax(1)
    head = dense.gather(1, targets.ids[:, :7].long())
    assert torch.allclose(at.weights[:, :7], head, atol=1e-6)
    assert torch.allclose(at.log_q_tail.exp(), 1 - head.sum(1), atol=1e-6)
    assert bool((at.log_q[:, 7:] == -math.inf).all())


def test_renormalize_and_sampled_weights_sum_to_one() -> None:
    targets = sparse(dense_teacher(), 5, 6)
    for t in (1.0, 2.0, 3.0):
        renormalized = targets.at(t, "renormalize", dtype=torch.float64)
        assert torch.allclose(renormalized.weights.sum(1), torch.ones(6, dtype=torch.float64))
        sampled = targets.at(t, "sampled", dtype=torch.float64)
        assert torch.allclose(sampled.weights.sum(1), torch.ones(6, dtype=torch.float64), atol=1e-6)
        assert bool((sampled.log_q_tail == -math.inf).all())


def test_sampled_at_the_draws_temperature_is_the_count() -> None:
    """At T = T_d each drawn entry has the share c / n of the tail's mass."""
    for t in (1.0, 1.5):
        targets = sparse(dense_teacher(), 5, 8, draw_temperature=t)
        at, bucket = (targets.at(t, x, dtype=torch.float64) for x in ("sampled", "bucket"))
        expected = targets.draws / 8 * bucket.log_q_tail.exp()[:, None]
        drawn = targets.draws > 0
        assert torch.allclose(at.weights[drawn], expected[drawn], atol=1e-7)


def test_a_row_without_draws_falls_back_to_the_bucket() -> None:
    targets = sparse(dense_teacher(), 5, 6)
    draws, logprobs = targets.draws.clone(), targets.logprobs.clone()
    logprobs[2][draws[2] > 0] = -math.inf
    draws[2] = 0
    some = SparseTargets(**{**vars(targets), "draws": draws, "logprobs": logprobs})
    sampled, bucket = some.at(1.0, "sampled"), some.at(1.0, "bucket")
    assert torch.equal(sampled.weights[2], bucket.weights[2])
    assert torch.equal(sampled.log_q_tail[2], bucket.log_q_tail[2])
    assert float(sampled.log_q_tail[1]) == -math.inf


def test_auto_reaches_one_and_a_half_times_the_draws_temperature() -> None:
    targets = sparse(dense_teacher(), 5, 6)
    for t, means in ((1.0, "sampled"), (1.5, "sampled"), (1.6, "bucket")):
        assert torch.equal(targets.at(t, "auto").weights, targets.at(t, means).weights)
    without = SparseTargets(**{**vars(targets), "draws": None})
    assert torch.equal(without.at(1.0).weights, without.at(1.0, "bucket").weights)


def test_a_row_without_support_and_one_that_is_all_head() -> None:
    targets = sparse(dense_teacher(), 40)
    at = targets.at(2.0, "bucket")
    assert bool((at.log_q_tail == -math.inf).all())
    assert torch.allclose(at.weights.sum(1), torch.ones(6))
    nothing = SparseTargets(**{**vars(targets), "logprobs": torch.full_like(targets.logprobs, -math.inf)})
    for treatment in ("bucket", "sampled", "renormalize"):
        at = nothing.at(2.0, treatment)
        assert not at.weights.any()
        assert not at.log_q_tail.isnan().any()


def test_slices_move_together() -> None:
    targets = case("plain", 9, 50, 4, 3).targets
    for rows in (slice(2, 6), torch.tensor([5, 0]), torch.arange(9) % 2 == 0):
        some = targets[rows]
        assert torch.equal(some.ids, targets.ids[rows])
        assert torch.equal(some.tail, targets.tail[rows])
        assert len(some) == some.outcomes.shape[0] == some.draws.shape[0]
    scalar = SparseTargets(**{**vars(targets), "outcomes": 46})
    assert scalar[1:3].outcomes.ndim == 0
    assert targets.to("cpu").device.type == "cpu"
    with pytest.raises(KDError, match="slice"):
        targets[3]


def test_the_parts_of_targets_make_the_whole_again() -> None:
    targets = replace(case("plain", 9, 50, 4, 3).targets, index=torch.arange(9) * 2)
    assert same(SparseTargets.cat([targets[:2], targets.take(torch.tensor([2])), targets[3:3], targets[3:]]), targets)
    assert SparseTargets.cat([targets]) is targets


def test_narrower_rows_and_rows_without_draws_are_filled_up() -> None:
    wide, narrow = case("plain", 3, 50, 4, 3).targets, case("plain", 2, 50, 4).targets
    both = SparseTargets.cat([wide, replace(narrow, outcomes=46)])
    assert both.width == wide.width > narrow.width
    assert same(both[:3], wide)
    assert torch.equal(both.logprobs[3:, : narrow.width], narrow.logprobs)
    assert bool((both.logprobs[3:, narrow.width :] == -math.inf).all())
    assert not both.ids[3:, narrow.width :].any()
    assert not both.draws[3:].any()
    assert both.outcomes[3:].tolist() == [46, 46]
    loss = both.at(2.0, "sampled").weights[3:, : narrow.width]
    assert torch.equal(loss, narrow.at(2.0, "bucket").weights)


def test_targets_that_do_not_belong_together_are_refused() -> None:
    one = case("plain", 3, 50, 4).targets
    for other, says in (
        (replace(one, vocab_size=51), "vocab_size: 50, 51"),
        (replace(one, temperatures=(1.0, 2.0, 3.0, 4.0)), "different temperatures"),
        (replace(one, index=torch.arange(3)), "index in all or in none"),
    ):
        with pytest.raises(KDError, match=f"cat: .*{says}"):
            SparseTargets.cat([one, other])
    with pytest.raises(KDError, match="cat: got no targets"):
        SparseTargets.cat([])


@pytest.mark.parametrize("draws", [False, True])
def test_empty_targets_have_no_entries(draws: bool) -> None:
    empty = SparseTargets.empty(5, 3, vocab_size=50, temperatures=GRID, draws=draws, draw_temperature=1.5, device="cpu")
    assert (len(empty), empty.width, empty.vocab_size, empty.temperatures) == (5, 3, 50, GRID)
    assert empty.draw_temperature == 1.5
    assert not empty.at(1.0, "bucket").weights.any()
    for field in FIELDS:
        column = getattr(empty, field.name)
        assert (column is None) == (field.optional and not draws)
        assert column is None or (column.dtype == field.dtype and bool((column == field.fill).all()))
    assert len(SparseTargets.empty(0, 3, vocab_size=50, fill=False)) == 0


def test_arrays_and_back() -> None:
    targets = case("plain", 9, 50, 4, 3).targets
    arrays = targets.arrays()
    assert list(arrays) == [field.name for field in FIELDS]
    options = {"vocab_size": 50, "temperatures": GRID}
    assert same(SparseTargets.from_arrays(arrays | {"tokens": np.zeros(9)}, **options), targets)
    assert arrays["ids"].ctypes.data == targets.ids.data_ptr()
    compact = SparseTargets.from_arrays(arrays, **options, index=np.arange(9) * 3)
    assert same(compact, replace(targets, index=torch.arange(9) * 3))
    other = replace(targets, ids=targets.ids.long(), logprobs=targets.logprobs.double(), outcomes=46, draws=None)
    assert {n: a.dtype for n, a in other.arrays().items()} == {n: a.dtype for n, a in arrays.items() if n != "draws"}
    assert other.arrays()["outcomes"].tolist() == [46] * 9
    del arrays["tail"]
    with pytest.raises(KDError, match="arrays: got no 'tail' among ids, logprobs"):
        SparseTargets.from_arrays(arrays, **options)


@pytest.mark.gpu
def test_pinned_memory_reaches_the_device() -> None:
    targets = case("plain", 9, 50, 4, 3).targets.pin_memory()
    assert targets.ids.is_pinned()
    assert targets.to("cuda", non_blocking=True).device.type == "cuda"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logprobs": torch.zeros(3, 4)}, "targets.logprobs: got shape"),
        ({"tail": torch.zeros(9, 3)}, "targets.tail"),
        ({"draws": torch.zeros(9, 8)}, "targets.draws"),
        ({"draws": torch.zeros(9, 2, dtype=torch.int32)}, "targets.draws"),
        ({"ids": torch.zeros(9, 8)}, "targets.ids"),
        ({"ids": torch.zeros(9, dtype=torch.int32)}, "targets.ids"),
        ({"outcomes": torch.zeros(4, dtype=torch.int32)}, "targets.outcomes"),
        ({"index": torch.zeros(4, dtype=torch.int64)}, "targets.index"),
        ({"temperatures": (2.0, 1.5, 3.0, 4.0)}, "temperatures: got"),
        ({"temperatures": (1.0, 1.0, 2.0, 4.0)}, "temperatures: got"),
        ({"draw_temperature": 0.0}, "draw_temperature"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 50.0}, "vocab_size: got 50.0"),
        ({"vocab_size": "a"}, "vocab_size: got 'a'"),
        ({"draw_temperature": "a"}, "draw_temperature: got 'a'"),
        ({"temperatures": None}, "temperatures: got None"),
        ({"temperatures": "1.0"}, "temperatures: got '1.0'"),
        ({"ids": [[1]]}, "targets.ids: got \\[\\[1\\]\\]"),
        ({"logprobs": None}, "targets.logprobs: got None; expected a tensor"),
        ({"logprobs": torch.zeros(9, 8, dtype=torch.complex64)}, "targets.logprobs: got torch.complex64"),
        ({"index": torch.arange(9).bool()}, "targets.index: got torch.bool"),
        ({"outcomes": "a"}, "targets.outcomes: got 'a'"),
        ({"outcomes": 46.0}, "targets.outcomes: got 46.0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, says: str) -> None:
    targets = case("plain", 9, 50, 4, 3).targets
    assert targets.temperatures == GRID
    with pytest.raises(KDError, match=says):
        SparseTargets(**{**vars(targets), **change})
