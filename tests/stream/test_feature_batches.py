"""Features in micro-batches: each position has the state of its own token, in any layout, order, mixture and rank."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vision_cases
from match_cases import add_feature
from stream_cases import bits, make_cache, ranks, tokens

from fastkd import DistillLoader
from fastkd.cache import Cache, open_cache
from fastkd.errors import StreamError
from fastkd.kernels import HiddenTargets
from fastkd.stream.batch import MicroBatch


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """No token occurs twice in it."""
    cache = make_cache(tmp_path_factory.mktemp("features") / "c", draws=3)
    add_feature(cache)
    add_feature(cache, "1", positions="0.5", width=5)
    return open_cache(cache.store)


def states_by_token(cache: Cache, name: str) -> dict[int, Any]:
    """The state of each token, NaN where none is stored."""
    found = {}
    for index in cache.shards:
        states = cache.features[name].read_shard(index)
        found |= dict(zip(cache.read_shard(index)["tokens"].tolist(), states, strict=True))
    return found


def check(batch: MicroBatch, name: str, expected: dict[int, Any]) -> int:
    """Every position against the state of its token; returns how many have one."""
    targets, states = batch.features[name], batch.features[name].states()
    assert targets.index is not None
    index = targets.index.tolist()
    assert index == sorted(set(index))
    at = dict(zip(index, states, strict=True))
    mask = batch.padding_mask().flatten().tolist()
    for position, token in enumerate(batch.input_ids.flatten().tolist()):
        if not mask[position] or np.isnan(expected[token]).any():
            assert position not in at
        else:
            np.testing.assert_allclose(at[position].numpy(), expected[token], rtol=1e-5, atol=1e-5 * targets.width)
    return len(index)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("limits", [{"micro_tokens": 50}, {"micro_tokens": None, "micro_batch_size": 2}])
def test_each_position_has_its_own_state(cache: Cache, layout: str, limits: Any) -> None:
    expected = {name: states_by_token(cache, name) for name in ("1", "2")}
    loader = DistillLoader(cache, batch_size=4, layout=layout, shards_open=3, features=("2", "1"), **limits)
    exact = 0
    for step in loader:
        counts = {"targets": step.count, "features/2": 0, "features/1": 0}
        for batch in step.micro_batches:
            for name in expected:
                counts[f"features/{name}"] += check(batch, name, expected[name])
            exact += len(batch.features["2"].exact_rows)
        assert all(batch.counts == counts for batch in step.micro_batches)
        assert counts["features/2"] == step.positions
        assert 0 < counts["features/1"] < step.positions
    assert exact > 5  # sinks
    shifted = [expected["2"][t + 1] for t in list(expected["2"])[:-1]]
    assert np.abs(np.array(shifted) - np.array(list(expected["2"].values()))[:-1]).mean() > 0.5  # would be noticed


def test_without_features_nothing_changes(cache: Cache) -> None:
    """The same steps and the same state; and the features come with the same micro-batches."""
    plain, with_features = (DistillLoader(cache, batch_size=4, features=names) for names in ((), ("2",)))
    assert "signals" not in plain.fingerprint
    for ours, theirs in zip(with_features, plain, strict=True):
        assert tokens(ours) == tokens(theirs)
        for a, b in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert not b.signals
            assert b.counts == {"targets": theirs.count}
            for x, y in zip(a.tensors(), b.tensors(), strict=False):
                assert torch.equal(x, y)
    assert with_features.memory > plain.memory
    with pytest.raises(StreamError, match=r"state: it is of a loader with other settings: signals: .*features/2"):
        plain.load_state_dict(with_features.state_dict())


def test_ranks_and_resume(cache: Cache) -> None:
    """Another number of ranks resumes with the same rows, and all ranks know the count of the whole step."""
    settings: dict[str, Any] = {"batch_size": 7, "shards_open": 4, "micro_tokens": 40, "features": ("1", "2")}
    expected = states_by_token(cache, "1")
    alone, end = ranks(cache, 1, **settings)
    first, state = ranks(cache, 2, stop=2, **settings)
    for world_size in (1, 3):
        rest, after = ranks(cache, world_size, state, **settings)
        assert after == end
        for shares, (whole,) in zip([*first, *rest], alone, strict=True):
            batches = [batch for share in shares for batch in share.micro_batches]
            assert all(batch.counts == whole.micro_batches[0].counts for batch in batches)
            found = sum(check(batch, "1", expected) for batch in batches if batch.positions)
            assert found == whole.micro_batches[0].counts["features/1"]
            assert all(not len(batch.features["2"]) for batch in batches if not batch.positions)
    again = DistillLoader(cache, **settings)
    again.seek(0, 2)
    assert [bits(step) for step in again] == [bits(whole) for (whole,) in alone[2:]]


def test_mixtures_share_a_basis(cache: Cache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", seed=1, first_token=10_000)
    mixture = [(cache, 3), (other, 1)]
    with pytest.raises(StreamError, match=r"features: got '2', and .*other.* has none\. Run its capture .* --features"):
        DistillLoader(mixture, batch_size=6, features=("2",))
    add_feature(other, basis=cache.features["2"].basis)
    expected = states_by_token(cache, "2") | states_by_token(open_cache(other.store), "2")
    loader = DistillLoader([(cache, 3), (open_cache(other.store), 1)], batch_size=6, features=("2",))
    assert sum(check(batch, "2", expected) for step in loader for batch in step.micro_batches) > 300
    third = make_cache(tmp_path / "third", seed=2, first_token=20_000)
    add_feature(third, step=0.02)
    with pytest.raises(
        StreamError, match=r"features: got '2' with (step|basis) .* expected the same settings and basis"
    ):
        DistillLoader([(cache, 3), (open_cache(third.store), 1)], batch_size=6, features=("2",))


def test_examples(tmp_path: Path) -> None:
    """Maps have a vector for each pixel, those of an example together."""
    cache = vision_cases.make_cache(tmp_path / "cache")

    def maps(arrays: Any) -> Any:
        # what the augmentation makes of a seed, so that equal pictures have equal maps
        numbers = np.stack([arrays["example"], arrays["augmentation_seed"] % 36], 1).astype(np.float64)
        angles = np.arange(5 * 4 * 4) * 0.37 + (numbers @ [1.3, 0.7])[:, None]
        return np.sin(angles).reshape(-1, 5, 4, 4).astype(np.float32) + 0.2

    add_feature(cache, "convolution", shape=(5, 4, 4), values=maps)
    add_feature(cache, "convolution:at", shape=(4, 4), values=lambda a: np.square(maps(a)).mean(1))
    cache = open_cache(cache.store)
    whole = {
        (int(e), int(s)): one
        for i in cache.shards
        for e, s, one in zip(
            *(cache.read_shard(i)[n] for n in ("example", "augmentation_seed")),
            cache.features["convolution"].read_shard(i),
            strict=True,
        )
    }
    data = vision_cases.examples()
    pixels = {data.read(np.array([e]), np.array([s])).numpy().tobytes(): one for (e, s), one in whole.items()}
    names = ("convolution", "convolution:at")
    for step in DistillLoader(cache, data=data, batch_size=9, micro_tokens=8, features=names):
        for batch in step.micro_batches:
            targets, energy = (batch.features[name] for name in names)
            assert targets.index is not None
            assert targets.index.tolist() == list(range(16 * batch.positions))
            assert len(energy) == batch.positions
            found = targets.states().reshape(-1, 4, 4, 5).permute(0, 3, 1, 2)
            for picture, ours, at in zip(batch.inputs, found, energy.states(), strict=True):
                expected = pixels[picture.numpy().tobytes()]
                np.testing.assert_allclose(ours.numpy(), expected, atol=1e-4)
                np.testing.assert_allclose(at.numpy().reshape(4, 4), np.square(expected).mean(0), atol=0.03)
        assert batch.counts["features/convolution"] == 16 * step.positions
        assert batch.counts["features/convolution:at"] == step.positions


def test_moving_a_micro_batch_moves_its_features(cache: Cache) -> None:
    batch = next(iter(DistillLoader(cache, batch_size=4, features=("2",)))).micro_batches[0]
    moved = batch.to("meta")
    assert {x.device.type for x in moved.tensors()} == {"meta"}
    assert moved.counts == batch.counts
    assert isinstance(moved.features["2"], HiddenTargets)
    assert len(batch.tensors()) == len(DistillLoader(cache, batch_size=4)._form.empty().tensors()) + 7


def test_refusals(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"features: got '7', and .* has 1, 2\. Run its capture again .*--features 7"):
        DistillLoader(cache, batch_size=4, features=("7",))
    with pytest.raises(StreamError, match=r"features: got '2' twice"):
        DistillLoader(cache, batch_size=4, features=("2", "2"))
    part = make_cache(tmp_path / "part")
    add_feature(part, leave_out=(1, 4))
    with pytest.raises(StreamError, match=r"features: 2 of the 13 shards of '2' in .* are missing \(the first is 1\)"):
        DistillLoader(open_cache(part.store), batch_size=4, features=("2",))


def test_another_cache_or_plan_is_refused(tmp_path: Path) -> None:
    """A feature that was copied from a cache of other settings; shards that were captured again, by another plan."""
    cache = make_cache(tmp_path / "a")
    add_feature(cache)
    other = make_cache(tmp_path / "b", k=5)
    shutil.copytree(tmp_path / "a" / "features", tmp_path / "b" / "features")
    with pytest.raises(
        StreamError, match=r"features: '2' of .* cannot be read \(.*it belongs to a cache of other settings"
    ):
        DistillLoader(open_cache(other.store), batch_size=4, features=("2",))
    make_cache(tmp_path / "c", first_token=7)
    shutil.copytree(tmp_path / "a" / "features", tmp_path / "c" / "features")
    with pytest.raises(
        StreamError, match=r"features: shard 0 of '2' in .* of another shard .*\(13 such shards.* by another plan"
    ):
        DistillLoader(tmp_path / "c", batch_size=4, features=("2",))
