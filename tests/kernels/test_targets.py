"""SparseTargets: shapes, slices, and the teacher at a temperature against the dense teacher."""

import math

import pytest
import torch
from cases import GRID, case, sparse

from fastkd import KDError, SparseTargets


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


@pytest.mark.gpu
def test_pinned_memory_reaches_the_device() -> None:
    targets = case("plain", 9, 50, 4, 3).targets.pin_memory()
    assert targets.ids.is_pinned()
    assert targets.to("cuda", non_blocking=True).device.type == "cuda"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logprobs": torch.zeros(3, 4)}, "targets.logprobs: found shape"),
        ({"tail": torch.zeros(9, 3)}, "targets.tail"),
        ({"draws": torch.zeros(9, 8)}, "targets.draws"),
        ({"draws": torch.zeros(9, 2, dtype=torch.int32)}, "targets.draws"),
        ({"ids": torch.zeros(9, 8)}, "targets.ids"),
        ({"ids": torch.zeros(9, dtype=torch.int32)}, "targets.ids"),
        ({"outcomes": torch.zeros(4, dtype=torch.int32)}, "targets.outcomes"),
        ({"index": torch.zeros(4, dtype=torch.int64)}, "targets.index"),
        ({"temperatures": (2.0, 1.5, 3.0, 4.0)}, "temperatures: found"),
        ({"temperatures": (1.0, 1.0, 2.0, 4.0)}, "temperatures: found"),
        ({"draw_temperature": 0.0}, "draw_temperature"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 50.0}, "vocab_size: found 50.0"),
        ({"vocab_size": "a"}, "vocab_size: found 'a'"),
        ({"draw_temperature": "a"}, "draw_temperature: found 'a'"),
        ({"temperatures": None}, "temperatures: found None"),
        ({"temperatures": "1.0"}, "temperatures: found '1.0'"),
        ({"ids": [[1]]}, "targets.ids: found list"),
        ({"logprobs": None}, "targets.logprobs: found NoneType"),
        ({"logprobs": torch.zeros(9, 8, dtype=torch.complex64)}, "targets.logprobs: found torch.complex64"),
        ({"index": torch.arange(9).bool()}, "targets.index: found torch.bool"),
        ({"outcomes": "a"}, "targets.outcomes: found 'a'"),
        ({"outcomes": 46.0}, "targets.outcomes: found 46.0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, says: str) -> None:
    targets = case("plain", 9, 50, 4, 3).targets
    assert targets.temperatures == GRID
    with pytest.raises(KDError, match=says):
        SparseTargets(**{**vars(targets), **change})
