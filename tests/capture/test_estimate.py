"""The estimate of a capture, beside what the capture then takes."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from capture_cases import Causal, documents
from torch import Tensor, nn

import fastkd
from fastkd.cache import open_cache
from fastkd.cache.manifest import listed
from fastkd.cache.stores import MemoryStore
from fastkd.capture import estimate as estimate_module
from fastkd.capture import sample as sample_module
from fastkd.capture.claims import Claims
from fastkd.capture.estimate import (
    Estimate,
    capture_hours,
    estimate,
    estimate_text,
    position_seconds,
    requests,
)
from fastkd.capture.sample import middle_first
from fastkd.capture.window_plan import WindowPlanSettings, make_window_plan
from fastkd.data.documents import Documents, open_documents
from fastkd.data.examples import Examples
from fastkd.errors import DataError, TeacherError
from fastkd.kernels.lm_head import LMHead
from fastkd.models.protocol import Hidden
from fastkd.settings import CaptureSettings
from fastkd.teachers.module import ModuleTeacher

VOCAB = 3000
SETTINGS = CaptureSettings(k=24, draws=8, context=256, shard_positions=16384, batch_tokens=4096)


class Zipf(nn.Module):
    """Sees two tokens; a head with frequent and rare ones."""

    def __init__(self, *, hidden: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCAB, 16, generator=generator))
        self.head = nn.Parameter(0.6 * torch.randn(VOCAB, 16, generator=generator))
        self.bias = nn.Parameter(-torch.log(torch.arange(VOCAB) + 3.0))
        self.hidden = hidden
        self.calls: list[tuple[int, ...]] = []

    def forward(self, tokens: Tensor) -> Any:
        self.calls.append(tuple(tokens.shape))
        states = self.embedding[tokens]
        states[:, 1:] += 0.5 * states[:, :-1].clone()
        return Hidden(states, LMHead(self.head, self.bias)) if self.hidden else states @ self.head.T + self.bias


def prose(count: int = 250, longest: int = 300) -> Documents:
    random = np.random.default_rng(0)
    return open_documents(
        [random.zipf(1.3, int(n)).clip(1, VOCAB).astype(np.int64) - 1 for n in random.integers(1, longest, count)],
        vocab_size=VOCAB,
    )


def answers() -> Documents:
    """Conversations of which only a few positions count."""
    chats = [
        [{"role": "user", "content": "why? " * (n % 50)}, {"role": "assistant", "content": "so it is " * (n % 4)}]
        for n in range(300)
    ]
    return open_documents(
        chats,
        tokenizer=lambda text: [ord(c) for c in text],
        tokenizer_fingerprint="characters",
        template=lambda chat, ask: "".join(f"{m['role']}:{m['content']}\n" for m in chat) + "assistant:" * ask,
        template_fingerprint="colons",
        loss_on="assistant",
    )


def estimated(data: Any = None, model: Any = None, settings: CaptureSettings = SETTINGS, **options: Any) -> Estimate:
    """From two batches, unless options say otherwise."""
    teacher = ModuleTeacher(model or Zipf(), vocab_size=VOCAB, fingerprint="it")
    return estimate(teacher, data or prose(), settings, **{"seconds": 0, "min_batches": 2, **options})


def taken(data: Any, settings: CaptureSettings, **changes: Any) -> tuple[int, Any, Any]:
    """Bytes of the shards of a real capture, its report and its store."""
    store = MemoryStore()
    report = fastkd.capture(Zipf(), data, store, settings, vocab_size=VOCAB, **changes)
    return sum(listed(store).values()), report, store


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        (prose, SETTINGS),
        (lambda: prose(2000, 30), CaptureSettings(k=8, draws=0, context=64, shard_positions=8192, batch_tokens=2048)),
        (prose, CaptureSettings(k=0, draws=20, context=128, packing="keep", shard_positions=4096, batch_tokens=4096)),
        (prose, CaptureSettings(k=32, mass=0.6, draws=4, context=100, overlap=30, codec="portable")),
        (answers, CaptureSettings(k=24, draws=8, context=512, batch_tokens=8192, codec="fast")),
    ],
)
def test_bytes_are_those_of_the_capture(data: Any, settings: CaptureSettings) -> None:
    report = estimated(data(), settings=settings)
    size, captured, _ = taken(data(), settings)
    assert report.measured["batches"] == 2
    assert report.measured["positions"] < 0.6 * captured.positions_captured
    assert report.plan == captured.plan
    assert abs(report.bytes / size - 1) < 0.04
    assert report.bytes_per_position == pytest.approx(sum(report.by_array.values()))


def test_a_small_sample_is_not_extrapolated_linearly() -> None:
    """The sample pays for its vocabulary as a whole shard does, once."""
    report = estimated(prose(350))
    size, _, _ = taken(prose(350), SETTINGS)
    assert report.measured["positions"] < 0.15 * report.plan["positions"]
    assert abs(report.bytes / size - 1) < 0.04


def test_another_k_costs_what_it_then_costs() -> None:
    report = estimated(prose(120))
    by_k = {cost.k: cost for cost in report.by_k}
    assert list(by_k) == [16, 24, 32, 64, 128]
    assert by_k[24].bytes == report.bytes
    for k in (16, 64):
        size, _, _ = taken(prose(120), CaptureSettings(**{**vars(SETTINGS), "k": k}))
        assert abs(by_k[k].bytes / size - 1) < 0.05
    sizes = [cost.bytes for cost in report.by_k]
    assert sizes == sorted(sizes)


def test_the_mass_of_top_k_entries_is_that_of_the_cache() -> None:
    report = estimated(prose(120))
    (cost,) = (cost for cost in report.by_k if cost.k == SETTINGS.k)
    _, _, store = taken(prose(120), SETTINGS)
    cache = open_cache(store)
    means, counted = cache.manifest.column("mass_mean").to_numpy(), cache.manifest.column("counted").to_numpy()
    assert cost.mass == pytest.approx(float(np.average(means, weights=counted)), abs=0.02)
    masses = [cost.mass for cost in report.by_k]
    assert masses == sorted(masses)
    assert len(masses) == 5


def test_what_the_entries_lose_is_the_divergence_from_the_dense_teacher() -> None:
    teacher, k = Zipf(), 24
    inputs = torch.arange(64).reshape(2, 32) * 7 % VOCAB
    with torch.no_grad():
        answer = teacher(inputs)
        dense = (answer.states @ teacher.head.T + teacher.bias).double().log_softmax(-1).flatten(0, 1)
    best = dense.topk(k, -1)
    rest = torch.log1p(-best.values.exp().sum(-1)) - math.log(VOCAB - k)
    said = rest[:, None].repeat(1, VOCAB).scatter(1, best.indices, best.values)
    expected = (dense.exp() * (dense - said)).sum(-1)
    others = dense.scatter(1, best.indices, -math.inf)
    tails = torch.stack([torch.logsumexp(others / t, -1) for t in sample_module._NEAR_ONE], 1)
    arrays = {"logprobs": best.values.numpy(), "tail": tails.float().numpy()}
    np.testing.assert_allclose(sample_module.lost_nats(arrays, VOCAB), expected.numpy(), rtol=0.01, atol=1e-4)
    everything = {"logprobs": dense.numpy(), "tail": np.full((64, 3), -np.inf, np.float32)}
    assert not sample_module.lost_nats(everything, VOCAB).any()


def test_a_recommended_row_with_its_reason() -> None:
    report = estimated(prose(40))
    losses = [cost.kl for cost in report.by_k]
    assert all(a is not None and b is not None and a > b for a, b in itertools.pairwise(losses))

    def with_losses(*losses: float) -> Estimate:
        costs = [replace(cost, kl=kl) for cost, kl in zip(report.by_k, losses, strict=True)]
        return replace(report, by_k=costs)

    found = with_losses(0.3, 0.2, 0.049, 0.02, 0.01)
    assert found.to_json()["recommended_k"] == 32
    text = " ".join(estimate_text(found).split())
    assert "32 " in next(line for line in estimate_text(found).splitlines() if line.endswith("<- recommended"))
    each = f"{report.by_k[2].bytes_per_position:.1f} bytes a position"
    assert "recommended k = 32: the smallest k here whose entries lose at most 0.05 nats" in text
    assert each in text
    assert "more than as asked" in text
    assert "8 draws stand for the rest" in text
    worst = with_losses(0.9, 0.8, 0.7, 0.6, 0.5)
    assert worst.to_json()["recommended_k"] == 128
    assert "no k here loses as little as 0.05 nats" in " ".join(estimate_text(worst).split())
    unknown = replace(report, by_k=[replace(cost, kl=None) for cost in report.by_k])
    assert unknown.to_json()["recommended_k"] is None
    assert "recommended" not in estimate_text(unknown)
    assert all(len(line) <= 80 for line in estimate_text(found).splitlines())


class Untrained(Zipf):
    """Nearly uniform targets, as of random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.head.data *= 0.01
        self.bias.data.zero_()


