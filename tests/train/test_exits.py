"""Early exits: their loss against obvious lines, their laws, their trainings, and students cut at one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import exit_cases
import pytest
import torch
import torch.nn.functional as F
import train_jobs
import vision_cases
from exit_cases import Stack, stack
from hf_cases import VOCAB, model_of
from torch import Tensor, nn
from train_cases import SMALL, Tiny, bits, documents, make_cache, stopped

import fastkd
from fastkd.cache import Cache
from fastkd.errors import TrainError
from fastkd.kernels import LMHead, LossConfig, TopKConfig
from fastkd.models.hub import load_transformers
from fastkd.models.protocol import Hidden
from fastkd.models.pruned import original_layers
from fastkd.settings import LiveSettings, TrainSettings
from fastkd.stream.batch import MicroBatch
from fastkd.train.api import DEFAULTS, make_source
from fastkd.train.checkpoint import newest
from fastkd.train.exits import exit_students, output_name, reader, with_exits
from fastkd.train.metrics import read_metrics
from fastkd.train.objective import TokenKD, WeightedSum
from fastkd.train.objectives.exits import ExitKD
from fastkd.train.student import Student, make_student


def llama() -> Any:
    return model_of("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("exits") / "cache")


@pytest.fixture(scope="module")
def batch(cache: Cache) -> MicroBatch:
    source = make_source(cache, DEFAULTS)
    found: MicroBatch = next(iter(source)).micro_batches[0]
    source.close()
    return found


def student_of(model: Any) -> Student:
    return make_student(model, None, DEFAULTS).student.eval()


def logits_at(model: Any, tokens: Tensor, layer: int) -> Tensor:
    """What the first layers alone, with all that comes after the last one, say."""
    if isinstance(model, Stack):
        found = model(tokens, layer)
        return found if isinstance(found, Tensor) else found.states @ found.lm_head.weight.T
    states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    # of transformers, the last one is after the norm
    return model.lm_head(states[layer] if layer == len(states) - 1 else model.model.norm(states[layer]))


def exits_of(student: Student, exits: tuple[int, ...], *, temperature: float = 1.0, **targets: Any) -> ExitKD:
    kept = {"k": VOCAB, "draws": 0, "temperatures": (1.0, temperature) if temperature != 1 else (1.0,)}
    loss = TokenKD(LossConfig(alpha=0.3, temperature=temperature))
    outputs = {layers: output_name(student, layers) for layers in exits}
    made = ExitKD(outputs, reader(student), loss, TopKConfig(**{**kept, **targets}), student.vocab_size)
    student.read(made)
    return made


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("make", [Stack, lambda: Stack(logits=True), llama], ids=["hidden", "logits", "llama"])
def test_the_loss_and_its_gradients(make: Any, batch: MicroBatch, temperature: float) -> None:
    """With all entries kept, those of obvious lines on dense logits."""
    student = student_of(make())
    exits_of(student, (1, 3), temperature=temperature)
    found = student(batch, num_items=50)
    found["loss"].backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    index, labels = batch.targets.index, batch.labels.flatten()[batch.targets.index]
    last = logits_at(student.model, batch.input_ids, 4).flatten(0, 1)[index].detach()
    total = torch.zeros(())
    for layer in (1, 3):
        z = logits_at(student.model, batch.input_ids, layer).flatten(0, 1)[index]
        hard = F.cross_entropy(z, labels, reduction="sum") / 50
        q, log_p = (last / temperature).softmax(-1), (z / temperature).log_softmax(-1)
        soft = temperature**2 * F.kl_div(log_p, q, reduction="sum") / 50
        torch.testing.assert_close(found[f"exit{layer}/hard"], hard, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"exit{layer}/soft"], soft, rtol=1e-4, atol=1e-6)
        total = total + (0.3 * hard + 0.7 * soft) / 2
    total.backward()
    torch.testing.assert_close(found["loss"], total, rtol=1e-5, atol=1e-6)
    theirs = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    assert not any("layers.3" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("make", [Stack, llama])
def test_an_exit_behind_the_last_layer_has_nothing_to_learn_from_it(make: Any, batch: MicroBatch) -> None:
    student = student_of(make())
    own = exits_of(student, (4,), k=8)
    own.loss = TokenKD(LossConfig(alpha=0.0))
    found = student(batch, num_items=batch.count)
    assert float(found["exit4/soft"].detach()) == pytest.approx(0.0, abs=1e-6)
    found["loss"].backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-6


def test_draws_do_not_depend_on_the_division(cache: Cache) -> None:
    losses = []
    for micro_tokens in (16, 1000):
        student = student_of(Stack())
        exits_of(student, (2,), k=4, draws=3)
        source = make_source(cache, replace(DEFAULTS, micro_tokens=micro_tokens, batch_tokens=200))
        step = next(iter(source))
        source.close()
        losses.append(float(sum(student(b, num_items=step.count)["loss"].detach() for b in step.micro_batches)))
        parts = len(step.micro_batches)
        assert parts > 5 if micro_tokens == 16 else parts == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_exit_is_evaluated_as_the_network_that_ends_there(batch: MicroBatch) -> None:
    for make in (Stack, llama):
        student = student_of(make())
        student.read(with_exits(TrainSettings(exits=(3, 1)), student, None))
        assert list(exit_students(student)) == ["exit1", "exit3"]
        for layer, one in ((1, exit_students(student)["exit1"]), (3, exit_students(student)["exit3"])):
            wanted = logits_at(student.model, batch.input_ids, layer).flatten(0, 1)[batch.targets.index]
            torch.testing.assert_close(one.logits(batch), wanted, rtol=1e-5, atol=1e-5)
        whole = logits_at(student.model, batch.input_ids, 4).flatten(0, 1)[batch.targets.index]
        torch.testing.assert_close(student.logits(batch), whole, rtol=1e-5, atol=1e-5)


def test_a_training(cache: Cache, tmp_path: Path) -> None:
    """With a log of each exit's parts, and its measures on the held-out split."""
    changes = SMALL | {"exits": ("1,3",), "evaluate_every": 5, "exit_weight": 0.5}
    report = fastkd.train(stack, cache, tmp_path / "run", **changes)
    assert report.complete
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert {"hard", "soft", "exit1/hard", "exit1/soft", "exit3/hard", "exit3/soft", "answers", "exits"} <= lines[
        0
    ].keys()
    for line in lines:
        assert line["loss"] == pytest.approx(line["answers"] + 0.5 * line["exits"], rel=1e-5)
        halves = [0.5 * line[f"exit{n}/hard"] + 0.5 * line[f"exit{n}/soft"] for n in (1, 3)]
        assert line["exits"] == pytest.approx(sum(halves) / 2, rel=1e-4)
    names = {"cross_entropy", "kl_bucket", "accuracy"}
    assert names | {f"exit{n}/{name}" for n in (1, 3) for name in names} <= report.evaluation.keys()
    without = fastkd.train(stack, cache, tmp_path / "without", **SMALL | {"evaluate_every": 5})
    assert not any("/" in name for name in without.evaluation)
    assert report.evaluation["exit1/cross_entropy"] != report.evaluation["exit3/cross_entropy"]


