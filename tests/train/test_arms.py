"""What is trained beside a student that matches features, and what is said of their help."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from match_cases import add_feature
from torch import Tensor, nn
from train_cases import SMALL, Tiny, bits, make_cache

import fastkd
from fastkd.cache import Cache
from fastkd.cli.main import main
from fastkd.evaluate.api import Evaluation, compare
from fastkd.report.make import make_report
from fastkd.settings import TrainSettings
from fastkd.train import arms
from fastkd.train.arms import control_arms, without_features
from fastkd.train.objective import TokenKD, WeightedSum
from fastkd.train.result import report_of
from fastkd.train.verdict import EVEN, HELPED, HURT, verdict
from fastkd.utils.signals import Stop

ARMS = ("without_features", "control")


class Pull(nn.Module):
    """Stands for a loss on features, with a parameter of its own."""

    signals = ("features/5", "targets")
    outputs = ("states",)

    def __init__(self) -> None:
        super().__init__()
        self.wanted = nn.Parameter(torch.zeros(12))

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {}

    def losses(self, batch: Any, outputs: Any, *, num_items: Any) -> dict[str, Tensor]:
        return {"loss": (outputs["states"] - self.wanted).square().mean(1).sum() / num_items}

    def describe(self) -> dict[str, Any]:
        return {}


class Penalty(Pull):
    """A term with a parameter that reads no features."""

    signals = ("targets",)


def both() -> WeightedSum:
    return WeightedSum({"kd": TokenKD(), "pull": Pull()}, {"pull": 3.0})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("cache") / "c")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of these tests have no features."""
    monkeypatch.setattr(Pull, "signals", ("targets",))
    monkeypatch.setattr(arms, "reads_features", lambda objective: type(objective) is Pull)


def test_with_features_of_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make_cache(tmp_path / "cache")
    add_feature(cache, "2")
    given = ["train", "--student", "train_cases:tiny", "--cache", str(tmp_path / "cache"), "--steps", "4", "--control",
             "--batch-tokens", "60", "--rate", "0.01", "--device", "cpu"]  # fmt: skip
    assert main([*given, "--out", str(tmp_path / "run"), "--match", "2:2:mse:5", "--json"]) == 0
    *events, report = map(json.loads, capsys.readouterr().out.splitlines())
    assert [e["text"].partition(":")[0] for e in events if e["event"] == "note" and "now the same" in e["text"]] == [
        "now the same student without the features that it matches", "now the same student on hard labels alone",
    ]  # fmt: skip
    assert {n: one["verdict"] in (HELPED, HURT, EVEN) for n, one in report["verdicts"].items()} == dict.fromkeys(
        ARMS, True
    )
    settings = {n: json.loads((tmp_path / "run" / n / "run.json").read_text())["settings"] for n in ("", *ARMS)}
    assert {n: (one["match"], one["alpha"]) for n, one in settings.items()} == {
        "": (["2:2:mse:5"], 0.5), "without_features": ([], 0.5), "control": ([], 1.0),
    }  # fmt: skip
    # without features it is the run that never had any
    assert main([*given, "--out", str(tmp_path / "plain"), "--json"]) == 0
    assert bits(tmp_path / "plain", 4) == bits(tmp_path / "run" / "without_features", 4)
    assert bits(tmp_path / "plain" / "control", 4) == bits(tmp_path / "run" / "control", 4)
    assert not (tmp_path / "plain" / "without_features").exists()
    make_report([tmp_path / "run"])
    assert "Did the features help?" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.usefixtures("unread")
def test_which_arms() -> None:
    plain = TrainSettings(alpha=0.2)
    assert [arm.folder for arm in control_arms(plain, None)] == ["control"]
    assert [arm.folder for arm in control_arms(plain, TokenKD())] == ["control"]
    assert [arm.folder for arm in control_arms(plain, Pull())] == ["control"]  # nothing would be left to train on
    without, control = control_arms(plain, both())
    assert (without.folder, control.folder) == ("without_features", "control")
    assert without.settings == plain
    assert control.settings.alpha == 1.0
    assert control.objective is None


@pytest.mark.usefixtures("unread")
def test_terms_without_features_are_copied() -> None:
    inner = WeightedSum({"penalty": Penalty()})
    whole = WeightedSum({"kd": TokenKD(), "inner": inner, "pull": Pull()}, {"inner": 2.0})
    found = without_features(whole)
    assert isinstance(found, WeightedSum)
    assert list(found.terms) == ["kd", "inner"]
    assert found.weights == {"kd": 1.0, "inner": 2.0}
    assert [name for name, _ in found.named_parameters()] == ["term_modules.inner.term_modules.penalty.wanted"]
    assert next(found.parameters()) is not next(inner.parameters())
    assert without_features(WeightedSum({"kd": TokenKD()})) is None


@pytest.mark.usefixtures("unread")
def test_the_arm_without_features_is_the_training_without(cache: Cache, tmp_path: Path) -> None:
    report = fastkd.train(
        Tiny(seed=1), cache, tmp_path / "run", **(SMALL | {"evaluate_every": 5}), objective=both(), control=True
    )
    assert report.complete
    assert list(report.arms) == ["without_features", "control"]
    fastkd.train(Tiny(seed=1), cache, tmp_path / "alone", **SMALL, objective=WeightedSum({"kd": TokenKD()}))
    assert bits(tmp_path / "run" / "without_features", 10) == bits(tmp_path / "alone", 10)
    evaluations = [
        Evaluation.from_json(json.loads((tmp_path / "run" / name / "evaluation.json").read_text()))
        for name in ("", "without_features")
    ]
    expected = compare(*evaluations)
    assert list(report.verdicts) == ["without_features", "control"]
    judged = report.verdicts["without_features"]
    assert dict(judged.difference) == expected
    document = json.loads((tmp_path / "run" / "run.json").read_text())["report"]
    found = document["verdicts"]["without_features"]
    assert found == json.loads(json.dumps(judged.to_json()))
    mean, half = expected["cross_entropy"]
    assert found["difference"]["cross_entropy"]["mean"] == pytest.approx(mean)
    assert found["verdict"] == verdict("cross_entropy", expected["cross_entropy"])
    assert found["cells"] == judged.cells > 8
    assert document["without_features"]["evaluation"] == report.arms["without_features"].evaluation
    assert document["difference"].keys() == report.evaluation.keys()
    text = report_of(report)
    assert f"(cross_entropy {mean:+.4f} ± {half:.4f}, paired over" in text
    assert "without features" in text
    assert "one seed" in text


@pytest.mark.usefixtures("unread")
def test_stopped_in_an_arm_it_goes_on_there(cache: Cache, tmp_path: Path) -> None:
    given: dict[str, Any] = SMALL | {"evaluate_every": 5, "control": True}
    stop, calls = Stop(), 0

    def stopping(student: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 3:  # in the middle of the second training
            stop()
        return {"cross_entropy": 1.0}

    report = fastkd.train(Tiny(seed=1), cache, tmp_path, **given, objective=both(), evaluate=stopping, stop=stop)
    assert report.status == 75
    assert list(report.arms) == ["without_features"]
    assert report_of(report).startswith(f"{tmp_path / 'without_features'}: stopped after step 6 of 10")
    report = fastkd.train(Tiny(seed=1), cache, tmp_path, **given, objective=both(), evaluate=stopping)
    assert report.complete
    assert report.arms["without_features"].resumed == 6
    assert not report.verdicts  # this evaluation says nothing of windows
    assert "verdicts" not in report.to_json()