def test_no_k_is_recommended_for_nearly_uniform_targets() -> None:
    report = estimated(prose(20), Untrained(), min_batches=1)
    assert max(cost.mass for cost in report.by_k) < 0.1
    document = report.to_json()
    assert (document["recommended_k"], document["nearly_uniform"]) == (None, True)
    text = " ".join(estimate_text(report).split())
    assert "recommended none. The teacher's targets are nearly uniform: even the 128 most likely tokens hold" in text
    assert "<- recommended" not in text
    assert not estimated(prose(20), min_batches=1).nearly_uniform


def test_draws_without_top_k_hold_no_mass() -> None:
    report = estimated(prose(40), settings=CaptureSettings(k=0, draws=20, context=128, shard_positions=4096))
    assert (report.by_k[0].k, report.by_k[0].mass, report.by_k[0].bytes) == (0, 0.0, report.bytes)


class Counting:
    """A store that counts what it is asked."""

    readonly = False

    def __init__(self) -> None:
        self.inner, self.asked = MemoryStore(), Counter[str]()

    def describe(self) -> str:
        return "counted"

    def get(self, key: str) -> bytes:
        self.asked["GET"] += 1
        return self.inner.get(key)

    def get_tail(self, key: str, length: int) -> bytes:
        self.asked["GET"] += 1
        return self.inner.get_tail(key, length)

    def exists(self, key: str) -> bool:
        self.asked["GET"] += 1
        return self.inner.exists(key)

    def list(self, prefix: str) -> Any:
        self.asked["LIST"] += 1
        return self.inner.list(prefix)

    def create(self, key: str, data: bytes | memoryview) -> bool:
        self.asked["PUT"] += 1
        return self.inner.create(key, data)

    def sweep(self) -> Any:
        return []


