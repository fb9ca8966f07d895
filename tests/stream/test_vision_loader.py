"""Caches of images through the loader: the teacher's own pixels, the order, its state, ranks, and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_cases
from cache_cases import make_shard, make_spec
from numpy.typing import NDArray
from stream_cases import bits, ranks
from torch import Tensor
from vision_cases import CLASSES, COPIES, IMAGES, Net, examples, make_cache

from fastkd import DistillLoader, kd_loss
from fastkd.cache import Cache, create_cache
from fastkd.data.examples import Examples
from fastkd.errors import DataError, StreamError
from fastkd.stream.batch import ExampleBatch, MicroBatch


@pytest.fixture(scope="module")
def teacher() -> Net:
    return Net(seed=7)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Net) -> Cache:
    return make_cache(tmp_path_factory.mktemp("vision") / "cache", teacher=teacher)


def loader_of(cache: Any, **changes: Any) -> DistillLoader:
    return DistillLoader(cache, **{"data": examples(), "batch_size": 9, "micro_tokens": 8, **changes})


def batches(loader: DistillLoader) -> list[ExampleBatch]:
    return [batch for step in loader for batch in step.micro_batches]


def pictures(tensors: list[Tensor]) -> Counter[bytes]:
    return Counter(image.numpy().tobytes() for images in tensors for image in images)


def test_the_student_sees_the_pixels_that_the_teacher_saw(cache: Cache, teacher: Net) -> None:
    seen = pictures(teacher.given[1:])  # the first was a probe for the number of classes
    assert seen.total() == IMAGES * COPIES
    ours = [b.inputs for split in ("train", "held_out") for b in batches(loader_of(cache, split=split))]
    assert pictures(ours) == seen


def test_inputs_labels_and_targets_belong_together(cache: Cache) -> None:
    data, model, sizes = examples(), Net(seed=7), []
    which = {
        data.read([n], data.seeds(np.array([n]), np.array([c]))).numpy().tobytes(): n
        for n in range(IMAGES)
        for c in range(COPIES)
    }
    for step in loader_of(cache):
        sizes.append(step.sequences)
        assert step.positions == step.count == COPIES * step.sequences
        numbers = []
        for batch in step.micro_batches:
            assert batch.positions == batch.count == len(batch.inputs) <= 8
            assert batch.targets.index.tolist() == list(range(batch.positions))
            here = [which[image.numpy().tobytes()] for image in batch.inputs]
            assert batch.labels.tolist() == data.labels(here).tolist()
            assert torch.equal(batch.windows(), batch.sequences.long())
            numbers += list(zip(batch.sequences.tolist(), here, strict=True))
            log_probs = model(batch.inputs).log_softmax(1).gather(1, batch.targets.ids.long()).detach()
            stored = batch.targets.logprobs
            used = (stored > -torch.inf) & (batch.targets.draws == 0)
            assert used.sum() == 4 * batch.positions
            assert (log_probs - stored)[used].abs().max() < 0.05
        # one sequence is one image, with all its copies
        assert Counter(Counter(numbers).values()) == {COPIES: step.sequences}
        assert len({s for s, _ in numbers}) == len({n for _, n in numbers}) == step.sequences
    assert sizes == [9, 9, 9, 9, 9, 3]


def test_the_order_is_the_seeds_and_threads_change_nothing(cache: Cache) -> None:
    one, same, other = (
        [bits(step) for step in loader_of(cache, **changes).steps(2)]
        for changes in ({"seed": 3, "threads": 1}, {"seed": 3, "threads": 3}, {"seed": 4})
    )
    assert one == same
    assert one != other
    assert sorted(map(str, one)) != sorted(map(str, one[:6] * 2))  # the second epoch has an order of its own


def test_it_resumes_from_a_state_with_the_same_bits(cache: Cache) -> None:
    whole = [bits(step) for step in loader_of(cache).steps(2)]
    for taken in (1, 5, 8):
        loader = loader_of(cache)
        steps = loader.steps(2)
        for _ in range(taken):
            next(steps)
        again = loader_of(cache)
        again.load_state_dict(loader.state_dict())
        loader.close()
        assert [bits(step) for step in again.steps(2)][: len(whole) - taken] == whole[taken:]


def test_ranks_have_together_what_one_has(cache: Cache) -> None:
    settings: dict[str, Any] = {"data": examples(), "batch_size": 9, "micro_tokens": 4}
    alone, end = ranks(cache, 1, **settings)
    first, state = ranks(cache, 2, stop=2, **settings)
    empty = []
    for world_size in (1, 3):
        rest, after = ranks(cache, world_size, state, **settings)
        assert after == end
        for shares, (whole,) in zip([*first, *rest], alone, strict=True):
            ours = [b for share in shares for b in share.micro_batches]
            assert pictures([b.inputs for b in ours if b.positions]) == pictures(
                [b.inputs for b in whole.micro_batches]
            )
            assert {(s.count, s.positions, s.sequences) for s in shares} == {
                (whole.count, whole.positions, whole.sequences)
            }
            assert len({len(share.micro_batches) for share in shares}) == 1
            empty += [b for b in ours if not b.positions]
    assert empty
    for batch in empty:
        assert batch.inputs.shape == (1, 1, 6, 6)
        logits = torch.randn(1, CLASSES, requires_grad=True)
        loss = kd_loss(logits, batch.targets, batch.labels, num_items=7).loss
        loss.backward()
        assert float(loss.detach()) == 0


def test_two_caches_of_the_same_images(cache: Cache, tmp_path: Path) -> None:
    """For example of two teachers, with different numbers of entries."""
    other = make_cache(tmp_path, teacher=Net(seed=8), k=6, draws=0)
    loader = DistillLoader([(cache, 1), (other, 1)], data=examples(), batch_size=12)
    widths = Counter(int(n) for b in batches(loader) for n in (b.targets.logprobs > -torch.inf).sum(1))
    assert widths[6] > 30
    assert sum(widths.values()) == 2 * 48 * COPIES


def brightened(images: Tensor, seeds: NDArray[np.int64]) -> Tensor:
    return images + 1


def test_another_data_set_is_refused_and_what_differs_named(cache: Cache) -> None:
    def no(data: Any, message: str) -> None:
        with pytest.raises(StreamError, match=message):
            loader_of(cache, data=data)

    images = np.random.default_rng(0).normal(size=(IMAGES, 1, 6, 6)).astype(np.float32)
    no(
        examples(inputs=images[:-1], labels=[0] * 59),
        r"got sha256 \w{12}…; expected \w{12}…, .* \(examples: 60 in the cache, 59 here",
    )
    no(examples(copies=3), "copies: 2 in the cache, 3 here")
    images[3, 0, 2, 2] += 1e-3
    values = r"\(the values of the examples, their augmentation, or its seed differ\)"
    no(examples(inputs=images), values)
    no(examples(seed=1), values)
    no(examples(augment=brightened, fingerprint="brighter"), values)
    no(None, "data: got None with .* of examples, which it does not contain")
    no([1, 2], "data: got list with")
    no(examples(labels=None), r"data: got no labels, .* labels=")
    no(examples(labels=[CLASSES] * IMAGES), "data: got a label 7; expected classes from 0 to 6")


def test_other_labels_are_another_loader(cache: Cache) -> None:
    state = loader_of(cache).state_dict()
    other = loader_of(cache, data=examples(labels=[1] * IMAGES))
    with pytest.raises(StreamError, match=r"labels: '.*' there, '.*' here"):
        other.load_state_dict(state)


def test_data_is_for_caches_of_examples(tmp_path: Path) -> None:
    text = train_cases.make_cache(tmp_path / "text")
    with pytest.raises(StreamError, match=r"data: got Examples for .*, which is of text"):
        DistillLoader(text, batch_size=4, data=examples())
    spec = make_spec(inputs=("example", "augmentation_seed"), dataset="by hand")
    with create_cache(tmp_path / "hand", spec) as writer:
        writer.write_shard(0, **make_shard(spec))
    with pytest.raises(StreamError, match=r"its spec has no hash of the data set .dataset: 'by hand'"):
        DistillLoader(tmp_path / "hand", batch_size=4, data=examples())


def failing(images: Tensor, seeds: NDArray[np.int64]) -> Tensor:
    raise ZeroDivisionError("made up")


def test_an_augmentation_that_fails_is_named(cache: Cache) -> None:
    data = examples(augment=failing)  # which lies about which function it is
    with pytest.raises(DataError, match=r"example \d+ .*augment failed: ZeroDivisionError"):
        loader_of(cache, data=data)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5] * 3, r"labels: got float64 of shape \(3,\); expected integers of shape \(3,\)"),
        ([1, 2], r"got int64 of shape \(2,\)"),
        ([1, -1, 0], r"got -1 for example 1 \(from 0\)"),
    ],
)
def test_bad_labels(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Examples(torch.zeros(3, 2), labels=labels)


def test_the_kind_of_micro_batches_can_be_said(cache: Cache) -> None:
    step = next(iter(loader_of(cache)))
    assert [batch.inputs.shape[1:] for batch in step.of(ExampleBatch)] == [
        batch.inputs.shape[1:] for batch in step.micro_batches
    ]
    assert step.of(ExampleBatch) is step.micro_batches
    with pytest.raises(StreamError, match=r"of: got MicroBatch; expected ExampleBatch"):
        step.of(MicroBatch)
