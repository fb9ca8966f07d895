"""Slices: each position's, against the dense teacher; and that an evaluation sums by them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import sparse
from hf_cases import VOCAB
from train_cases import Tiny, make_cache

from fastkd.cache import Cache
from fastkd.errors import StreamError
from fastkd.evaluate.api import Evaluation, evaluate
from fastkd.evaluate.result import Windows
from fastkd.evaluate.rows import teacher_rows
from fastkd.evaluate.slices import BOUNDS, FAMILIES, SAYS, SLICES, slice_numbers


def test_each_position_has_a_slice_of_each_family() -> None:
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(400, 30, generator=g).double() * torch.linspace(0.1, 8, 400)[:, None]
    labels = teacher.softmax(1).multinomial(1, generator=g)[:, 0]
    targets = sparse(teacher, 30)
    numbers = slice_numbers(teacher_rows(targets, labels))
    assert len(numbers) == len(FAMILIES)
    log_q = teacher.log_softmax(1)
    own, entropy = -log_q.gather(1, labels[:, None])[:, 0], -(log_q.exp() * log_q).sum(1)

    def level(value: float) -> str:
        return "low" if value < BOUNDS[0] else "middle" if value < BOUNDS[1] else "high"

    seen = set()
    for i in range(400):
        right = "right" if int(log_q[i].argmax()) == int(labels[i]) else "wrong"
        expected = [f"teacher/{right}", f"entropy/{level(float(entropy[i]))}", f"disagreement/{level(float(own[i]))}"]
        assert [SLICES[int(n[i])] for n in numbers] == expected
        seen |= set(expected)
    assert seen == set(SLICES) == set(SAYS)
    assert (math.log(2), math.log(8)) == BOUNDS


def test_what_is_unknown() -> None:
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(200, 30, generator=g).double()
    labels = torch.randint(30, (200,), generator=g)
    few = teacher_rows(sparse(teacher, 2), labels)
    disagreement = slice_numbers(few)[2]
    unknown = few["label_known"] == 0
    assert unknown.any()
    assert (disagreement[unknown] == SLICES.index("disagreement/high")).all()
    drawn = teacher_rows(sparse(teacher, 0, 20, generator=g), labels)
    families = [{SLICES[i].partition("/")[0] for i in n.tolist()} for n in slice_numbers(drawn)]
    assert families == [{"entropy"}, {"disagreement"}]  # the best token of draws alone is not known


@torch.no_grad()
def half_foretold(count: int = 40, length: int = 16) -> list[list[int]]:
    """Documents in which every other token, about, is the one that the teacher of `make_cache` expects."""
    teacher, g = Tiny(seed=7, logits=True), torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (count, 1), generator=g)
    while tokens.shape[1] < length:
        best, other = teacher(tokens)[:, -1].argmax(1), torch.randint(VOCAB, (count,), generator=g)
        tokens = torch.cat([tokens, torch.where(torch.rand(count, generator=g) < 0.5, best, other)[:, None]], 1)
    return tokens.tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("slices") / "cache", half_foretold())


@pytest.fixture(scope="module")
def found(cache: Cache) -> Evaluation:
    return of(cache)


@torch.no_grad()
def of(cache: Cache, batch_tokens: int = 8192) -> Evaluation:
    model = Tiny(seed=7, logits=True).eval()
    model.head += 0.3 * torch.randn(model.head.shape, generator=torch.Generator().manual_seed(0))
    return evaluate(lambda b: model(b.input_ids).flatten(0, 1)[b.targets.index], cache, batch_tokens=batch_tokens)


def test_each_family_divides_an_evaluation(found: Evaluation) -> None:
    for family, parts in FAMILIES.items():
        slices = [found.slices[name] for part in parts if (name := f"{family}/{part}") in found.slices]
        assert slices
        total = Windows.merged(slices)
        np.testing.assert_array_equal(total.counts, found.student.counts)
        for name, row in found.student.sums.items():
            np.testing.assert_allclose(total.sums[name], row, rtol=1e-5, atol=1e-6)
    right = found.slices["teacher/right"]
    # where the teacher is right, agreement with it and accuracy are the same
    np.testing.assert_array_equal(right.sums["accuracy"], right.sums["agreement"])
    wrong = found.slices["teacher/wrong"]
    assert wrong.sums["accuracy"].sum() < 0.2 * wrong.sums["agreement"].sum()
    # no two tokens of this teacher are equal
    np.testing.assert_array_equal(right.counts, found.teacher.sums["accuracy"].round())


def test_batches_and_json_change_nothing(cache: Cache, found: Evaluation) -> None:
    again = of(cache, batch_tokens=37)
    for name, part in found.slices.items():
        np.testing.assert_array_equal(part.counts, again.slices[name].counts)
        np.testing.assert_allclose(part.sums["kl_bucket"], again.slices[name].sums["kl_bucket"], rtol=1e-4, atol=1e-5)
    document = found.to_json()
    read = Evaluation.from_json(json.loads(json.dumps(document)))
    assert {n: s.to_json() for n, s in read.slices.items()} == {n: s.to_json() for n, s in found.slices.items()}
    # smaller than what the evaluation was without it
    size = len(json.dumps(document["slices"]))
    assert size < 0.7 * (len(json.dumps(document)) - size)
    # an evaluation from before there were slices
    del document["slices"]
    old = Evaluation.from_json(document)
    assert old.slices == {}
    assert old.to_json() == replace(found, slices={}).to_json()
    for damaged in ({"teacher/right": {"counts": [1.0], "sums": {}}}, {"teacher/right": {}}, [1]):
        with pytest.raises(StreamError, match="evaluation: damaged"):
            Evaluation.from_json(document | {"slices": damaged})
