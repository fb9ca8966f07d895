"""`quantize`: the loss and its gradients are those of the quantised student, whatever the training does beside."""

import json
import logging
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import train_jobs
from hf_cases import config_of, model_of
from safetensors.torch import load_file
from torch import Tensor, nn
from train_cases import SMALL, Tiny, bits, make_cache, stopped, tied_llama

import fastkd
from fastkd.cache import Cache
from fastkd.errors import TrainError
from fastkd.evaluate.api import evaluate
from fastkd.kernels import kd_loss
from fastkd.models.hub import load_transformers
from fastkd.models.quantization import NOTE, SCHEMES, fake_quantize, fake_quantize_rows, quantised_weights, quantize
from fastkd.models.torchao import drop_noise
from fastkd.settings import LiveSettings, TrainSettings
from fastkd.stream.cached import CachedSource
from fastkd.train.ema import AveragedTeacher
from fastkd.train.fake_quantisation import FakeQuantisation
from fastkd.train.metrics import read_metrics
from fastkd.train.settings_check import stated
from fastkd.train.student import Student, make_student

pytestmark = pytest.mark.usefixtures("one_thread")
INT4: dict[str, Any] = SMALL | {"rate": 1e-3, "steps": 6, "quantize": "int4"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("quantize") / "cache")


@pytest.fixture(scope="module")
def batch(cache: Cache) -> Any:
    source = CachedSource(cache, batch_size=8)
    try:
        return next(iter(source.steps())).micro_batches[0]
    finally:
        source.close()


class Convolutions(nn.Module):
    """Token ids `[B, L]` to logits; causal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, 32)
        self.convolution = nn.Conv1d(32, 64, 3)
        self.linear = nn.Linear(64, 96)

    def forward(self, tokens: Tensor) -> Tensor:
        states = nn.functional.pad(self.embedding(tokens).transpose(1, 2), (2, 0))
        logits: Tensor = self.linear(self.convolution(states).relu().transpose(1, 2))
        return logits


def fake(student: Student, scheme: str) -> FakeQuantisation:
    student.fake = FakeQuantisation(student.model, "student", SCHEMES[scheme], 0)
    student.fake.enable(True)
    return student.fake


def quantised(model: nn.Module, scheme: str) -> dict[str, Tensor]:
    """Make a model's weights those of the scheme. Returns which of them were not clipped, by name."""
    passed = {}
    for name, how in quantised_weights(model, SCHEMES[scheme]).items():
        p = model.get_parameter(name)
        scales = quantize(p, how).scales
        codes = p.detach().flatten(1).unflatten(1, (scales.shape[1], -1)) * (1.0 / scales)[:, :, None]
        passed[name] = ((codes.round() >= how.low) & (codes.round() <= how.high)).view(p.shape)
        p.data = fake_quantize(p.data, how)
    return passed


