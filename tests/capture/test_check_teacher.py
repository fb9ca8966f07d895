"""A cache against its teacher: what it says is found as it was stored, and whatever else is noticed and named."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from capture_cases import VOCAB, Causal, documents
from torch import Tensor, nn

import fastkd
from fastkd.cache import CacheError, CacheSpec, create_cache, open_cache
from fastkd.cache.stores import MemoryStore
from fastkd.capture.check import check_teacher, check_text
from fastkd.data.examples import Examples
from fastkd.errors import DataError, TeacherError
from fastkd.kernels.lm_head import LMHead
from fastkd.models.protocol import Hidden, TopK
from fastkd.teachers.module import ModuleTeacher

SMALL: dict[str, Any] = {"k": 5, "draws": 3, "context": 16, "shard_positions": 64, "batch_tokens": 40, "held_out": 0.2}
ALL = 10**6  # positions


def teacher(model: Any = None, fingerprint: str = "it") -> ModuleTeacher:
    return ModuleTeacher(model or Causal(), vocab_size=VOCAB, fingerprint=fingerprint)


def captured(model: Any = None, data: Any = None, fingerprint: str = "it", **changes: Any) -> Any:
    store = MemoryStore()
    report = fastkd.capture(
        teacher(model, fingerprint), documents() if data is None else data, store, **{**SMALL, **changes}
    )
    assert report.complete
    return open_cache(store)


class Variant(Causal):
    """The same teacher, its last step another: what `change` makes of states and head."""

    def __init__(self, change: Any, seed: int = 0) -> None:
        super().__init__(hidden=True, seed=seed)
        self.change = change

    def forward(self, tokens: Tensor) -> Any:
        found = super().forward(tokens)
        return self.change(found.states, found.lm_head.weight, tokens)


def capped(states: Tensor, weight: Tensor, tokens: Tensor) -> Hidden:
    return Hidden(states, LMHead(weight, torch.linspace(-1, 1, VOCAB), softcap=4.0, logit_scale=0.7))


def projected(states: Tensor, weight: Tensor, tokens: Tensor) -> Hidden:
    return Hidden(states, lambda chunk: chunk @ weight.T)


def batch_dependent(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """No two shapes of a batch lead to the same."""
    return states @ weight.T * (1 + 0.1 * len(tokens) + 0.01 * tokens.shape[1])


def masked(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return (states @ weight.T).index_fill(2, torch.arange(0, VOCAB, 3), -torch.inf)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (Causal, {}),
        (lambda: Causal(hidden=True), {"overlap": 5}),
        (lambda: Variant(capped), {"mass": 0.6}),
        (lambda: Variant(projected), {"packing": "keep", "codec": "fast"}),
        (Causal, {"k": 0, "draws": 6, "draw_temperature": 1.5}),
        (Causal, {"k": 97, "draws": 0}),
        (lambda: Variant(masked), {"codec": "smallest"}),
        (lambda: Variant(batch_dependent), {}),
        (lambda: Causal().double(), {"codec": "portable"}),
    ],
)
def test_what_is_left_on_equal_hardware_is_the_codecs_error(model: Any, changes: dict[str, Any]) -> None:
    cache = captured(model(), **changes)
    report = check_teacher(cache, teacher(model()), positions=ALL)
    assert report.ok
    assert report
    assert report.excess == 0
    assert report.recorded_batches
    assert report.fingerprint is True
    assert report.shards == cache.shards
    assert report.positions == sum(cache.manifest.column("counted").to_pylist())
    for kind, found in report.differences.items():
        assert found.compared == sum(cache.manifest.column(_COUNT[kind]).to_pylist()) * (4 if kind == "tail" else 1)
        assert found.over == 0
        # the bound is one: it is nearly reached
        if found.compared > 500 and cache.spec.k < VOCAB:
            assert found.largest > 0.7 * found.bound
    assert report.same_draws == (1.0 if cache.spec.draws else None)
    assert report.same_top_k == (1.0 if cache.spec.k else None)
    text = check_text(report)
    assert text.endswith("ok: the cache matches the teacher to within the codec's error")
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["ok"] is True


_COUNT = {"top_k": "head_entries", "draws": "draw_entries", "tail": "counted"}


class Limited(Variant):
    """Runs out of memory above so many positions a batch."""

    most = 16

    def forward(self, tokens: Tensor) -> Any:
        if tokens.numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(tokens)


def test_the_batches_are_those_of_the_capture_halves_among_them() -> None:
    first, again = Limited(batch_dependent), Limited(batch_dependent)
    cache = captured(first)
    assert any(cache.attributes(i)["record"]["halved"] for i in cache.shards)
    report = check_teacher(cache, teacher(again), positions=ALL)
    assert report.excess == 0
    assert sorted(first.calls) == sorted(again.calls)
    again.most = 4
    with pytest.raises(TeacherError, match="does not fit into the device's memory"):
        check_teacher(cache, teacher(again))


def test_a_sample_is_one_of_many_and_the_seed_decides() -> None:
    cache = captured(data=documents(200))
    found = [check_teacher(cache, teacher(), positions=150, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert all(150 <= report.positions < 190 for report in found)
    assert all(report.cache_shards > len(report.shards) > 3 for report in found)
    assert found[0].shards != found[2].shards
    one, other = check_teacher(cache, teacher(), positions=9), check_teacher(cache, teacher(), positions=9)
    assert one.seed != other.seed


@pytest.mark.parametrize("positions", [1, 300])
def test_another_teacher_of_the_same_shape_is_caught(positions: int) -> None:
    cache = captured()
    named = check_teacher(cache, teacher(Causal(seed=1), "other"), positions=positions)
    assert named.fingerprint is False
    assert "another teacher: got 'other'; expected 'it'" in named.problems[0]
    assert len(named.problems) > 1
    # one that passes itself off as the right one
    hidden = check_teacher(cache, teacher(Causal(seed=1)), positions=positions)
    assert not hidden.ok
    assert hidden.fingerprint is True
    assert hidden.excess > 1
    text = check_text(hidden)
    assert "nats from the teacher's; the codec explains" in " ".join(text.split())
    assert "Delete the shards named above" in text


def test_the_right_numbers_under_another_name_are_a_problem_too() -> None:
    report = check_teacher(captured(), teacher(fingerprint="renamed"), positions=50)
    assert report.excess == 0
    assert [problem[:17] for problem in report.problems] == ["another teacher: "]
    assert "Use the teacher that the cache was captured from" in check_text(report)


def test_a_head_whose_tokens_are_shuffled_is_caught() -> None:
    shuffled = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    model = Variant(lambda states, weight, tokens: states @ weight[shuffled].T)
    report = check_teacher(captured(), teacher(model), positions=50)
    assert not report.ok
    assert report.same_top_k == 0


def copied(
    cache: Any, change: Any = lambda index, arrays: arrays, spec: CacheSpec | None = None, **objects: Any
) -> Any:
    """A cache of the same records and other arrays."""
    store = MemoryStore()
    spec = spec or cache.spec
    for key in ("plan.json", "lengths.npz"):
        store.create(key, (objects.get("plan") or cache.store).get(key))
    with create_cache(store, spec) as writer:
        for index in cache.shards:
            arrays = change(index, cache.read_shard(index))
            inputs = {name: arrays.pop(name) for name in spec.inputs}
            record = objects.get("record", cache.attributes(index)["record"])
            writer.write_shard(index, inputs, **arrays, record=record)
    return open_cache(store)


def test_a_shard_with_other_tokens_is_named() -> None:
    def change(index: int, arrays: Any) -> Any:
        if index == 3:
            arrays["tokens"] = (arrays["tokens"] + 1) % VOCAB
        return arrays

    report = check_teacher(copied(captured(), change), teacher(), positions=ALL)
    assert [problem.split(",")[0] for problem in report.problems] == ["shard 3"]
    assert check_teacher(copied(captured()), teacher(), positions=ALL).ok


@pytest.mark.parametrize(("name", "kind", "amount"), [("logprobs", "a top-k entry", 0.3), ("tail", "a tail", 0.2)])
def test_one_number_that_is_wrong_is_named(name: str, kind: str, amount: float) -> None:
    def change(index: int, arrays: Any) -> Any:
        if index == 2:
            row = int(np.flatnonzero(arrays["loss_mask"])[7])
            wrong = arrays["draws"][row] == 0 if name == "logprobs" else slice(1)
            arrays[name][row, wrong] -= amount
        return arrays

    report = check_teacher(copied(captured(), change), teacher(), positions=ALL)
    assert len(report.problems) == 1
    assert report.problems[0].startswith("shard 2, row ")
    assert kind in report.problems[0]


def test_draws_of_another_seed_are_caught() -> None:
    there = captured(held_out=0.0)
    other = captured(held_out=0.0, seed=1)
    report = check_teacher(copied(other, spec=there.spec, plan=there.store), teacher(), positions=ALL)
    assert report.excess == 0
    assert report.same_draws is not None
    assert report.same_draws < 0.5
    assert "drawn with another seed" in report.problems[0]
    assert "the same ids in " in check_text(report)


def test_where_the_plan_is_gone_draws_are_not_drawn_again() -> None:
    cache = captured()
    del cache.store._objects["lengths.npz"]
    report = check_teacher(cache, teacher(), positions=50)
    assert report.ok
    assert report.same_draws is None
    assert "it lacks plan.json or lengths.npz" in report.draws_unknown
    assert "not repeated: it lacks plan.json or lengths.npz" in check_text(report)


class Noisy(Causal):
    """Rounds otherwise, by so much."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, tokens: Tensor) -> Any:
        logits = super().forward(tokens)
        return logits + self.noise * (torch.rand(logits.shape, generator=self.generator) - 0.5)


