"""Objectives and batch sources from outside the package: trained with, logged, resumed, added up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import train_jobs
from source_cases import ToySource
from torch import Tensor, nn
from train_cases import SMALL, Tiny, bits, make_cache, toy_objective

import fastkd
from fastkd import kd_loss
from fastkd.cache import Cache
from fastkd.errors import StreamError, TrainError
from fastkd.kernels import KDError, LossConfig
from fastkd.settings import TrainSettings
from fastkd.train.metrics import read_metrics
from fastkd.train.objective import TokenKD, WeightedSum
from fastkd.train.student import make_student
from fastkd.train.trainer import Trainer
from fastkd.utils.distributed import ALONE
from fastkd.utils.signals import Stop

VOCAB = 20
CHANGES: dict[str, Any] = {"steps": 6, "rate": 0.01, "checkpoint_every": 2, "keep": 9}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("objective") / "cache")


def train(out: Path, source: Any = None, **changes: Any) -> fastkd.TrainReport:
    source = ToySource(vocab=VOCAB) if source is None else source
    return fastkd.train(Tiny(vocab=VOCAB, seed=1, dropout=0.1), source, out, **{**CHANGES, **changes})


def test_a_toy_objective_and_a_toy_source(tmp_path: Path) -> None:
    """Trained with, and resumed to the same bits, across the end of an epoch."""
    objective = toy_objective(0.01)
    assert train(tmp_path / "whole", objective=objective).complete
    steps = read_metrics(tmp_path / "whole")
    assert len(steps) == 6
    for number, line in enumerate(steps):
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["l2"], rel=1e-5)
        assert line["l2"] > 0
        assert line["strength"] == pytest.approx(0.01 * (1 - number / 6))
        assert not {"hard", "soft", "alpha"} & line.keys()
    run = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert run["caches"] == []
    assert run["source"] == ToySource(vocab=VOCAB).fingerprint
    stop = Stop()
    stop()
    resumed = []
    while (report := train(tmp_path / "parts", objective=objective, stop=stop)).status == 75:
        resumed.append(report.resumed)
    assert resumed == [0, 1, 2, 3, 4]
    for step in (2, 4, 6):
        assert bits(tmp_path / "parts", step) == bits(tmp_path / "whole", step)
    with pytest.raises(TrainError, match=r"objective: .*'strength': 0.01.* there, .*'strength': 0.5.* here"):
        train(tmp_path / "parts", objective=toy_objective(0.5))


def test_the_trainer_itself(tmp_path: Path) -> None:
    """Without `fastkd.train`: any source, any objective."""
    settings = TrainSettings(**CHANGES)
    for name in ("ours", "theirs"):
        made = make_student(Tiny(vocab=VOCAB, seed=1, dropout=0.1), None, settings)
        source = ToySource(vocab=VOCAB)
        trainer = Trainer(made, source, ALONE, settings, tmp_path / name, objective=toy_objective(0.01))
        trainer.resume()
        trainer.run(Stop())
        trainer.write_run(trainer.report())
        trainer.close()
    assert bits(tmp_path / "ours", 6) == bits(tmp_path / "theirs", 6)
    train(tmp_path / "api", objective=toy_objective(0.01))
    assert bits(tmp_path / "api", 6) == bits(tmp_path / "ours", 6)


def test_a_control_of_a_source_begins_at_its_beginning(tmp_path: Path) -> None:
    report = train(tmp_path, objective=toy_objective(0.01), control=True)
    assert report.control is not None
    ours, theirs = read_metrics(tmp_path), read_metrics(tmp_path / "control")
    assert theirs[0]["hard"] == pytest.approx(ours[0]["cross_entropy"], rel=1e-5)
    assert {line["alpha"] for line in theirs} == {1.0}


def test_the_default_objective_is_token_kd(cache: Cache, tmp_path: Path) -> None:
    changes = {"alpha": 0.3, "temperature": 2.0, "divergence": "jsd", "beta": 0.2}
    fastkd.train(Tiny(seed=1), cache, tmp_path / "settings", **SMALL, **changes)
    objective = TokenKD(LossConfig(alpha=0.3, temperature=2.0, divergence="jsd", beta=0.2))
    fastkd.train(Tiny(seed=1), cache, tmp_path / "object", **SMALL, objective=objective)
    assert bits(tmp_path / "settings", 10) == bits(tmp_path / "object", 10)
    with pytest.raises(TrainError, match="beta: got 7"):
        fastkd.train(Tiny(seed=1), cache, tmp_path / "other", **SMALL, divergence="jsd", beta=7)


def test_a_sum(cache: Cache, tmp_path: Path) -> None:
    """Of losses and of gradients; each term's loss and parts are logged."""
    source = ToySource(vocab=VOCAB)
    (batch,) = next(source.steps()).micro_batches
    kd, toy = TokenKD(LossConfig(alpha=0.3)), toy_objective(0.02)
    student = make_student(Tiny(vocab=VOCAB, seed=1), None).student
    weights = {"kd": 1.0, "toy": 0.5}
    gradients: dict[str, Tensor] = {}
    losses: dict[str, Any] = {}
    for name, objective in {"kd": kd, "toy": toy, "sum": WeightedSum({"kd": kd, "toy": toy}, weights)}.items():
        student.objective = objective
        scheduled = {key: torch.tensor(value) for key, value in objective.schedule(0, 6).items()}
        found = student(batch, num_items=batch.count, **scheduled)
        found["loss"].backward()
        losses[name] = {key: value.detach() for key, value in found.items()}
        gradients[name] = torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])
        student.zero_grad()
    both = losses["sum"]
    assert list(both) == ["loss", "kd", "toy", "hard", "soft", "cross_entropy", "l2"]
    assert float(both["kd"]) == pytest.approx(float(losses["kd"]["loss"]))
    assert float(both["loss"]) == pytest.approx(float(losses["kd"]["loss"] + 0.5 * losses["toy"]["loss"]), rel=1e-5)
    expected = gradients["kd"] + 0.5 * gradients["toy"]
    torch.testing.assert_close(gradients["sum"], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(TrainError, match="got a weight for 'other'; expected some of kd"):
        WeightedSum({"kd": kd}, {"other": 1.0})
    with pytest.raises(TrainError, match="got 'alpha' from 'b' and from another term"):
        WeightedSum({"a": kd, "b": kd}).schedule(0, 6)


class Projecting(nn.Module):
    """An objective with a parameter of its own: states are projected onto the teacher's most likely token."""

    signals = ("targets",)
    outputs = ("states",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, VOCAB)

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {}

    def losses(self, batch: Any, outputs: Any, *, num_items: Any) -> dict[str, Tensor]:
        best = batch.targets.ids[:, 0].long()
        return {"loss": F.cross_entropy(self.layer(outputs["states"]), best, reduction="sum") / num_items}

    def describe(self) -> dict[str, Any]:
        return {}


def test_an_objective_with_parameters_is_trained_and_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    objective = WeightedSum({"kd": TokenKD(), "projection": Projecting(12)})
    before = objective.terms["projection"].layer.weight.detach().clone()  # type: ignore[attr-defined]
    report = train(tmp_path, objective=objective, steps=40)
    found = bits(tmp_path, 40)
    (name,) = [n for n in found if n.startswith("model.objective") and n.endswith("layer.weight")]
    assert found[name][2] != before.numpy().tobytes()
    losses = [line["projection"] for line in read_metrics(tmp_path)]
    assert sum(losses[-4:]) < sum(losses[:4])
    from safetensors.torch import load_file

    exported = load_file(Path(report.student or "") / "model.safetensors")
    assert exported.keys() == Tiny(vocab=VOCAB).state_dict().keys()


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.soak), "fsdp"])
def test_two_processes(cache: Cache, tmp_path: Path, kind: str) -> None:
    """The objective runs in the forward of DDP and FSDP2, where parameters are complete."""
    place, changes = Path(cache.store.describe()), SMALL | {"parallel": kind}
    train_jobs.train_toy("train_cases:double", place, tmp_path / "one", SMALL)
    train_jobs.run(train_jobs.train_toy, "train_cases:double", place, tmp_path / "two", changes, ranks=2)
    for mine, theirs in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in ("loss", "cross_entropy", "l2", "grad_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": ("attention",)}, "objective: got the output 'attention'; expected some of output, logits, states"),
        (
            {"signals": ("relations",)},
            "objective: Toy needs the signal 'relations', which the source's MicroBatch",
        ),
    ],
)
def test_needs_that_cannot_be_met(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    objective = toy_objective(0.01)
    for name, value in changes.items():
        setattr(objective, name, value)
    with pytest.raises(TrainError, match=message):
        train(tmp_path, objective=objective)


def test_what_is_no_objective(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="got function without signals, outputs, schedule, losses, describe"):
        train(tmp_path, objective=kd_loss)
    with pytest.raises(TrainError, match="evaluate_every: got 2, and a batch source has no held-out split"):
        train(tmp_path, evaluate_every=2)


class Misuse:
    """A minimal objective, of which a test changes one member."""

    signals: Any = ("labels", "targets")
    outputs: Any = ("logits",)

    def __init__(self, **changes: Any) -> None:
        self.__dict__.update(changes)

    def schedule(self, step: int, steps: int) -> Any:
        return {}

    def losses(self, batch: Any, outputs: Any, *, num_items: Any, **scheduled: Any) -> Any:
        return {"loss": outputs["logits"].square().mean()}

    def describe(self) -> Any:
        return {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": "logits"}, r"Misuse.outputs = 'logits'; expected a tuple"),
        ({"signals": None}, "Misuse.signals = None; expected a tuple"),
        ({"outputs": ("other",)}, "output 'other'; expected some of"),
        ({"schedule": lambda *at: None}, "None from Misuse.schedule; expected a mapping"),
        ({"schedule": lambda *at: {"rate": 1.0}}, "schedule named 'rate', which the trainer uses"),
        ({"schedule": lambda *at: {"num_items": 1.0}}, "schedule named 'num_items'"),
        ({"describe": lambda: {"x": torch.ones(())}}, r"describe\(\) that is not JSON"),
        ({"describe": lambda: {"x": float("nan")}}, r"describe\(\) that is not JSON"),
        ({"losses": lambda *a, **k: None}, "NoneType from Misuse.losses"),
        (
            {"losses": lambda *a, **k: {"hard": torch.ones(())}},
            'the names hard from Misuse.losses; expected a mapping with "loss"',
        ),
        ({"losses": lambda *a, **k: {"loss": 1.0}}, "1.0 as 'loss'"),
        ({"losses": lambda *a, **k: {"loss": torch.ones(3)}}, r"shape \(3,\) as 'loss'"),
        ({"losses": lambda *a, **k: {"loss": torch.ones(())}}, "without a gradient"),
        (
            {"losses": lambda b, o, **k: {"loss": o["logits"].mean(), "step": torch.ones(())}},
            "a part named 'step', which the trainer logs itself",
        ),
    ],
)
def test_what_an_objective_may_not_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainError, match=message):
        train(tmp_path / "run", objective=Misuse(**changes))
    assert read_metrics(tmp_path / "run") == []


def test_a_class_is_no_objective_and_terms_have_a_loss(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="got the class Misuse; expected an instance"):
        train(tmp_path / "run", objective=Misuse)
    with pytest.raises(TrainError, match="a term named 'loss'"):
        WeightedSum({"loss": Misuse()})
    with pytest.raises(TrainError, match="alpha_schedule: got 'x'"):
        TokenKD(alpha_end=1.0, alpha_schedule="x")
    with pytest.raises(KDError, match="alpha: got 3"):
        TokenKD(alpha_end=3.0)


def test_what_a_source_may_not_be(tmp_path: Path) -> None:
    class NoSeek:
        def steps(self) -> Any:
            return iter(())

    class Ends(ToySource):
        def steps(self) -> Any:
            yield next(super().steps())

    with pytest.raises(StreamError, match=r"got NoSeek without .*seek.*BatchSource"):
        train(tmp_path / "a", NoSeek())
    with pytest.raises(StreamError, match="got the class ToySource"):
        train(tmp_path / "b", ToySource)
    with pytest.raises(TrainError, match=r"got no step from Ends.steps\(\) after step 1 of 6"):
        train(tmp_path / "c", Ends(vocab=VOCAB))