LIVE = LiveSettings(k=6, draws=3, context=16, shard_positions=48, held_out=0.2)


def test_the_exits_do_not_care_where_the_targets_come_from(cache: Cache, tmp_path: Path) -> None:
    """A cache, a teacher beside the student, or labels alone: the last layer teaches them all the same."""
    changes = SMALL | {"exits": (1, 3), "steps": 2, "alpha": 0.3}
    fastkd.train(Stack(), cache, tmp_path / "cache", **changes)
    fastkd.train(Stack(), out=tmp_path / "live", teacher=Tiny(seed=7), data=documents(), live=LIVE, **changes)
    changes |= {"alpha": 1.0, "evaluate_every": 2}
    report = fastkd.train(Stack(), out=tmp_path / "labels", data=documents(), live=LIVE, **changes)
    cached, live, labels = (read_metrics(tmp_path / run)[0] for run in ("cache", "live", "labels"))
    for name in (f"exit{n}/{part}" for n in (1, 3) for part in ("hard", "soft")):
        assert cached[name] == pytest.approx(live[name], rel=1e-5)
        assert cached[name] == pytest.approx(labels[name], rel=1e-5)
    assert labels["soft"] == 0
    assert {"exit1/cross_entropy", "exit3/accuracy"} <= report.evaluation.keys()
    assert not any("kl" in name for name in report.evaluation)


