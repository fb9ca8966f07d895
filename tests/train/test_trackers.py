"""TensorBoard and Weights & Biases are told what metrics.jsonl is told, where they are installed."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from train_cases import SMALL, Tiny, make_cache

import fastkd
from fastkd.cache import Cache
from fastkd.cli import main as cli
from fastkd.errors import TrainError
from fastkd.train.metrics import read_metrics, scalars
from fastkd.utils.signals import Stop

CHANGES: dict[str, Any] = SMALL | {"evaluate_every": 5}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("trackers") / "cache")


class Told:
    """Both packages, as far as they are used here: what they are told, by folder."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.scalars: dict[tuple[str, int], float] = {}
        self.open = 0

    def begin(self, **options: Any) -> "Told":
        self.begun.append(options)
        self.open += 1
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def log(self, values: dict[str, float], step: int) -> None:
        self.scalars |= {(name, step): value for name, value in values.items()}

    def close(self) -> None:
        self.open -= 1

    finish = close


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told()
    modules: dict[str, Any] = {n: ModuleType(n) for n in ("tensorboard", "torch.utils.tensorboard", "wandb")}
    modules["torch.utils.tensorboard"].SummaryWriter = found.begin
    modules["wandb"].init = found.begin
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def expected(run: Path) -> dict[tuple[str, int], float]:
    return {(n, line["step"]): value for line in read_metrics(run) for n, value in scalars(line).items()}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_the_scalars_are_those_of_the_log(cache: Cache, tmp_path: Path, told: Told, name: str) -> None:
    stop = Stop()
    stop()
    # stopped after a step, and gone on with; its control beside it
    assert fastkd.train(Tiny(), cache, tmp_path, stop=stop, log=name, **CHANGES).status == 75
    assert fastkd.train(Tiny(), cache, tmp_path, log=name, **CHANGES).complete
    assert told.open == 0
    assert told.scalars == expected(tmp_path)
    names = {name for name, _ in told.scalars}
    assert {"train/loss", "train/hard", "train/soft", "train/rate", "held_out/kl_bucket"} <= names
    assert [step for name, step in told.scalars if name == "held_out/cross_entropy"] == [5, 10]
    if name == "tensorboard":
        assert [begun["purge_step"] for begun in told.begun] == [1, 2]
        assert told.begun[0]["log_dir"] == str(tmp_path / "tensorboard")
    else:
        assert told.begun[0] == told.begun[1]
        assert told.begun[0]["resume"] == "allow"


def test_each_arm_of_a_sweep_has_its_own(cache: Cache, tmp_path: Path, told: Told) -> None:
    fastkd.sweep(Tiny(), cache, tmp_path, {"alpha": [0, 1]}, seeds=1, log="wandb", **CHANGES)
    assert told.open == 0
    assert len({begun["id"] for begun in told.begun}) == len(told.begun) == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_said_before_anything_is_done(
    cache: Cache, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrainError, match=f"log: got '{name}', which is not installed .*pip install {name}"):
        fastkd.train(Tiny(), cache, tmp_path / "run", log=name, **CHANGES)
    assert not (tmp_path / "run").exists()
    train = ["--student", "train_cases:tiny", "--cache", cache.store.describe(), "--out", str(tmp_path / "run")]
    assert cli.main(["train", *train, "--log", name]) == 1
    assert f"pip install {name}" in capfd.readouterr().err
    with pytest.raises(TrainError, match="log: got 'paper'; expected one of none, tensorboard, wandb"):
        fastkd.train(Tiny(), cache, tmp_path / "run", log="paper", **CHANGES)


def test_the_real_tensorboard(cache: Cache, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fastkd.train(Tiny(), cache, tmp_path, log="tensorboard", **CHANGES)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {(n, event.step): event.value for n in read.Tags()["scalars"] for event in read.Scalars(n)}
    assert found == pytest.approx(expected(tmp_path), rel=1e-6)