def test_what_other_hardware_does_is_told_apart() -> None:
    cache = captured()
    report = check_teacher(cache, teacher(Noisy(5e-3)), positions=ALL)
    assert report.ok
    assert 0 < report.excess < 5e-3
    assert report.tolerance == 0.01
    assert "ok, within the tolerance" in check_text(report)
    assert not check_teacher(cache, teacher(Noisy(5e-3)), positions=ALL, tolerance=0).ok
    assert not check_teacher(cache, teacher(Noisy(0.1)), positions=ALL).ok
    assert check_teacher(cache, teacher(Noisy(0.1)), positions=ALL, tolerance=0.1).ok


def test_what_is_tolerated_follows_from_the_type() -> None:
    halves = Variant(lambda states, weight, tokens: Hidden(states.bfloat16(), LMHead(weight.bfloat16())))
    cache = captured(halves)
    report = check_teacher(cache, teacher(halves), positions=ALL)
    assert (report.excess, report.tolerance) == (0, 0.5)


def test_a_cache_without_records_is_run_sequence_by_sequence() -> None:
    model = Causal().eval()
    random = np.random.default_rng(0)
    lengths = random.integers(1, 9, 20)
    tokens = random.integers(0, VOCAB, int(lengths.sum())).astype(np.int32)
    logits = [model(torch.from_numpy(part[None]).long())[0] for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    targets = fastkd.topk_targets(torch.cat(logits), 5, draws=2)
    store = MemoryStore()
    with create_cache(store, CacheSpec(vocab_size=VOCAB, k=5, draws=2)) as writer:
        fields = {name: getattr(targets, name).numpy() for name in ("ids", "logprobs", "tail", "outcomes", "draws")}
        writer.write_shard(0, {"tokens": tokens}, **fields, sequence_lengths=lengths)
    model.calls.clear()
    report = check_teacher(open_cache(store), teacher(model), positions=ALL)
    assert report.ok
    assert report.excess == 0
    assert report.fingerprint is None
    assert report.recorded_batches is False
    assert sorted(model.calls) == sorted((1, int(n)) for n in lengths)
    assert "its spec names no plan" in report.draws_unknown
    assert "one sequence each" in check_text(report)
    assert "the spec names none" in check_text(report)


@pytest.mark.parametrize("record", [{}, {"batch_tokens": 0}, {"batch_tokens": 40, "halved": {"0": [99]}}])
def test_a_record_that_says_too_little_is_none(record: dict[str, Any]) -> None:
    report = check_teacher(copied(captured(packing="keep"), record=record), teacher(), positions=200)
    assert report.recorded_batches is False
    assert report.ok


def test_other_outcomes_are_a_problem() -> None:
    cache = captured(Variant(masked))
    report = check_teacher(cache, teacher(Causal()), positions=100)
    assert report.outcomes == report.positions
    assert any("another number of outcomes" in problem for problem in report.problems)
    # and back: entries that the teacher holds impossible are infinitely far
    report = check_teacher(captured(k=97, draws=0), teacher(Variant(masked)), positions=100)
    assert not report.ok
    assert report.to_json()["excess"] is None
    json.dumps(report.to_json(), allow_nan=False)


class TopKServer(ModuleTeacher):
    """Answers with top-k entries alone."""

    def __call__(self, inputs: Tensor) -> TopK:
        best = super().__call__(inputs).values.log_softmax(-1).topk(20)
        return TopK(best.indices, best.values)


def test_a_teacher_that_answers_with_top_k_entries() -> None:
    def server(seed: int) -> TopKServer:
        return TopKServer(Causal(seed=seed), vocab_size=VOCAB, fingerprint="it")

    store = MemoryStore()
    fastkd.capture(server(0), documents(), store, **{**SMALL, "draws": 0, "temperatures": (1.0,)})
    report = check_teacher(open_cache(store), server(0), positions=ALL)
    assert report.ok
    assert (report.excess, report.same_top_k) == (0, 1.0)
    assert not check_teacher(open_cache(store), server(1), positions=50).ok


def test_a_teacher_that_fails_is_named() -> None:
    broken = Variant(lambda states, weight, tokens: (states @ weight.T).masked_fill(tokens[..., None] == 5, torch.nan))
    with pytest.raises(TeacherError, match=r"document \d+, position \d+: the teacher failed there: .* NaN"):
        check_teacher(captured(), teacher(broken), positions=ALL)


class Classifier(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(9, 7)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


def shifted(images: Tensor, seeds: Any) -> Tensor:
    return torch.stack([image.roll(int(s) % 3, 0) for image, s in zip(images, seeds.tolist(), strict=True)])


def test_examples_are_augmented_again() -> None:
    data = Examples(torch.randn(20, 3, 3), augment=shifted, fingerprint="roll", copies=4, seed=5)
    store = MemoryStore()
    fastkd.capture(Classifier(), data, store, k=3, draws=2, shard_positions=30, batch_tokens=8)
    cache = open_cache(store)
    classifier = ModuleTeacher(Classifier(), vocab_size=7)
    report = check_teacher(cache, classifier, positions=ALL, data=data)
    assert report.ok
    assert (report.excess, report.positions, report.same_draws) == (0, 80, 1.0)
    assert not check_teacher(cache, ModuleTeacher(Classifier(1), vocab_size=7), data=data).ok
    others = Examples(torch.randn(20, 3, 3), augment=shifted, fingerprint="roll", copies=4, seed=5)
    assert check_teacher(cache, classifier, data=others).problems
    with pytest.raises(DataError, match="is a cache of examples, which it does not contain"):
        check_teacher(cache, classifier)


def test_what_cannot_be_checked_is_named() -> None:
    cache = captured()
    with pytest.raises(TeacherError, match="got a vocabulary of 96; expected 97, that of the cache's teacher"):
        check_teacher(cache, ModuleTeacher(Causal(), vocab_size=96))
    short = teacher()
    short.max_positions = 7
    with pytest.raises(TeacherError, match="this teacher takes at most 7"):
        check_teacher(cache, short)
    with pytest.raises(CacheError, match="positions: got 0"):
        check_teacher(cache, teacher(), positions=0)
    with pytest.raises(CacheError, match="tolerance: got -1"):
        check_teacher(cache, teacher(), tolerance=-1)
    store = MemoryStore()
    create_cache(store, cache.spec).close()
    with pytest.raises(CacheError, match="has no shards yet"):
        check_teacher(open_cache(store), teacher())
    nothing = MemoryStore()
    create_cache(nothing, replace(cache.spec, inputs=("other",))).close()
    with pytest.raises(CacheError, match="no shards yet"):
        check_teacher(open_cache(nothing), teacher())

    def change(index: int, arrays: Any) -> Any:
        arrays["tokens"] = np.where(np.arange(len(arrays["tokens"])) == 4, VOCAB, arrays["tokens"])
        return arrays

    with pytest.raises(CacheError, match=r"shard \d+, row 4: got token 97; expected 0 to 96"):
        check_teacher(copied(cache, change), teacher())


def test_a_cache_without_inputs_cannot_be_run() -> None:
    store = MemoryStore()
    with create_cache(store, CacheSpec(vocab_size=VOCAB, k=1, inputs=())) as writer:
        ones = np.zeros((2, 1))
        writer.write_shard(
            0, {}, ids=ones.astype(int), logprobs=ones.astype(np.float32) - 1, tail=np.zeros((2, 4)) - 1.0
        )
    with pytest.raises(CacheError, match="got inputs none; expected tokens or examples"):
        check_teacher(open_cache(store), teacher())