def test_it_resumes_at_every_step_to_the_same_bytes(cache: Cache, tmp_path: Path) -> None:
    changes: dict[str, Any] = SMALL | {"exits": (1, 3), "steps": 4, "checkpoint_every": 1, "keep": 9}
    fastkd.train(stack, cache, tmp_path / "whole", **changes)
    while (report := fastkd.train(stack, cache, tmp_path / "parts", stop=stopped(), **changes)).status == 75:
        assert not report.complete
    for step in range(1, 5):
        assert bits(tmp_path / "parts", step) == bits(tmp_path / "whole", step)
    with pytest.raises(TrainError, match=r"exits: .* there, .* here"):
        fastkd.train(stack, cache, tmp_path / "parts", **changes | {"exits": (1, 2)})


def test_two_exits_of_digits_and_a_control(tmp_path: Path) -> None:
    """Of a classifier; the control has none."""
    data = vision_cases.examples()
    changes: dict[str, Any] = {"steps": 3, "batch_size": 16, "rate": 0.01, "evaluate_every": 3, "exits": (1, 2)}
    live = LiveSettings(k=4, draws=0, held_out=0.2)
    report = fastkd.train(
        exit_cases.Blocks, out=tmp_path / "run", data=data, live=live, alpha=1.0, control=True, **changes
    )
    assert {"exit1/accuracy", "exit2/cross_entropy"} <= report.evaluation.keys()
    assert report.control is not None
    assert not any("/" in name for name in report.control.evaluation)


@pytest.mark.parametrize(
    ("student", "tolerance", "kinds"),
    [
        ("exit_cases:double_stack", 1e-9, ["fsdp"]),
        pytest.param("exit_cases:double_stack", 1e-9, ["ddp"], marks=pytest.mark.soak),
        pytest.param("exit_cases:deep_llama", 2e-5, ["ddp", "fsdp"], marks=pytest.mark.soak),
    ],
)
def test_two_processes(cache: Cache, tmp_path: Path, student: str, tolerance: float, kinds: list[str]) -> None:
    """Of unequal parts of each step, and several micro-batches; evaluated and cut as by one."""
    changes = SMALL | {"exits": (1, 3), "steps": 4, "evaluate_every": 4, "rate": 1e-3}
    place = tmp_path / "cache"
    make_cache(place)
    fastkd.train(student, place, tmp_path / "one", **changes | {"micro_tokens": 1000})
    runs = [(student, place, tmp_path / kind, changes | {"parallel": kind}) for kind in kinds]
    train_jobs.run(train_jobs.train_all, runs, ranks=2)
    whole = newest(tmp_path / "one")
    assert whole is not None
    for kind in kinds:
        found = newest(tmp_path / kind)
        assert found is not None
        for name, tensor in found.tensors("model").items():
            torch.testing.assert_close(tensor, whole.tensors("model")[name], rtol=tolerance, atol=tolerance, msg=name)
        ours, theirs = (read_metrics(tmp_path / run)[-1]["evaluation"] for run in (kind, "one"))
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert "exit3/cross_entropy" in ours