def test_requests_are_those_of_the_capture() -> None:
    settings = CaptureSettings(k=5, draws=3, context=16, shard_positions=64, batch_tokens=40)
    teacher = ModuleTeacher(Causal(), vocab_size=97)
    data = open_documents(documents(), vocab_size=97)
    report = estimate(teacher, data, settings, seconds=0)
    store = Counting()
    captured = fastkd.capture(teacher, data, store, settings)
    assert captured.plan["shards"] > 5
    assert dict(store.asked) == report.requests["capture"]
    store.asked.clear()
    cache = open_cache(store)
    for index in cache.shards:
        cache.read_shard(index)
    assert store.asked["GET"] == report.requests["epoch"]["GET"]
    assert store.asked.total() == sum(report.requests["epoch"].values())


@pytest.mark.parametrize("seconds", [10, 31, 200, 3000, 20_000])
def test_claims_are_renewed_as_often_as_is_said(seconds: int) -> None:
    now = [0.0]
    store = Counting()
    claims = Claims(store, 0, 1, clock=lambda: now[0])
    claims.take("0")
    while now[0] < seconds - 1:
        now[0] += 0.25
        claims.keep()
    said = requests(1, hours=seconds / 3600)["capture"]["PUT"] - requests(1)["capture"]["PUT"]
    assert abs(store.asked["PUT"] - 1 - said) <= 1


