"""Evaluation from a cache: each measure against dense reference code, windows as units, intervals that cover."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_cases import make_shard, make_spec
from capture_cases import VOCAB, Causal, documents
from cases import sparse
from stream_cases import make_cache, reference
from torch import Tensor, nn

import fastkd
from fastkd.bench.timing import interval
from fastkd.cache import Cache, create_cache, open_cache
from fastkd.errors import StreamError
from fastkd.evaluate.api import Evaluation, compare, evaluate
from fastkd.evaluate.result import BINS, Windows
from fastkd.evaluate.rows import student_rows, teacher_rows
from fastkd.stream.batch import MicroBatch
from fastkd.utils.intervals import NO_INTERVAL, Interval, bootstrap_interval, ratio_interval, to_json

Logits = Callable[[MicroBatch], Tensor]


class Student(nn.Module):
    """A small causal model with the interface of the trainer's students."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = Causal(seed=seed)

    def logits(self, batch: MicroBatch, rows: Tensor | None = None) -> Tensor:
        every = self.model(batch.input_ids).flatten(0, 1)
        return every if rows is None else every[rows]


def dense(model: nn.Module) -> Logits:
    def logits(batch: MicroBatch) -> Tensor:
        return model(batch.input_ids).flatten(0, 1)[batch.targets.index]

    return logits


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Of real targets: windows of up to 16 positions with several documents in them, a third held out."""
    folder = tmp_path_factory.mktemp("evaluate") / "cache"
    fastkd.capture(
        Causal(), documents(60), folder, k=5, draws=3, context=16, shard_positions=64, batch_tokens=40, held_out=0.35
    )
    return open_cache(folder)


# Measures of rows


def rows_of(n: int = 40, v: int = 30, k: int = 6, draws: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Any]:
    g = torch.Generator().manual_seed(seed)
    teacher, student = 2 * torch.randn(n, v, generator=g), 2 * torch.randn(n, v, generator=g)
    labels = torch.randint(v, (n,), generator=g)
    return teacher.double(), student.double(), labels, sparse(teacher, k, draws, generator=g)


def test_rows_against_dense_distributions() -> None:
    teacher, student, labels, targets = rows_of()
    rows = student_rows(student, targets, labels)
    log_q, log_p = teacher.log_softmax(1), student.log_softmax(1)
    full = (log_q.exp() * (log_q - log_p)).sum(1)
    for i in range(len(labels)):
        head = teacher[i].argsort(descending=True)[:6]
        out = torch.ones(30, dtype=torch.bool)
        out[head] = False
        q, p = log_q[i].exp(), log_p[i].exp()
        bucket = (q[head] * (q[head] / p[head]).log()).sum() + q[out].sum() * (q[out].sum() / p[out].sum()).log()
        expected = {
            "kl_bucket": bucket,
            "cross_entropy": -log_p[i, labels[i]],
            "accuracy": log_p[i].argmax() == labels[i],
            "agreement": log_p[i].argmax() == log_q[i].argmax(),
            "confidence": log_p[i].exp().max(),
        }
        for name, value in expected.items():
            assert float(rows[name][i]) == pytest.approx(float(value), abs=2e-5), name
    assert (rows["kl_bucket"] <= full + 1e-5).all()
    assert float((full - rows["kl_bucket"]).mean()) > 0.1


def test_sampled_kl_is_the_dense_one_on_the_average() -> None:
    teacher, student, labels, _ = rows_of()
    log_q, log_p = teacher.log_softmax(1), student.log_softmax(1)
    full, entropy = float((log_q.exp() * (log_q - log_p)).sum(1).mean()), float(-(log_q.exp() * log_q).sum(1).mean())
    found = []
    for seed in range(60):
        targets = sparse(teacher.float(), 6, 4, generator=torch.Generator().manual_seed(seed))
        sampled = student_rows(student, targets, labels)["kl_sampled"].mean()
        found.append((float(sampled), float(teacher_rows(targets, labels)["entropy_sampled"].mean())))
    for values, true in zip(zip(*found, strict=True), (full, entropy), strict=True):
        mean, half = interval(values)
        assert abs(mean - true) < 1.5 * half
        assert half < 0.04


def test_equals_of_the_teacher_are_all_its_best() -> None:
    teacher = torch.tensor([[3.0, 3.0, 0.0, -1.0]] * 4)
    student = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 9.0, 0], [0, 0, 0, 9.0]])
    targets = sparse(teacher, 3)
    labels = torch.tensor([0, 0, 2, 3])
    assert student_rows(student, targets, labels)["agreement"].tolist() == [1, 1, 0, 0]
    # the teacher has to choose between two, one of which is the label
    assert teacher_rows(targets, labels)["accuracy"].tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("draws", [0, 4])
def test_what_a_cache_knows_of_its_teacher(draws: int) -> None:
    teacher, _, labels, targets = rows_of(n=300, draws=draws)
    log_q = teacher.log_softmax(1)
    rows = teacher_rows(targets, labels)
    own = -log_q.gather(1, labels[:, None])[:, 0]
    known = rows["label_known"].bool()
    assert 0.1 < float(known.float().mean()) < 0.7
    torch.testing.assert_close(rows["cross_entropy_at_least"][known].double(), own[known], atol=1e-5, rtol=0)
    assert (rows["cross_entropy_at_least"] <= own + 1e-5).all()
    # not the trivial bound: no better than the tail's mass, nor than the last of the head
    assert (rows["cross_entropy_at_least"] >= -torch.log(rows["tail_mass"] + 1e-9) - 1e-4)[~known].all()
    entropy = -(log_q.exp() * log_q).sum(1)
    assert (rows["entropy_at_least"] < entropy).all()
    assert (rows["entropy_at_most"] > entropy).all()
    assert ("entropy_sampled" in rows) == bool(draws)
    assert rows["accuracy"].tolist() == (log_q.argmax(1) == labels).float().tolist()
    torch.testing.assert_close(rows["confidence"].double(), log_q.exp().amax(1), atol=1e-6, rtol=0)
    everything = teacher_rows(sparse(teacher, 30), labels)
    for name in ("entropy_at_least", "entropy_at_most"):
        torch.testing.assert_close(everything[name].double(), entropy, atol=1e-5, rtol=0)


def test_draws_alone_have_no_top_k_entries() -> None:
    _, student, labels, targets = rows_of(k=0)
    assert set(student_rows(student, targets, labels)) == {"cross_entropy", "accuracy", "confidence", "kl_sampled"}
    found = teacher_rows(targets, labels)
    assert set(found) == {"label_known", "cross_entropy_at_least", "tail_mass", "entropy_sampled"}
    assert found["cross_entropy_at_least"][found["label_known"] == 0].abs().max() < 1e-6


def test_logits_go_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, student, labels, targets = rows_of()
    whole = student_rows(student, targets, labels)
    monkeypatch.setattr("fastkd.evaluate.rows._CHUNK", 7 * 30)
    parts = student_rows(student, targets, labels)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


# Windows


def test_calibration_error_by_hand() -> None:
    """Bins of a fifteenth: (9/15, 10/15] and (14/15, 1]; the gaps weigh by their positions."""
    windows = Windows.empty(2)
    confidence, right = torch.tensor([0.62, 0.66, 0.95, 1.0, 0.98]), torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    windows.add(np.array([0, 1, 0, 1, 1]), {"confidence": confidence, "accuracy": right})
    expected = (2 * abs(1 - 0.64) + 3 * abs(2 / 3 - (0.95 + 1.0 + 0.98) / 3)) / 5
    assert windows.intervals()["ece"].mean == pytest.approx(expected, abs=1e-6)
    assert [b["positions"] for b in windows.reliability()] == [2, 3]
    assert windows.reliability()[0] == {"positions": 2, "confidence": pytest.approx(0.64), "accuracy": 1.0}
    edge = Windows.empty(1)
    edge.add(np.array([0, 0]), {"confidence": torch.tensor([1e-9, 1.0]), "accuracy": torch.zeros(2)})
    assert edge.bins is not None
    assert edge.bins[0, :, 0].tolist() == [1] + [0] * (BINS - 2) + [1]


def test_intervals_of_equal_windows_are_students() -> None:
    values = np.random.default_rng(0).normal(size=9)
    ours, plain = ratio_interval(7 * values, np.full(9, 7.0)), interval(values.tolist())
    assert ours == pytest.approx(tuple(plain))
    assert interval([2.0]) == ratio_interval(np.array([4.0]), np.array([2.0])) == Interval(2.0, math.inf)
    assert bootstrap_interval(lambda times: times.sum(1), 1) == Interval(1.0, math.inf)
    assert to_json(Interval(2.0, math.inf)) == {"mean": 2.0, "low": None, "high": None, "why": NO_INTERVAL}
    assert to_json(Interval(2.0, 0.5)) == {"mean": 2.0, "low": 1.5, "high": 2.5}


@pytest.mark.parametrize("windows", [6, 12, 60])
def test_intervals_cover(windows: int) -> None:
    """Of windows that differ, and have different counts, 95% of the intervals hold the truth."""
    random, hits, times = np.random.default_rng(windows), 0, 3000
    for _ in range(times):
        counts = random.integers(50, 200, windows).astype(float)
        level = random.normal(3.0, 0.3, windows)
        found = ratio_interval(counts * level + random.normal(0, 1, windows) * np.sqrt(counts), counts)
        hits += found.low <= 3.0 <= found.high
    assert 0.93 <= hits / times <= 0.97


def test_the_bootstrap_agrees_with_students_where_both_apply() -> None:
    random = np.random.default_rng(3)
    counts = random.integers(50, 200, 40).astype(float)
    sums = counts * random.normal(3.0, 0.3, 40)
    exact = ratio_interval(sums, counts)
    drawn = bootstrap_interval(lambda times: (times @ sums) / (times @ counts), 40)
    assert drawn.mean == pytest.approx(exact.mean)
    assert drawn.half == pytest.approx(exact.half, rel=0.1)
    assert drawn == bootstrap_interval(lambda times: (times @ sums) / (times @ counts), 40)


# On a cache


def by_hand(cache: Cache, model: nn.Module) -> list[dict[str, float]]:
    """Of each held-out window: positions that count, and sums over them, each segment run alone."""
    train = json.loads(cache.store.get("plan.json"))["train_shards"]
    found: dict[tuple[int, int], dict[str, float]] = {}
    for index in (i for i in cache.shards if i >= train):
        arrays = cache.read_shard(index)
        tokens, ends = arrays["tokens"].tolist(), set()
        for name in ("sequence_lengths", "document_lengths"):
            ends |= set(np.cumsum(arrays[name]).tolist())
        bounds, sequence_ends = [0, *sorted(ends)], np.cumsum(arrays["sequence_lengths"])
        for a, b in pairwise(bounds):
            window = found.setdefault((index, int(np.searchsorted(sequence_ends, a, side="right"))), {})
            log_p = model(torch.tensor([tokens[a:b]]))[0].double().log_softmax(1)
            for i in range(b - a - 1):
                best = set(arrays["ids"][a + i][arrays["logprobs"][a + i] == arrays["logprobs"][a + i].max()].tolist())
                add = {
                    "count": 1.0,
                    "cross_entropy": -float(log_p[i, tokens[a + i + 1]]),
                    "accuracy": float(log_p[i].argmax() == tokens[a + i + 1]),
                    "agreement": float(int(log_p[i].argmax()) in best),
                }
                for name, value in add.items():
                    window[name] = window.get(name, 0.0) + value
    return [window for _, window in sorted(found.items())]


@torch.no_grad()
def test_windows_are_measured_one_by_one(cache: Cache) -> None:
    student = Student(1)
    found = evaluate(student, cache)
    expected = by_hand(cache, student.model.eval())
    assert len(expected) == len(found.student.counts) > 10
    assert found.student.counts.tolist() == [w.get("count", 0) for w in expected]
    for name in ("cross_entropy", "accuracy", "agreement"):
        np.testing.assert_allclose(found.student.sums[name], [w.get(name, 0) for w in expected], rtol=1e-5, atol=1e-5)
    mean = sum(w.get("cross_entropy", 0) for w in expected) / found.count
    assert found.intervals()["cross_entropy"].mean == pytest.approx(mean, rel=1e-6)
    assert found.summary()["perplexity"]["mean"] == pytest.approx(math.exp(mean), rel=1e-5)
    low, high = (found.summary()["perplexity"][end] for end in ("low", "high"))
    assert low is not None
    assert high is not None
    assert low < math.exp(mean) < high


@pytest.mark.parametrize("batch_tokens", [1, 37, 10_000])
def test_batches_change_nothing(cache: Cache, batch_tokens: int) -> None:
    reference = evaluate(Student(1), cache)
    found = evaluate(dense(Student(1).model.eval()), cache, batch_tokens=batch_tokens)
    assert found.content == reference.content
    assert found.positions == reference.positions
    for ours, theirs in ((found.student, reference.student), (found.teacher, reference.teacher)):
        assert ours.counts.tolist() == theirs.counts.tolist()
        for name in theirs.sums:
            np.testing.assert_allclose(ours.sums[name], theirs.sums[name], rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours.bins, theirs.bins, rtol=1e-4, atol=1e-5)


def test_the_teacher_itself(cache: Cache) -> None:
    """As a student it is at no distance but for quantisation, and what the cache knows of it is true."""
    found = evaluate(dense(Causal().eval()), cache)
    student, teacher = found.intervals(), found.teacher_intervals()
    assert abs(student["kl_bucket"].mean) < 2e-3
    assert student["agreement"].mean > 0.995
    assert teacher["cross_entropy_at_least"].mean < student["cross_entropy"].mean + 0.02
    assert teacher["accuracy"].mean == pytest.approx(student["accuracy"].mean, abs=0.02)
    assert teacher["entropy_at_least"].mean < teacher["entropy_sampled"].mean < teacher["entropy_at_most"].mean
    other = evaluate(Student(1), cache)
    assert other.intervals()["kl_bucket"].mean > 1
    assert other.intervals()["kl_sampled"].mean > other.intervals()["kl_bucket"].mean - 0.1
    assert other.teacher.to_json() == found.teacher.to_json()


def test_pairs(cache: Cache) -> None:
    """What windows have in common drops out: the paired interval is narrower than either's."""
    model = Causal().eval()
    near = Causal().eval()
    with torch.no_grad():
        near.head += 0.1 * torch.randn(near.head.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = evaluate(dense(near), cache), evaluate(dense(model), cache)
    found = compare(ours, theirs)
    assert set(found) == set(ours.intervals())
    for name, difference in found.items():
        apart = ours.intervals()[name], theirs.intervals()[name]
        assert difference.mean == pytest.approx(apart[0].mean - apart[1].mean, abs=1e-9), name
    for name in ("cross_entropy", "accuracy"):
        assert found[name].half < 0.5 * ours.intervals()[name].half
    assert all(value == Interval(0.0, 0.0) for value in compare(ours, ours).values())
    with pytest.raises(StreamError, match="compare: got evaluations of different windows"):
        compare(ours, evaluate(dense(model), cache, max_positions=60))
    with pytest.raises(StreamError, match="compare: got evaluations that count different positions"):
        compare(ours, replace(theirs, student=Windows(theirs.student.counts + 1, theirs.student.sums)))


def test_json(cache: Cache) -> None:
    found = evaluate(Student(1), cache, max_positions=100)
    text = json.dumps(found.to_json(), allow_nan=False)
    again = Evaluation.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert again.intervals() == found.intervals()
    assert set(again.summary()) == set(found.intervals()) | {"perplexity"}
    alone = replace(found, teacher=Windows(found.student.counts))  # without a teacher, nothing is known of one
    assert Evaluation.from_json(json.loads(json.dumps(alone.to_json()))).teacher_intervals() == {}
    one = evaluate(Student(1), cache, max_positions=20)
    assert one.windows == 1
    json.dumps(one.to_json(), allow_nan=False)


def test_damaged_evaluations_are_named(cache: Cache) -> None:
    good = evaluate(Student(1), cache, max_positions=100).to_json()
    for change, message in (
        ({"format": "other"}, "expected what `Evaluation.to_json` returned"),
        ({"version": 9}, "got version 9"),
        ({"student": {}}, "damaged"),
        ({"seconds": "soon"}, "damaged"),
        ({"positions": math.inf}, "damaged"),
        ({"student": good["student"] | {"sums": {}}}, "student: no accuracy, cross_entropy"),
        ({"teacher": good["student"]}, "teacher: no cross_entropy_at_least"),
        ({"teacher": good["teacher"] | {"counts": [n + 1 for n in good["teacher"]["counts"]]}}, "different counts"),
        ({"student": good["student"] | {"counts": [0.0] * len(good["student"]["counts"])}}, "no positions"),
        ({"student": good["student"] | {"counts": [1.0]}}, "measures of other windows"),
        ({"student": good["student"] | {"bins": [[[1.0]]]}}, "bins of shape"),
        ({"teacher": good["teacher"] | {"counts": [math.nan] * len(good["student"]["counts"])}}, "not finite"),
    ):
        with pytest.raises(StreamError, match=message):
            Evaluation.from_json(good | change)
    with pytest.raises(StreamError, match="expected what `Evaluation"):
        Evaluation.from_json([1])


def test_a_student_is_left_as_it_was(cache: Cache) -> None:
    student = Student(1).train()
    student.model.dropout.eval()
    before = {name: module.training for name, module in student.named_modules()}
    first, second = (evaluate(student, cache, max_positions=200) for _ in range(2))
    assert first.student.to_json() == second.student.to_json()
    assert {name: module.training for name, module in student.named_modules()} == before
    assert first.positions_per_second > 0


def test_a_wider_lm_head_is_accepted(cache: Cache) -> None:
    """Additional outcomes without probability change nothing."""
    model = Causal(seed=1).eval()

    def padded(batch: MicroBatch) -> Tensor:
        return torch.nn.functional.pad(dense(model)(batch), (0, 7), value=-math.inf)

    plain, wide = evaluate(dense(model), cache), evaluate(padded, cache)
    for name, value in plain.intervals().items():
        assert wide.intervals()[name] == pytest.approx(tuple(value), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda b: torch.zeros(b.count, VOCAB - 1), "student: got logits of shape"),
        (lambda b: torch.zeros(b.count + 1, VOCAB), "student: got logits of shape"),
        (lambda b: [1.0], "student: got logits of shape list"),
        (lambda b: torch.full((b.count, VOCAB), math.nan), "cross-entropy is not finite at .* the first in window 0"),
        ("a name", "student: got str; expected a module"),
    ],
)
def test_bad_students_are_named(cache: Cache, student: Any, message: str) -> None:
    with pytest.raises(StreamError, match=message):
        evaluate(student, cache)


