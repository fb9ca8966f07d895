"""A micro-batch as named tensors, and back; steps with a given number of micro-batches."""

from dataclasses import fields
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_cases import bits, check, make_cache, ranks, reference, segments, tokens

from fastkd import DistillLoader
from fastkd.cache import Cache
from fastkd.errors import StreamError
from fastkd.stream.tensors import FACTS, batch_of_tensors, batch_to_tensors


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("tensors") / "cache")


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if hasattr(a, "FIELDS"):
        return all(alike(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_there_and_back(cache: Cache, layout: str) -> None:
    for step in DistillLoader(cache, batch_size=7, micro_tokens=60, layout=layout):
        for batch in step.micro_batches:
            tensors = batch_to_tensors(batch)
            back = batch_of_tensors({name: one.to("cpu") for name, one in tensors.items()})
            for field in fields(batch):
                assert alike(getattr(batch, field.name), getattr(back, field.name)), field.name
            assert tensors[FACTS].count == step.count
            # as a causal model of transformers shifts labels
            assert torch.equal(tensors["labels"][:, 1:], batch.labels[:, :-1])
            assert (batch.labels[:, -1] == -100).all()
            assert (tensors["labels"][:, 0] == -100).all()
            assert not [name for name, one in tensors.items() if name != FACTS and one.is_floating_point()]


def test_what_is_missing_is_named(cache: Cache) -> None:
    batch = next(iter(DistillLoader(cache, batch_size=2))).micro_batches[0]
    tensors = batch_to_tensors(batch)
    del tensors["kd_tail"]
    with pytest.raises(StreamError, match="without kd_tail; expected what"):
        batch_of_tensors(tensors)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_exactly_so_many_micro_batches(cache: Cache, layout: str, count: int) -> None:
    """On every rank, in every step, with the rows of the same steps, about evenly."""
    expected, settings = reference(cache), {"batch_size": 9, "layout": layout, "seed": 3}
    plain = list(DistillLoader(cache, **settings))
    one = list(DistillLoader(cache, **settings, micro_batches=count, micro_tokens=None))
    two, _ = ranks(cache, 2, **settings, micro_batches=count, micro_tokens=None)
    assert len(one) == len(plain) == len(two)
    for theirs, ours, both in zip(plain, one, two, strict=True):
        assert tokens(ours) == tokens(theirs) == tokens(*both)
        assert (ours.count, ours.positions) == (theirs.count, theirs.positions)
        assert all(step.count == theirs.count for step in both)
        for step in (ours, *both):
            assert len(step.micro_batches) == count
            for batch in step.micro_batches:
                assert batch.counts == {"targets": theirs.count}
                if batch.positions:
                    check(batch, expected)
        largest = max(batch.input_ids.numel() for batch in ours.micro_batches)
        if layout == "packed":
            assert largest <= theirs.positions / count + 24  # windows of up to 24 positions stay whole
        else:
            lengths = sorted((len(s) for b in ours.micro_batches if b.positions for s in segments(b)), reverse=True)
            assert largest == smallest(lengths, count)


def smallest(lengths: list[int], count: int) -> int:
    """Positions of the largest of some micro-batches, pads included, if rows are divided in the best way."""
    places = range(1, len(lengths))
    cuts = [(0, *some, len(lengths)) for some in combinations(places, min(count, len(lengths)) - 1)]
    return min(max((b - a) * lengths[a] for a, b in pairwise(cut)) for cut in cuts)


def test_a_rank_with_too_few_sequences_has_empty_micro_batches(cache: Cache) -> None:
    steps, _ = ranks(cache, 2, batch_size=2, micro_batches=3, micro_tokens=None, layout="packed")
    assert {len(step.micro_batches) for both in steps for step in both} == {3}
    assert all(sum(batch.positions > 0 for batch in step.micro_batches) <= 1 for both in steps for step in both)


def test_the_option_is_not_part_of_the_order(cache: Cache) -> None:
    some = DistillLoader(cache, batch_size=5, micro_batches=2, micro_tokens=None)
    plain = DistillLoader(cache, batch_size=5)
    assert some.fingerprint == plain.fingerprint
    iterator = some.steps()
    next(iterator)
    plain.load_state_dict(some.state_dict())
    assert tokens(next(iterator)) == tokens(next(plain.steps()))
    assert bits(next(iter(DistillLoader(cache, batch_size=5))))
    with pytest.raises(StreamError, match="micro_batches, micro_batch_size: got 2 and 3; expected at most one"):
        DistillLoader(cache, batch_size=5, micro_batches=2, micro_batch_size=3)


def test_examples_are_refused() -> None:
    with pytest.raises(StreamError, match="expected a MicroBatch, of a cache of text"):
        batch_to_tensors(object())  # type: ignore[arg-type]


def test_names_are_lazy(tmp_path: Path) -> None:
    import fastkd.stream

    assert fastkd.stream.batch_to_tensors is batch_to_tensors
    assert fastkd.stream.batch_of_tensors is batch_of_tensors
