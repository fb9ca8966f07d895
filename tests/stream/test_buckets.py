"""Micro-batches that are padded to few lengths: what they hold, and that no loss notices."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_cases import model_of
from source_cases import take
from stream_cases import check, make_cache, ranks, reference, segments, tokens
from train_cases import Tiny
from train_cases import make_cache as captured

from fastkd import DistillLoader
from fastkd.cache import Cache
from fastkd.errors import StreamError
from fastkd.stream.buckets import BUCKETS, as_buckets, bucket_of, up_to
from fastkd.train.student import of_module, of_transformers


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("cache") / "c", draws=3)


def test_the_lengths() -> None:
    assert BUCKETS[:12] == (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
    ascending = np.array(BUCKETS)
    assert np.all(np.diff(ascending) * 5 <= np.maximum(ascending[1:], 80))
    assert not np.any(ascending % 16)
    lengths = np.array([1, 16, 17, 40, 41, 90])
    assert bucket_of(lengths, (16, 40), None).tolist() == [16, 16, 40, 40, 80, 120]
    assert bucket_of(lengths, (16, 40), 70).tolist() == [16, 16, 40, 40, 70, 120], "no longer than a micro-batch"
    assert bucket_of(lengths, None, 70) is lengths
    assert up_to((16, 32, 64), 40, None) == (16, 32, 40) == up_to(up_to((16, 32, 64), 50), 40)
    assert up_to((16, 32), None) == (16, 32)
    assert (as_buckets(True), as_buckets(None), as_buckets(64), as_buckets([32, 8])) == (BUCKETS, None, (64,), (8, 32))


@pytest.mark.parametrize("wrong", [0, "128", (), (16, 0), (16.5,), (True,)])
def test_what_is_no_length_is_refused(cache: Cache, wrong: Any) -> None:
    with pytest.raises(StreamError, match="buckets: got"):
        DistillLoader(cache, batch_size=4, buckets=wrong)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_micro_batches_hold_what_the_cache_says(cache: Cache, layout: str) -> None:
    expected, sizes = reference(cache), {"batch_size": 4, "layout": layout, "micro_tokens": 50}
    plain, padded = (list(DistillLoader(cache, **sizes, buckets=b)) for b in (None, (8, 20, 32)))
    lengths = set()
    for ours, theirs in zip(padded, plain, strict=True):
        for batch in ours.micro_batches:
            check(batch, expected)
            lengths.add(batch.input_ids.shape[1])
            assert batch.input_ids.numel() <= 50
            assert len(batch.sequences) == len(batch.cu_seqlens) - 1
            if layout == "packed":
                assert batch.cu_seqlens[-1] == batch.input_ids.shape[1]
                assert int(batch.cu_seqlens.diff().max()) == batch.max_seqlen
                starts = (batch.position_ids[0] == 0).nonzero().flatten()
                assert torch.equal(starts, batch.cu_seqlens[:-1].long())
        assert tokens(ours) == tokens(theirs)
        assert (ours.count, ours.positions) == (theirs.count, theirs.positions)
    assert lengths <= {8, 20, 32, 50}
    assert len(lengths) > 1
    assert any(segments(a) != segments(b) for s, t in zip(padded, plain, strict=True)
               for a, b in zip(s.micro_batches, t.micro_batches, strict=False)) == (layout == "padded")  # fmt: skip


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_an_empty_micro_batch_has_a_length_of_others(cache: Cache, layout: str) -> None:
    """That of a rank which has fewer."""
    steps = ranks(cache, 2, batch_size=3, micro_tokens=20, layout=layout, buckets=(8, 24))[0]
    empty = [batch for step in steps for share in step for batch in share.micro_batches if not batch.positions]
    assert empty
    for batch in empty:
        assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, 8)
        assert batch.count == 0
        assert set(batch.labels.flatten().tolist()) == {-100}
        assert batch.padding_mask().sum() == 1


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_losses_do_not_notice(tmp_path: Path, layout: str) -> None:
    cache = captured(tmp_path / "cache")
    students = [of_transformers(model_of("llama", dtype=torch.float64).train(), "llama")]
    students += [of_module(Tiny(dtype=torch.float64), "tiny")] if layout == "padded" else []
    for student in students:
        losses, gradients = [], []
        for buckets in (None, True, 48):
            loader = DistillLoader(cache, batch_tokens=100, micro_tokens=64, layout=layout, buckets=buckets)
            (step,) = take(loader, 1)
            student.zero_grad()
            each = [student(batch, num_items=step.count)["loss"] for batch in step.micro_batches]
            torch.autograd.backward(each)
            losses.append(sum(float(loss.detach()) for loss in each))
            gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
        assert losses == [pytest.approx(losses[0], rel=1e-7)] * 3  # each is rounded to float32
        for gradient in gradients[1:]:
            # llama's norms compute in float32
            tolerance = 1e-12 if student.name == "tiny" else 1e-6
            torch.testing.assert_close(gradient, gradients[0], rtol=tolerance, atol=tolerance * float(gradient.amax()))