def test_the_teacher_is_run_once_on_each_batch() -> None:
    model = Zipf()
    report = estimated(prose(40), model)
    # and before that on a part of one, for all k
    assert len(model.calls) - report.measured["batches"] == 1
    assert math.prod(model.calls[0]) < 0.5 * math.prod(model.calls[1])
    assert len(report.by_k) == 5


class Slow(Zipf):
    """Takes a millisecond a position of a clock that nothing else moves."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def forward(self, tokens: Tensor) -> Any:
        self.now += 1e-3 * tokens.numel()
        return super().forward(tokens)

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("seconds", [0.0, 1.0, 6.0, 9.0, 30.0, 55.0])
def test_the_time_that_is_asked_for_is_kept_to(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Slow()
    monkeypatch.setattr(sample_module, "time", model)
    monkeypatch.setattr(estimate_module, "time", model)
    report = estimated(model=model, min_batches=1, seconds=seconds)
    found, batch = report.measured, 4.1  # seconds of one, at most; the data have some nine
    assert found["seconds_spent"] == pytest.approx(model.now)
    assert found["seconds_spent"] <= max(seconds + batch / 2, 1.6 * batch)
    if seconds <= report.plan["positions"] * 1e-3:
        assert found["seconds_spent"] >= seconds - batch / 2
    text = " ".join(estimate_text(report).split())
    assert (found["batches"] == 1) == (seconds < 7)
    assert (f"in all instead of {seconds:g}: at least one batch is run" in text) == (seconds < 4)


def test_states_and_logits_come_to_the_same() -> None:
    one, other = (estimated(prose(60), Zipf(hidden=h)) for h in (True, False))
    assert one.bytes == pytest.approx(other.bytes, rel=1e-3)
    for a, b in zip(one.by_k, other.by_k, strict=True):
        assert a.k == b.k
        assert a.bytes == pytest.approx(b.bytes, rel=1e-3)
        assert a.mass == pytest.approx(b.mass, abs=1e-4)


def test_batches_of_all_lengths_from_some_shards() -> None:
    model = Zipf()
    settings = CaptureSettings(k=8, draws=0, context=256, shard_positions=4096, batch_tokens=512)
    report = estimated(prose(), model, settings, seconds=60)
    assert len(report.measured["shards"]) == 3 < report.plan["shards"]
    # they are exhausted before the time is
    assert report.measured["positions"] > 9000
    assert report.measured["batches"] == len(model.calls) - 1
    lengths = [length for _, length in model.calls[1:]]
    assert min(lengths) < 50
    assert max(lengths) == 256


@pytest.mark.parametrize("count", [1, 2, 3, 8, 100])
def test_each_number_once_the_middle_first(count: int) -> None:
    found = list(middle_first(count))
    assert sorted(found) == list(range(count))
    assert found[0] == (count - 1) // 2
    if count == 100:
        assert found[:7] == [49, 24, 74, 11, 36, 61, 87]


def test_hours_and_cost_follow_from_the_slice() -> None:
    lengths = np.full(100, 100, np.int32)
    plan = make_window_plan(lengths, WindowPlanSettings(context=100, shard_positions=1000), "x")
    assert plan.shards == 10
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert capture_hours(plan, 1, 0.36) == pytest.approx(1.0)
    assert capture_hours(plan, 4, 0.36) == pytest.approx(0.3)  # ten shards: three rounds, not two and a half
    assert position_seconds(1.0, 0.5, cpu) == 1 + 0.5 / torch.get_num_threads()
    assert position_seconds(1.0, 0.5, gpu) == 1.0
    assert position_seconds(1.0, 1.5, gpu) == 1.5
    report = estimated(prose(60), workers=2, price_per_hour=1.5)
    each = 3600 * report.hours / report.plan["positions"]
    shards = report.plan["shards"]
    assert each == pytest.approx(math.ceil(shards / 2) / shards / report.positions_per_second)
    assert report.cost == pytest.approx(1.5 * report.worker_hours)
    assert report.worker_hours == 2 * report.hours
    assert estimated(prose(60)).cost is None


class Limited(Zipf):
    def forward(self, tokens: Tensor) -> Any:
        if tokens.numel() > 600:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(tokens)


def test_batches_that_do_not_fit_are_said() -> None:
    report = estimated(model=Limited())
    assert report.measured["batches_halved"] == 2
    assert "2 of the batches did not fit into memory and were halved" in " ".join(estimate_text(report).split())
    assert len(report.by_k) == 5
    assert report.bytes == pytest.approx(estimated().bytes, rel=1e-3)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(9, 40)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


def test_examples() -> None:
    data = Examples(
        torch.randn(2000, 3, 3),
        augment=lambda images, seeds: images + 0.1,
        fingerprint="brighter",
        copies=3,
    )
    settings = CaptureSettings(k=6, draws=2, shard_positions=3000, batch_tokens=600)
    report = estimate(ModuleTeacher(Classifier(), vocab_size=40), data, settings, seconds=0)
    store = MemoryStore()
    captured = fastkd.capture(Classifier(), data, store, settings)
    assert report.plan == captured.plan
    assert abs(report.bytes / sum(listed(store).values()) - 1) < 0.04
    # no k beyond the 40 classes
    assert [cost.k for cost in report.by_k] == [6, 16, 32]


def test_without_targets_there_is_no_table() -> None:
    data = open_documents(
        [[{"role": "user", "content": "hm"}]] * 9,
        tokenizer=lambda text: [ord(c) for c in text],
        tokenizer_fingerprint="characters",
        template=lambda chat, ask: "".join(m["content"] for m in chat),
        template_fingerprint="plain",
        loss_on="assistant",
    )
    report = estimated(data)
    assert report.by_k == []
    assert report.plan["positions"] == 18
    assert report.bytes > 0


def test_the_text() -> None:
    report = estimated(prose(40), workers=3, price_per_hour=2.5)
    text = estimate_text(report)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert f"{report.plan['positions']:,} positions in {report.plan['windows']:,} windows" in words
    assert "at 2.5 an hour" in words
    assert "with 3 workers" in words
    (marked,) = (line for line in text.splitlines() if line.startswith("* "))
    cost = report.by_k[1]
    assert marked.split()[:3] == ["*", "24", f"{cost.bytes_per_position:.1f}"]
    assert marked.removesuffix("<- recommended").split()[-2:] == [f"{cost.mass:.3f}", f"{cost.kl:.3f}"]
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["plan"] == report.plan
    assert "cost" not in estimate_text(estimated(model=Limited()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers: got 0"),
        ({"seconds": -1}, "seconds: got -1"),
        ({"price_per_hour": math.inf}, "price_per_hour: got inf"),
        ({"min_batches": 0}, "min_batches: got 0"),
    ],
)
def test_numbers_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        estimated(**options)


def test_a_teacher_that_fails_is_named() -> None:
    class Broken(Zipf):
        def forward(self, tokens: Tensor) -> Any:
            return super().forward(tokens).states @ self.head.T * torch.nan

    with pytest.raises(TeacherError, match=r"document \d+ .*the teacher failed there"):
        estimated(model=Broken())
