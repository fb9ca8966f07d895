"""The held-out split is never lost unnoticed: a plan that is damaged, missing or another one's, and missing shards."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import train_cases
from train_cases import SMALL, Tiny, make_cache

import fastkd
from fastkd.cache import CacheError, CacheSpec, open_cache, verify_cache
from fastkd.cache.capture_plan import CapturePlan, read_capture_plan
from fastkd.cache.manifest import read_spec
from fastkd.cache.stores import MemoryStore
from fastkd.cli.main import main
from fastkd.data.lengths import lengths_from_npz, lengths_to_npz
from fastkd.errors import DataError, StreamError
from fastkd.evaluate.api import evaluate
from fastkd.stream.split import has_held_out, plan_of

SHORT: dict[str, Any] = {**SMALL, "steps": 1, "evaluate_every": None}


def without_hash(plan: bytes) -> bytes:
    """plan.json as older versions wrote it."""
    document = json.loads(plan)
    del document["content_sha256"]
    return json.dumps(document, indent=2).encode() + b"\n"


def flips(data: bytes) -> list[bytes]:
    return [
        data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        for place in range(len(data))
        for bit in range(8)
    ]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured") / "cache"
    make_cache(folder)
    return folder


@pytest.fixture
def cache(captured: Path, tmp_path: Path) -> Path:
    shutil.copytree(captured, tmp_path / "cache")
    return tmp_path / "cache"


def split_of(plan: CapturePlan | None) -> tuple[int, int]:
    assert plan is not None
    return plan.train_shards, plan.shards


def in_memory(folder: Path, plan: bytes) -> MemoryStore:
    """A store with what the plan of a cache is checked with."""
    store = MemoryStore()
    for name in ("spec.json", "lengths.npz", "manifest.parquet"):
        store.create(name, (folder / name).read_bytes())
    store.create("plan.json", plan)
    return store


def test_each_flipped_bit_of_a_plan_is_noticed(captured: Path) -> None:
    good = (captured / "plan.json").read_bytes()
    spec, truth = read_spec(in_memory(captured, good)), CapturePlan.from_json(good)
    assert 0 < truth.train_shards < truth.shards
    noticed = 0
    for bad in flips(good):
        try:
            # white space, or the name of the hash's member
            assert read_capture_plan(in_memory(captured, bad), spec) == truth
        except CacheError as error:
            assert "plan.json" in str(error)
            assert "Restore it" in str(error)
            noticed += 1
    assert noticed > 0.8 * 8 * len(good)


def test_each_flipped_bit_of_a_plan_of_an_older_version_is_noticed_or_changes_no_split(captured: Path) -> None:
    good = without_hash((captured / "plan.json").read_bytes())
    truth = CapturePlan.from_json(good)
    assert not truth.hashed
    noticed, train_shards = 0, good.index(b'"train_shards": ') + 16
    spec = read_spec(in_memory(captured, good))
    for number, bad in enumerate(flips(good)):
        there: Any = SimpleNamespace(store=in_memory(captured, bad), spec=spec)
        try:
            assert split_of(plan_of(there)) == split_of(truth)
        except CacheError as error:
            assert "plan.json" in str(error)
            noticed += 1
        else:
            assert number // 8 != train_shards
    assert noticed > 0.5 * 8 * len(good)


def test_a_plan_of_an_older_version_without_lengths_is_taken_with_a_warning(cache: Path) -> None:
    plan = without_hash((cache / "plan.json").read_bytes())
    (cache / "plan.json").write_bytes(plan)
    assert has_held_out(open_cache(cache))  # checked by the lengths
    assert verify_cache(cache).ok
    (cache / "lengths.npz").unlink()
    with pytest.warns(UserWarning, match=r"cannot be checked .*: shards from \d+ on are taken as held out"):
        assert split_of(plan_of(open_cache(cache))) == split_of(CapturePlan.from_json(plan))


def test_lengths_that_multiply_are_not_read(captured: Path) -> None:
    """A kilobyte of zeros takes gigabytes."""
    plan = CapturePlan.from_json((captured / "plan.json").read_bytes())
    with pytest.raises(DataError, match=r"got 40000\d+ bytes for 60 documents"):
        lengths_from_npz(
            lengths_to_npz(np.zeros(10**7, np.int32), plan.dataset), plan.dataset, "there", plan.totals["documents"]
        )


def test_the_plan_of_another_capture_is_refused(cache: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "other", held_out=0.5)
    shutil.copy(tmp_path / "other" / "plan.json", cache / "plan.json")
    with pytest.raises(
        CacheError, match=r"plan\.json: sha256: got '[0-9a-f]{64}'; expected '[0-9a-f]{64}', as in spec"
    ):
        plan_of(open_cache(cache))


def train(cache: Path, **changes: Any) -> Any:
    return fastkd.train(Tiny(seed=1), cache, cache.parent / "run", **{**SHORT, **changes})


READERS: dict[str, Callable[[Path], Any]] = {
    "train": train,
    "train, not evaluated": lambda cache: train(cache, evaluate_every=0),
    "sweep": lambda cache: fastkd.sweep(Tiny(seed=1), cache, cache.parent / "sweep", {"alpha": [0.5]}, **SHORT),
    "loader": lambda cache: fastkd.DistillLoader(cache, batch_size=2),
    "loader, held out": lambda cache: fastkd.DistillLoader(cache, batch_size=2, split="held_out"),
    "evaluate": lambda cache: evaluate(Tiny(seed=1), cache),
    "allow_partial": lambda cache: fastkd.DistillLoader(cache, batch_size=2, allow_partial=True),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", ["flipped", "deleted", "older, flipped"])
def test_no_reader_takes_a_cache_whose_plan_is_damaged(reader: str, damage: str, cache: Path) -> None:
    path = cache / "plan.json"
    good = without_hash(path.read_bytes()) if damage.startswith("older") else path.read_bytes()
    place = good.index(b'"train_shards": ') + 16
    path.write_bytes(good[:place] + bytes([good[place] ^ 2]) + good[place + 1 :])
    assert json.loads(path.read_bytes())["train_shards"] != json.loads(good)["train_shards"]
    if damage == "deleted":
        path.unlink()
    with pytest.raises(CacheError, match=r"plan\.json"):
        READERS[reader](cache)
    assert not (cache.parent / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("damage", ["flipped", "deleted", "older, flipped"])
def test_verify_and_capture_name_the_damage_and_capture_writes_the_plan_again(
    damage: str, cache: Path, capfd: Any
) -> None:
    path, whole = cache / "plan.json", (cache / "plan.json").read_bytes()
    good = without_hash(whole) if damage.startswith("older") else whole
    place = good.index(b'"train_shards": ') + 16
    path.write_bytes(good[:place] + bytes([good[place] ^ 2]) + good[place + 1 :])
    if damage == "deleted":
        path.unlink()
    assert main(["verify", str(cache), "--deep"]) == 1
    assert "plan.json" in capfd.readouterr().out
    if damage != "deleted":
        with pytest.raises(CacheError, match=r"plan\.json.*Delete it; it is written again from the same data"):
            make_cache(cache)
        path.unlink()
    make_cache(cache)
    assert path.read_bytes() == whole
    assert main(["verify", str(cache)]) == 0


def test_a_missing_held_out_shard_is_an_error_where_it_is_needed(cache: Path) -> None:
    plan = plan_of(open_cache(cache))
    assert plan is not None
    shards = [plan.train_shards, plan.shards - 1]
    (cache / "manifest.parquet").unlink()
    for shard in shards:
        (cache / "shards" / f"{shard}.zarr.zip").unlink()
    message = r"of the \d+ shards of this split (are|is) missing .* the first is " + str(shards[0])
    for name in ("train", "sweep", "loader, held out", "evaluate"):
        with pytest.raises(StreamError, match=message):
            READERS[name](cache)
    READERS["loader"](cache)
    READERS["train, not evaluated"](cache)
    shutil.rmtree(cache.parent / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(cache, allow_partial=True).evaluation


def test_a_held_out_shard_that_is_missing_from_a_sealed_cache_is_named(cache: Path) -> None:
    plan = plan_of(open_cache(cache))
    assert plan is not None
    (cache / "shards" / f"{plan.train_shards}.zarr.zip").unlink()
    for reader in ("train", "sweep", "evaluate"):
        with pytest.raises(CacheError, match=f"shard {plan.train_shards}: .* has none of this number"):
            READERS[reader](cache)
    READERS["train, not evaluated"](cache)


def test_without_a_held_out_split_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", held_out=0.0)
    assert not has_held_out(open_cache(tmp_path / "cache"))
    assert train(tmp_path / "cache").evaluation == {}


def test_a_plan_of_too_many_shards_is_refused(captured: Path) -> None:
    plan = CapturePlan.from_json((captured / "plan.json").read_bytes())
    many = CapturePlan(plan.settings, plan.dataset, {"shards": 10**9}, plan.train_shards, plan.sha256)
    with pytest.raises(CacheError, match=r"totals\.shards: got 1000000000; expected"):
        CapturePlan.from_json(many.to_json())


def test_a_cache_without_a_plan_in_its_spec_is_read_without_one() -> None:
    """Written by hand, with create_cache."""
    assert read_capture_plan(MemoryStore(), CacheSpec(vocab_size=train_cases.VOCAB, k=1)) is None