def test_empty_splits_are_named(cache: Cache, tmp_path: Path) -> None:
    student = dense(Causal().eval())
    with pytest.raises(StreamError, match="captured with held_out=0"):
        evaluate(student, make_cache(tmp_path / "a", held_out=0.0))
    with pytest.raises(StreamError, match="max_positions"):
        evaluate(student, cache, max_positions=1)
    with pytest.raises(StreamError, match="mixture"):
        evaluate(student, [(cache, 1.0)])
    spec = make_spec()
    with create_cache(tmp_path / "b", spec) as writer:
        shard = make_shard(spec, 12, sequences=1, uncounted=0) | {"sequence_lengths": [1] * 12}
        writer.write_shard(0, **shard | {"inputs": {"tokens": np.arange(12)}})
    with pytest.raises(StreamError, match="in which no position counts"):
        evaluate(student, tmp_path / "b", split="train")


def test_made_up_caches(tmp_path: Path) -> None:
    """Windows whose rows partly do not count, and a split that is all."""
    cache = make_cache(tmp_path / "c", draws=3, planned=False)
    expected: dict[tuple[int, int], int] = {}
    for row in reference(cache).values():
        expected[row.sequence] = expected.get(row.sequence, 0) + (row.label != -100)
    found = evaluate(lambda b: torch.zeros(b.count, 2000), cache, split="train")
    assert found.student.counts.tolist() == [n for _, n in sorted(expected.items())]
    assert found.windows == sum(n > 0 for n in expected.values())
    # a uniform student
    assert found.intervals()["cross_entropy"] == pytest.approx((math.log(2000), 0.0), abs=1e-5)
    # its tokens are the numbers of its rows, which a head of 500 does not have
    with pytest.raises(StreamError, match=r"labels up to \d+"):
        evaluate(lambda b: torch.zeros(b.count, 500), cache, split="train")


@pytest.mark.gpu
def test_a_gpu_measures_the_same(cache: Cache) -> None:
    on_cpu, on_gpu = evaluate(Student(1), cache), evaluate(Student(1).cuda(), cache)
    for name, value in on_cpu.intervals().items():
        assert on_gpu.intervals()[name] == pytest.approx(tuple(value), rel=1e-3, abs=1e-4)
    assert on_gpu.device == torch.cuda.get_device_name()