@pytest.mark.parametrize(
    ("make", "scheme"),
    [
        (lambda: model_of("llama", tie_word_embeddings=True), "int4"),
        (lambda: model_of("gemma3"), "int4"),  # with a scaled embedding
        (lambda: model_of("llama"), "int8"),
        (Convolutions, "int4"),
    ],
)
def test_the_loss_and_its_gradients_are_those_of_the_dense_reference(make: Any, scheme: str, batch: Any) -> None:
    """Fused with the LM head, against a plain model that has the quantised weights, and full logits."""
    student, plain = make_student(make(), None).student, make()
    if not hasattr(plain, "config"):
        student = make_student(make(), None, data=None).student
    fake(student, scheme)
    passed = quantised(plain, scheme)
    if scheme == "int8":  # and the inputs of linear layers, whose gradient passes
        for module in plain.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(
                    lambda _, given: given[0] + (fake_quantize_rows(given[0]) - given[0]).detach()
                )
    output = plain(batch.input_ids)
    logits = getattr(output, "logits", output).flatten(0, -2)
    expected = kd_loss(logits, batch.targets, batch.labels.flatten(), num_items=batch.count)
    found = student(batch, num_items=batch.count)
    assert found["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-6)
    expected.loss.backward()
    found["loss"].backward()
    ours = dict(student.model.named_parameters())
    for name, p in plain.named_parameters():
        assert p.grad is not None
        assert ours[name].grad is not None
        if scheme == "int8" and name not in passed:
            continue
        theirs = torch.where(passed[name], p.grad, 0.0) if name in passed else p.grad
        close = (ours[name].grad - theirs).abs() <= 1e-5 * theirs.abs().max() + 1e-7
        # an input at the end of its range is clipped or not, by rounding
        assert close.float().mean() > 0.9 if scheme == "int8" else close.all(), name
    shared = [name for name in passed if not passed[name].all()]
    assert shared, "nothing was clipped, so that it is not seen whether a gradient passes"


def test_a_run(cache: Cache, tmp_path: Path) -> None:
    """Up to the step, it is the run without; then it is another. Evaluations are of the quantised student, and the
    folder has plain weights, with a note of the scheme."""
    changes = INT4 | {"evaluate_every": 2}
    plain = {**changes, "quantize": "none"}
    fastkd.train(config_of("llama"), cache, tmp_path / "plain", **plain)
    report = fastkd.train(config_of("llama"), cache, tmp_path / "run", **changes | {"quantize_after": 3})
    losses = [[line["loss"] for line in read_metrics(tmp_path / run) if "loss" in line] for run in ("plain", "run")]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0][3] != losses[1][3]
    assert report.student is not None
    assert any("trained for int4" in note for note in report.notes)
    folder = Path(report.student)
    model = load_transformers().AutoModelForCausalLM.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())[NOTE] == {"scheme": "int4", "group": 32}
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight[0].unique().numel() == 32  # its own, not those on the grid
    measured = evaluate(make_student(folder, None).student, cache).intervals()["cross_entropy"].mean
    assert measured != pytest.approx(report.evaluation["cross_entropy"], rel=1e-6)
    quantised(model, "int4")
    measured = evaluate(make_student(model, None).student, cache).intervals()["cross_entropy"].mean
    assert measured == pytest.approx(report.evaluation["cross_entropy"], rel=1e-6)
    # of the first evaluation too, before the step
    first = next(line["evaluation"] for line in read_metrics(tmp_path / "run") if "evaluation" in line)
    before = next(line["evaluation"] for line in read_metrics(tmp_path / "plain") if "evaluation" in line)
    assert first["cross_entropy"] != before["cross_entropy"]
    # a training without it takes the note away
    again = fastkd.train(folder, cache, tmp_path / "again", **plain | {"steps": 1})
    assert NOTE not in json.loads((Path(str(again.student)) / "config.json").read_text())


def test_it_resumes_at_every_step_to_the_same_bytes(cache: Cache, tmp_path: Path) -> None:
    changes = INT4 | {"quantize_after": 2, "steps": 4, "checkpoint_every": 1, "keep": 9}
    fastkd.train(tied_llama(), cache, tmp_path / "whole", **changes)
    while (report := fastkd.train(tied_llama(), cache, tmp_path / "parts", stop=stopped(), **changes)).status == 75:
        assert not report.complete
    for step in range(1, 5):
        assert bits(tmp_path / "parts", step) == bits(tmp_path / "whole", step)
    for other in ({"quantize": "int8"}, {"quantize_after": 3}, {"quantize": "none", "quantize_after": None}):
        with pytest.raises(TrainError, match=r"quantize\w*: .* there, .* here"):
            fastkd.train(tied_llama(), cache, tmp_path / "parts", **changes | other)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.soak), "fsdp"])
def test_two_processes(cache: Cache, tmp_path: Path, kind: str) -> None:
    """Of one step: a group's extreme weight lies between two codes, so that rounding decides which, and a sum over
    processes may round otherwise."""
    folder, changes = Path(cache.store.describe()), INT4 | {"steps": 1, "evaluate_every": 1}
    train_jobs.train("train_cases:tied_llama", folder, tmp_path / "one", changes)
    train_jobs.run(
        train_jobs.train, "train_cases:tied_llama", folder, tmp_path / "two", changes | {"parallel": kind}, ranks=2
    )
    one, two = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=2e-5, atol=2e-5)
    (ours, measured), (theirs, also) = (read_metrics(tmp_path / run) for run in ("one", "two"))
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert measured["evaluation"]["cross_entropy"] == pytest.approx(also["evaluation"]["cross_entropy"], rel=1e-3)


def test_the_average_of_its_weights_is_not_quantised(cache: Cache, tmp_path: Path, batch: Any) -> None:
    """As its teacher it answers with what it is; exported, it is a plain model."""
    made = make_student(tied_llama(), None)
    teacher = AveragedTeacher(made.student, LiveSettings(k=8, draws=0), decay=0.5)
    before = teacher.logits(batch)
    fake(made.student, "int4")
    assert torch.equal(teacher.logits(batch), before)
    assert not torch.equal(made.student.logits(batch), before)


