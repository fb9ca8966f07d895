"""Each source against `BatchSourceTests`; seeking in mixtures; steps on devices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from source_cases import BatchSourceTests, ToySource, take
from stream_cases import bits, make_cache

from fastkd import DistillLoader
from fastkd.cache import Cache
from fastkd.stream import CachedSource


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("cache") / "c", draws=3)


class TestToySource(BatchSourceTests):
    def source(self) -> ToySource:
        return ToySource()

    def other(self) -> ToySource:
        return ToySource(seed=1)


class TestCachedSource(BatchSourceTests):
    @pytest.fixture(autouse=True, params=[{"batch_size": 9}, {"batch_tokens": 150, "shards_open": 3}], ids=str)
    def _settings(self, cache: Cache, request: pytest.FixtureRequest) -> None:
        self.cache, self.settings = cache, request.param

    def source(self, **changes: Any) -> CachedSource:
        return CachedSource(self.cache, **{**self.settings, **changes})

    def other(self) -> CachedSource:
        return self.source(seed=1)


def test_the_loader_is_the_cached_source() -> None:
    assert DistillLoader is CachedSource


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("by", [{"batch_size": 5}, {"batch_tokens": 60}])
def test_a_mixture_seeks(cache: Cache, tmp_path: Path, by: Any, shuffle: bool) -> None:
    """To any step of any epoch; its epochs begin anywhere in those of its caches."""
    other = make_cache(tmp_path / "other", seed=1, first_token=10_000, documents=17)

    def new() -> CachedSource:
        return CachedSource([(cache, 2), (other, 1)], **by, shards_open=3, shuffle=shuffle)

    loader, found = new(), []
    states = [loader.state_dict()]
    for step in loader.steps(epochs=3):
        found.append((step.epoch, step.number, bits(step)))
        states.append(loader.state_dict())
    sought = new()
    for (epoch, number, _), before in zip(found, states, strict=False):
        sought.seek(epoch, number)
        assert number == 0 or sought.state_dict() == before
    for epoch, number, expected in found[::7]:
        sought.seek(epoch, number)
        assert bits(take(sought, 1)[0]) == expected


def test_seeking_decodes_nothing_and_reads_few_lengths(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = CachedSource(cache, batch_tokens=60, shards_open=2)
    asked: set[int] = set()
    lengths = Cache.sequence_lengths

    def counted(self: Cache, index: int) -> Any:
        asked.add(index)
        return lengths(self, index)

    monkeypatch.setattr(Cache, "sequence_lengths", counted)
    monkeypatch.setattr(Cache, "read_shard", None)
    loader.seek(3, 4)
    assert len(asked) < 9  # two at each of a few places of the bisection


def test_steps_move() -> None:
    step = take(ToySource(), 1)[0]
    there = step.to("meta")
    assert {t.device.type for batch in there.micro_batches for t in batch.tensors()} == {"meta"}
    assert there.micro_batches[0].targets.vocab_size == 20
    assert (there.count, there.positions, there.epoch, there.number) == (12, 15, 0, 0)
    assert step.micro_batches[0].device.type == "cpu"
    assert bits(step.to("cpu")) == bits(step)


def test_a_step_is_pinned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of every micro-batch, those of the targets among them."""
    step = take(ToySource(), 1)[0]
    pinned: list[int] = []

    def pin(self: torch.Tensor) -> torch.Tensor:
        pinned.append(self.data_ptr())
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    there = step.pin_memory()
    assert sorted(pinned) == sorted(t.data_ptr() for batch in step.micro_batches for t in batch.tensors())
    assert bits(there) == bits(step)


@pytest.mark.gpu
def test_a_pinned_step_goes_to_a_gpu() -> None:
    step = take(ToySource(), 1)[0]
    pinned = step.pin_memory()
    assert all(t.is_pinned() for batch in pinned.micro_batches for t in batch.tensors())
    there = pinned.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert bits(there) == bits(step)
