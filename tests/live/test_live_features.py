"""Live features = cached features: the same codes at the same positions, alone and written to a cache on the way."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_cases import documents
from live_cases import IMAGES, TEXT, image_teacher, text_data, text_teacher
from train_cases import Tiny
from vision_cases import examples

import fastkd
from fastkd.cache import open_cache
from fastkd.cache.stores import MemoryStore
from fastkd.errors import DataError, TrainError
from fastkd.live.planned import plan_shards
from fastkd.live.source import LiveSource
from fastkd.live.write_through import WriteThrough
from fastkd.settings import CaptureSettings, LiveSettings
from fastkd.stream import CachedSource

FEATURES = ("1", "-1")


def sources(out: Path, data: Any, teacher: Any, settings: CaptureSettings, **options: Any) -> tuple[Any, Any, Any]:
    """A cached, a live and a written source with the same features."""
    fastkd.capture(teacher, data, out, settings)
    more = {"data": data} if settings.features[0] == "convolution" else {}
    cached = CachedSource(out, features=settings.features, **more, **options)
    planned = plan_shards(data, teacher, settings)
    written = WriteThrough.open(planned, teacher, MemoryStore(), features=settings.features)
    live = LiveSource(planned, teacher, features=written.features, **options)
    return cached, live, LiveSource(planned, teacher, write_cache=written, features=written.features, **options)


@pytest.mark.parametrize(("layout", "positions"), [("packed", "all"), ("padded", "0.5")])
def test_states_are_those_of_the_cache(tmp_path: Path, layout: str, positions: str) -> None:
    settings = replace(TEXT, features=FEATURES, feature_positions=positions, overlap=3)
    options: dict[str, Any] = {"layout": layout, "batch_tokens": 90, "micro_tokens": 45}
    cached, live, written = sources(tmp_path, text_data(), text_teacher(hidden=True), settings, **options)
    found = 0
    for ours, read, theirs in zip(live, written, cached, strict=True):
        for a, b, c in zip(ours.micro_batches, read.micro_batches, theirs.micro_batches, strict=True):
            assert a.counts.keys() - {"rows/numbers"} == b.counts.keys() == c.counts.keys()
            assert {name: a.counts[name] for name in c.counts} == dict(c.counts)
            for x, y in zip(b.tensors(), c.tensors(), strict=True):
                assert torch.equal(x, y), "a written cache is read as any cache"
            for name in FEATURES:
                one, other = a.features[name], c.features[name]
                for field in ("codes", "exact_rows", "exact", "index"):
                    assert torch.equal(getattr(one, field), getattr(other, field))
                assert torch.equal(one.states(), other.states())
                found += len(a.features[name])
    assert found > 300


def test_maps_are_those_of_the_cache(tmp_path: Path) -> None:
    settings = replace(IMAGES, features=("convolution",))
    cached, live, written = sources(tmp_path, examples(), image_teacher(), settings, batch_size=9, micro_tokens=14)
    for ours, read, theirs in zip(live, written, cached, strict=True):
        for a, b, c in zip(ours.micro_batches, read.micro_batches, theirs.micro_batches, strict=True):
            one, other, third = (batch.features["convolution"] for batch in (a, b, c))
            assert torch.equal(one.index, third.index)
            assert torch.equal(other.codes, third.codes)
            # convolutions of other batches round in another way
            assert (one.states() - third.states()).abs().max() < 1.1 * third.step * third.scale.max()


def test_training_with_matched_states(tmp_path: Path) -> None:
    teacher = text_teacher(hidden=True)
    student, changes = Tiny(seed=1, vocab=97), {
        "batch_tokens": 90, "micro_tokens": 45, "steps": 4, "rate": 0.01, "evaluate_every": 0,
        "match": ("1:1:mse:0.1",),
    }  # fmt: skip
    kept = {name: getattr(TEXT, name) for name in ("k", "draws", "context", "shard_positions", "held_out")}
    settings = LiveSettings(**kept, teacher_batch_tokens=40)
    fastkd.capture(teacher, text_data(), tmp_path / "cache", TEXT, features=("1",))
    fastkd.train(student, tmp_path / "cache", tmp_path / "cached", **changes)

    def train(run: str, **more: Any) -> Any:
        return fastkd.train(
            student, None, tmp_path / run, teacher=teacher, data=text_data(), live=settings, **changes | more
        )

    live = train("live")
    again = train("again", write_cache=tmp_path / "written")
    from fastkd.train.metrics import read_metrics

    name = "hidden/1:1:mse"
    ours, theirs, read = (read_metrics(tmp_path / run) for run in ("live", "cached", "again"))
    for a, b, c in zip(ours, theirs, read, strict=True):
        assert a[name] == pytest.approx(b[name], rel=1e-3)
        assert c["loss"] == b["loss"]
    assert live.complete
    assert again.complete
    assert set(open_cache(tmp_path / "written").features) == {"1"}
    with pytest.raises(TrainError, match=r"match: got auto without a cache"):
        train("auto", match=("auto",))
    with pytest.raises(DataError, match=r"feature_step: got 0\.3 without features"):
        fastkd.train(
            student, None, tmp_path / "none", teacher=teacher, data=documents(),
            live=replace(settings, feature_step=0.3), **changes | {"match": ()},
        )  # fmt: skip