class Shared(Stack):
    """All its layers are one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.layers[0]] * 4)


class Skips(Stack):
    """Its output depends on more than what its last layer returns."""

    def forward(self, tokens: Tensor, layers: int = 4) -> Any:
        first = x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(first) + x
        return Hidden(self.norm(x), LMHead(self.head.weight))


@pytest.mark.parametrize(
    ("student", "exits", "message"),
    [
        (Stack, "5", r"exits: got 5; expected numbers from 1 to 3, as Stack has 4 layers"),
        (Stack, (4,), r"exits: got 4, its last layer, which is no early exit; expected"),
        (Stack, "2,2", r"exits: got 2, 2; expected each layer once"),
        (Stack, "0", r"exits: got 0; expected numbers of layers from 1 on"),
        (Stack, "-1", r"exits: got '-1'; expected numbers"),
        (Stack, "two", r"exits: got 'two'; expected numbers"),
        (lambda: nn.Sequential(nn.Embedding(VOCAB, VOCAB)), "1", r"exits: got 1, and Sequential has no list of layers"),
        (Shared, "2", r"exits: got 2, and Shared has one layer in several places: there are none"),
        (Skips, "2", r"exits: the output of Skips does not follow from the state behind its last layer alone"),
        (Tiny, "2", r"exits: the output of Tiny does not follow"),
    ],
)
def test_exits_that_are_refused(cache: Cache, tmp_path: Path, student: Any, exits: Any, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        fastkd.train(student, cache, tmp_path / "run", exits=exits if isinstance(exits, tuple) else (exits,), steps=2)
    assert not list((tmp_path / "run").rglob("*.distcp")) if (tmp_path / "run").exists() else True


def test_bad_weights(cache: Cache, tmp_path: Path) -> None:
    for changes in ({"exit_weight": -1.0}, {"exit_alpha": 1.5}):
        with pytest.raises(TrainError, match=next(iter(changes))):
            fastkd.train(stack, cache, tmp_path / "run", exits=(1,), **changes)


def test_with_other_terms() -> None:
    """Terms, weights and the search for one stay as they are."""
    student = student_of(Stack())
    both = WeightedSum({"a": TokenKD(), "b": TokenKD()}, {"a": 2.0, "b": "auto"})
    found = with_exits(TrainSettings(exits=(1,), exit_weight=3.0), student, both)
    assert found.weights == {"a": 2.0, "b": 0.0, "exits": 3.0}
    assert found.auto == ("b",)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.soak) for n in ("gpt2", "gemma3"))])
def test_a_student_cut_at_an_exit(cache: Cache, tmp_path: Path, name: str, batch: MicroBatch) -> None:
    """It loads, and its logits are those of the exit; it says which layers it is made of."""
    layers = {"gpt2": {"n_layer": 4}, "gemma3": {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}}
    more = layers.get(name, {"num_hidden_layers": 4, "tie_word_embeddings": True})
    made = model_of(name, **more)
    changes = SMALL | {"steps": 2, "exits": (1, 2), "export_exit": 2}
    assert fastkd.train(made, cache, tmp_path / "run", **changes).complete
    load = load_transformers().AutoModelForCausalLM.from_pretrained
    short, whole = load(tmp_path / "run" / "student-exit2"), load(tmp_path / "run" / "student")
    found = original_layers(short)
    assert found is not None
    assert (found.layers, found.count) == ((0, 1), 4)
    assert original_layers(whole) is None
    student = student_of(whole)
    student.read(with_exits(TrainSettings(exits=(2,)), student, None))
    wanted = exit_students(student)["exit2"].logits(batch)
    logits = short(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.targets.index]
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in short.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize(
    ("student", "changes", "message"),
    [
        (llama, {"export_exit": 2}, r"export_exit: got 2; expected one of the exits that are trained \(1, 3\)"),
        (llama, {"exits": (), "export_exit": 2}, r"export_exit: got 2; expected one of .* \(none\)"),
        (Stack, {"export_exit": 1}, r"export_exit: got 1, and Stack is a module"),
    ],
)
def test_cuts_that_are_refused(cache: Cache, tmp_path: Path, student: Any, changes: Any, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        fastkd.train(student, cache, tmp_path / "run", **{"exits": (1, 3), **changes})