def test_sampling_quantises_each_weight_once(batch: Any) -> None:
    student = make_student(tied_llama(), None).student
    fake(student, "int4")
    tokens, rows = batch.input_ids, torch.arange(3)
    expected = student.logits(batch, rows)
    with student.sampling() as logits_of:
        assert torch.equal(logits_of(tokens, rows), expected)
        weight = student.model.model.layers[0].mlp.up_proj.weight
        assert student.model.model.layers[0].mlp.up_proj.weight is weight
    assert student.model.model.layers[0].mlp.up_proj.weight is not weight
    assert torch.equal(student.logits(batch, rows), expected)


@pytest.mark.filterwarnings("ignore")  # of torch itself, as it compiles
def test_compiled_layers(batch: Any) -> None:
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        student = make_student(model_of("llama"), None).student
        switched = fake(student, "int4")
        for layer in student.layers if compiled else []:
            layer.compile(backend="eager", fullgraph=True)
        found = []
        for enabled in (False, True):
            switched.enable(enabled)
            found.append(student(batch, num_items=batch.count)["loss"])
        found[1].backward()
        gradient = dict(student.named_parameters())["model.model.layers.0.mlp.up_proj.weight"].grad
        assert gradient is not None
        losses.append([*map(float, found), float(gradient.square().sum())])
    torch._dynamo.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][1]


def test_runs_from_before_have_none_of_its_settings() -> None:
    assert not [name for name in stated(asdict(TrainSettings())) if "quantize" in name]
    found = stated(asdict(TrainSettings(quantize="int8")))
    assert [name for name in found if "quantize" in name] == ["quantize", "quantize_after"]


@pytest.mark.parametrize(
    ("student", "changes", "message"),
    [
        ("llama", {"quantize": "int3"}, "quantize: got 'int3'; expected one of none, int8, int4"),
        ("llama", {"quantize_after": 6}, "quantize_after: got 6; expected less than the 6 steps"),
        ("llama", {"quantize_after": -1}, "quantize_after: got -1; expected a number of steps from 0 on"),
        ("llama", {"quantize": "none", "quantize_after": 3}, "quantize_after: got 3 without quantize"),
        ("llama", {"steps": None, "epochs": 0.1, "quantize_after": 99}, "quantize_after: got 99; expected less than"),
        ("llama", {"lora_rank": 2}, "quantize: got 'int4' with lora_rank; expected one of them"),
        ("gpt2", {}, "quantize: got int4 for GPT2LMHeadModel; expected linear layers or convolutions"),
        (Tiny(), {}, r"quantize: got int4 for layers\.0, which has 12 inputs; expected a multiple of 32.* Use int8"),
        (
            Tiny(dtype=torch.float64),
            {"quantize": "int8"},
            r"quantize: got 'int8' for Tiny, whose layers\.0\.weight is torch\.float64; expected float32",
        ),
    ],
)
def test_bad_input(cache: Cache, tmp_path: Path, student: Any, changes: dict[str, Any], message: str) -> None:
    student = config_of(student) if isinstance(student, str) else student
    with pytest.raises(TrainError, match=message):
        fastkd.train(student, cache, tmp_path / "run", **INT4 | changes)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_students_that_learn_from_each_other_are_refused(cache: Cache, tmp_path: Path) -> None:
    students = {"a": Tiny(seed=1), "b": Tiny(seed=2)}
    with pytest.raises(TrainError, match="quantize: got 'int8' for students that learn from each other"):
        fastkd.mutual(students, cache, tmp_path / "run", quantize="int8")


def test_torchao_that_is_not_installed(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization.qat", None)
    with pytest.raises(TrainError, match=r"quantize=int4 needs torchao \(.*\)\. Use `pip install 'fastkd\[qat\]'`"):
        fastkd.train(config_of("llama"), cache, tmp_path / "run", **INT4)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_torchao_logs_when_it_is_imported_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    drop_noise()
    drop_noise()
    logging.getLogger("torchao").warning("Failed to load %s", "a.so")
    logging.getLogger("torch.utils._pytree").warning("Calling register_constant() on Enum subclasses is deprecated")
    logging.getLogger("torchao").warning("anything else")
    assert caplog.messages == ["anything else"]
    assert len(logging.getLogger("torchao").filters) == 1


def test_int8_of_any_width(cache: Cache, tmp_path: Path) -> None:
    """A module whose width is no multiple of 32, with an LM head that is no linear layer."""
    report = fastkd.train(Tiny(), cache, tmp_path / "run", **INT4 | {"quantize": "int8", "evaluate_every": 3})
    assert report.complete
    assert any("leaves as they are" in note for note in report.notes)
    shutil.rmtree(tmp_path / "run")
