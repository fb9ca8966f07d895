"""Live = cached: the same steps, ids and draws, values to 1e-6 of what a capture makes before the codec."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_cases import (
    IMAGES,
    TEXT,
    both,
    image_teacher,
    same_steps,
    text_data,
    text_teacher,
    uncoded,
)
from source_cases import BatchSourceTests
from vision_cases import examples

from fastkd.errors import StreamError, TeacherError
from fastkd.kernels import kd_loss
from fastkd.live import LiveSource, answer
from fastkd.settings import CaptureSettings
from fastkd.stream import BatchSource, CachedSource

CASES: dict[str, dict[str, Any]] = {
    "draws": {},
    "no draws": {"draws": 0},
    "draws alone": {"k": 0, "draws": 6, "draw_temperature": 1.5},
    "mass": {"mass": 0.7},
    "overlap": {"overlap": 5, "temperatures": (1.0, 2.0)},
    "kept": {"packing": "keep", "on_long": "truncate", "seed": 3},
}


def check(pairs: list[tuple[Any, Any]], expected: dict[int, Any]) -> None:
    rows = 0
    for live, cached in pairs:
        numbers = live.signals["rows/numbers"].numbers.tolist()
        assert len(numbers) == live.count == len(live.targets)
        for name, ours in live.targets.arrays().items() if numbers else ():
            theirs = np.stack([expected[number][name] for number in numbers])
            if ours.dtype.kind == "i":
                assert np.array_equal(ours, theirs)
            else:
                np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        # the codec orders equal codes by rank
        assert torch.equal(live.targets.ids.sort(1).values, cached.targets.ids.sort(1).values)
        rows += len(numbers)
    assert rows > 150


@pytest.mark.parametrize(
    ("name", "layout", "hidden", "buckets"),
    [(name, "padded", False, None) for name in CASES]
    + [("draws", "packed", False, None), ("overlap", "packed", False, (32,)), ("draws", "packed", True, None)]
    + [("mass", "padded", True, (8, 16))],
)
def test_live_targets_are_those_of_a_capture(
    tmp_path: Path, name: str, layout: str, hidden: bool, buckets: Any
) -> None:
    teacher, data, settings = text_teacher(hidden=hidden), text_data(), replace(TEXT, **CASES[name])
    sizes: dict[str, Any] = {"layout": layout, "batch_tokens": 90, "micro_tokens": 45, "buckets": buckets}
    live, cached = both(tmp_path, data, teacher, settings, **sizes)
    check(same_steps(live, cached, len(live) + 3), uncoded(live, teacher))


def test_examples_are_answered(tmp_path: Path) -> None:
    teacher, data = image_teacher(), examples()
    live, cached = both(tmp_path, data, teacher, IMAGES, batch_size=9, micro_tokens=14)
    pairs = same_steps(live, cached, 2 * len(live))
    check(pairs, uncoded(live, teacher))
    assert any(len(batch.inputs) > IMAGES.batch_tokens for batch, _ in pairs), "some are divided into two forwards"


@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_cache_that_is_written_is_read_as_any(tmp_path: Path, kind: str) -> None:
    images = kind == "images"
    teacher, data = (image_teacher(), examples()) if images else (text_teacher(), text_data())
    settings, options = (IMAGES, {"batch_size": 9}) if images else (TEXT, {"batch_tokens": 90, "layout": "packed"})
    _, cached = both(tmp_path / "cache", data, teacher, settings, **options)
    written = LiveSource(data, teacher, settings, write_cache=tmp_path / "written", **options)
    for ours, theirs in zip(written, cached, strict=True):
        for a, b in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            for x, y in zip(a.tensors(), b.tensors(), strict=True):
                assert torch.equal(x, y)


def test_gradients_differ_by_no_more_than_the_codec(tmp_path: Path) -> None:
    teacher, data = text_teacher(), text_data()
    fine = replace(TEXT, draws=0)
    live, cached = both(tmp_path, data, teacher, fine, batch_tokens=90)
    for ours, theirs in same_steps(live, cached, 4):
        logits = torch.randn(ours.count, 97, generator=torch.Generator().manual_seed(0))
        labels = ours.labels.flatten()[ours.targets.index]
        found = []
        for batch in (ours, theirs):
            student = logits.clone().requires_grad_()
            targets = replace(batch.targets, index=None)
            kd_loss(student, targets, labels, alpha=0.3, temperature=2.0).loss.backward()
            found.append(student.grad)
        # steps of 1/56 to 0.4 nats: half of one changes a probability by at most 20%, most of them by 1%
        assert 0 < (found[0] - found[1]).norm() < 0.02 * found[1].norm()


def test_without_a_teacher_micro_batches_come_unanswered(tmp_path: Path) -> None:
    teacher, data = text_teacher(), text_data()
    options = {"batch_tokens": 90, "micro_tokens": 45}
    live, plain = LiveSource(data, teacher, TEXT, **options), LiveSource(data, None, TEXT, vocab_size=97, **options)
    for ours, unanswered in zip(live, plain, strict=True):
        assert (ours.count, ours.number) == (unanswered.count, unanswered.number)
        for one, batch in zip(ours.micro_batches, unanswered.micro_batches, strict=True):
            assert batch.count == one.count == len(batch.targets)
            assert batch.targets.width == 0
            assert len(batch.signals["rows/numbers"].numbers) == batch.count
            with torch.inference_mode():
                said = teacher(batch.input_ids)
            made = answer(batch, said, TEXT)
            for x, y in zip(made.targets.tensors(), one.targets.tensors(), strict=True):
                assert torch.equal(x, y)


def test_a_micro_batch_that_is_taken_again_is_the_same(tmp_path: Path) -> None:
    teacher = text_teacher()
    step = next(LiveSource(text_data(), teacher, TEXT, batch_tokens=90, micro_tokens=45).steps())
    before = len(teacher.model.calls)
    assert len(step.micro_batches) > 1
    assert len(teacher.model.calls) == before, "nothing is answered before it is taken"
    first, (again, *_) = step.micro_batches[0], step.micro_batches
    assert len(teacher.model.calls) == before + 1 + len(step.micro_batches)
    for x, y in zip(first.tensors(), again.tensors(), strict=True):
        assert torch.equal(x, y)
    assert not any(x.is_inference() for x in first.tensors()), "a loss may keep them for its backward"


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_ranks_share_a_step(layout: str) -> None:
    teacher, data = text_teacher(), text_data()
    options: dict[str, Any] = {"batch_tokens": 90, "micro_tokens": 45, "layout": layout}
    whole = LiveSource(data, teacher, TEXT, **options)
    ranks = [
        LiveSource(data, teacher, TEXT, rank=rank, world_size=2, reduce=lambda mine: lambda: mine, **options)
        for rank in range(2)
    ]

    def numbers(step: Any) -> list[int]:
        return [n for batch in step.micro_batches for n in batch.signals["rows/numbers"].numbers.tolist()]

    for step, *parts in zip(whole, *ranks, strict=True):
        assert sorted(numbers(step)) == sorted(n for part in parts for n in numbers(part))


class TestLiveSource(BatchSourceTests):
    def source(self) -> BatchSource:
        return LiveSource(text_data(), text_teacher(), TEXT, batch_tokens=150)

    def other(self) -> BatchSource:
        return LiveSource(text_data(), text_teacher(seed=1), TEXT, batch_tokens=150)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"k": 4}, "k: 5 there, 4 here"), ({"seed": 1}, "data_seed: 0 there, 1 here"), ({"context": 12}, "context")],
)
def test_a_state_of_other_settings_names_them(changes: dict[str, Any], named: str) -> None:
    source = LiveSource(text_data(), text_teacher(), TEXT, batch_tokens=90)
    other = LiveSource(text_data(), text_teacher(), replace(TEXT, **changes), batch_tokens=90)
    with pytest.raises(StreamError, match=named):
        other.load_state_dict(source.state_dict())


def test_the_spec_is_that_of_the_cache(tmp_path: Path) -> None:
    live, cached = both(tmp_path, text_data(), text_teacher(), TEXT, batch_tokens=90)
    assert live.spec.hash == cached.described[0]["spec"]


def test_what_cannot_be_read_is_refused() -> None:
    data, teacher = text_data(), text_teacher()
    with pytest.raises(StreamError, match="vocab_size: got None without a teacher"):
        LiveSource(data, None, TEXT, batch_size=2)
    with pytest.raises(StreamError, match="no documents are held out"):
        LiveSource(data, teacher, replace(TEXT, held_out=0.0), batch_size=2, split="held_out")
    with pytest.raises(StreamError, match="skip: got 1000, which leaves nothing"):
        LiveSource(data, teacher, TEXT, batch_size=2, skip=1000)
    with pytest.raises(StreamError, match="data: got no labels"):
        LiveSource(examples(labels=None), image_teacher(), IMAGES, batch_size=2)


def test_a_teacher_that_fails_names_the_document() -> None:
    teacher = text_teacher()
    with torch.no_grad():
        teacher.model.embedding[5] = float("nan")
    steps = LiveSource(text_data(), teacher, TEXT, batch_tokens=90)
    with pytest.raises(TeacherError, match=r"document \d+, position \d+: the teacher failed there"):
        _ = [batch for step in steps for batch in step.micro_batches]


def test_a_cache_has_no_row_numbers(tmp_path: Path) -> None:
    _, cached = both(tmp_path, text_data(), text_teacher(), TEXT, batch_tokens=90)
    assert isinstance(cached, CachedSource)
    (batch, *_) = next(iter(cached)).micro_batches
    with pytest.raises(StreamError, match="got no row numbers"):
        answer(batch, None, CaptureSettings())  # type: ignore[arg-type]
