"""Taps record what enters layers and leaves modules, whatever runs the model around them."""

from typing import Any

import pytest
import torch
from hf_cases import model_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from vision_cases import Net

from fastkd.errors import TeacherError
from fastkd.models.taps import Taps, layer_number, layers_of, replaced, resolve

NORMS = {"llama": "norm", "gpt2": "ln_f", "gemma2": "norm", "phi": "final_layernorm", "mixtral": "norm"}
TOKENS = torch.arange(24).reshape(2, 12) % 90


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", NORMS)
def test_states_are_those_that_enter_layers_and_the_final_norm(kind: str) -> None:
    model = model_of(kind)
    with Taps(model, ["0", "1", "-1", "state:1"]) as taps, torch.inference_mode():
        output = model.base_model(input_ids=TOKENS, use_cache=False, output_hidden_states=True)
    values = taps.values
    same(values["0"], output.hidden_states[0])
    same(values["1"], output.hidden_states[1])
    same(values["state:1"], values["1"])
    with torch.inference_mode():
        same(getattr(model.base_model, NORMS[kind])(values["-1"]), output.last_hidden_state)
    model(input_ids=TOKENS + 1)
    same(values["1"], taps.values["1"])  # detached


def test_names_of_layers() -> None:
    model = model_of("llama", num_hidden_layers=3)
    features = [(tap.feature, tap.layer, tap.layers) for tap in resolve(model, ["0", "3", "-1", "-2", "-4", "state:2"])]
    assert features == [("0", 0, 3), ("-1", 3, 3), ("-1", 3, 3), ("2", 2, 3), ("0", 0, 3), ("2", 2, 3)]
    assert [layer_number(name, 3) for name in ("4", "-5", "-4", "3")] == [None, None, 0, 3]
    for name in ("4", "-5", "model.layers.9", "", "nothing:at"):
        with pytest.raises(TeacherError, match=r"lacks|no module"):
            resolve(model, [name])
    with pytest.raises(TeacherError, match="no list of layers"):
        resolve(Net(), ["1"])
    experts = nn.ModuleList([nn.Module(), nn.Module()])
    for layer in experts:
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
    assert layers_of(nn.Sequential(experts)) == list(experts)


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images).mean((2, 3)))


def test_outputs_of_modules_are_not_changed_by_what_follows_in_place() -> None:
    model = Maps()
    images = torch.randn(2, 1, 5, 5)
    with Taps(model, ["blocks.0", "module:blocks.1", "blocks.0:at"]) as taps, torch.inference_mode():
        model(images)
        convolved = model.blocks[0](images).clone()
    assert convolved.min() < 0
    same(taps.values["blocks.0"], convolved)
    same(taps.values["module:blocks.1"], convolved.relu())
    same(taps.values["blocks.0:at"], convolved.square().mean(1))


class Student(nn.Module):
    """Layers with an inner module, as trained ones: each may be checkpointed."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        if checkpointed:
            for layer in self.layers:
                run = layer.forward
                layer.forward = lambda x, _run=run: checkpoint(_run, x, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def gradients(model: Any, student: Student, x: Tensor) -> list[Tensor]:
    """Of a loss on inner states and the output; and the values are forgotten, also after a recomputation."""
    taps = Taps(student, ["1", "-1", "layers.1.0"]).attach()
    for _ in range(2):
        student.zero_grad()
        output = model(x)
        values = taps.take()
        (sum((v * (1 + v)).sum() for v in values.values()) + output.square().sum()).backward()
        assert not taps.values
    taps.recording = False
    model(x)
    assert not taps.values
    taps.detach()
    return [parameter.grad for parameter in student.parameters()]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of Dynamo
def test_gradients_flow_through_checkpoints_compilation_and_ddp(tmp_path: Any) -> None:
    x = torch.randn(4, 6)
    plain = Student()
    expected = gradients(plain, plain, x)
    checkpointed = Student(checkpointed=True)
    compiled = Student()
    for layer in compiled.layers:
        layer.compile(backend="aot_eager")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        inner = Student()
        cases = [(checkpointed, checkpointed), (compiled, compiled), (DistributedDataParallel(inner), inner)]
        for model, student in cases:
            for one, other in zip(gradients(model, student, x), expected, strict=True):
                torch.testing.assert_close(one, other)
    finally:
        torch.distributed.destroy_process_group()


def test_a_forward_can_go_on_from_another_state() -> None:
    model = model_of("llama")
    for tap in resolve(model, ["1", "-1"]):
        with Taps(model, [tap]) as taps, torch.inference_mode():
            logits = model(input_ids=TOKENS).logits
        state = taps.values[tap.name]
        with torch.inference_mode():
            with replaced(tap, state):
                same(model(input_ids=TOKENS + 1).logits, logits)
            with replaced(tap, 2 * state):
                assert not torch.equal(model(input_ids=TOKENS).logits, logits)
            same(model(input_ids=TOKENS).logits, logits)


def test_a_module_that_is_not_called_is_named() -> None:
    model = Student()
    model.unused = nn.Linear(1, 1)
    with Taps(model, ["unused"]) as taps:
        model(torch.randn(2, 6))
        with pytest.raises(RuntimeError, match="unused was not called"):
            taps.take()


def test_a_layer_that_is_several_is_refused() -> None:
    """Its hook would record the last of them."""
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 3))
    with pytest.raises(TeacherError, match="1: Sequential has a layer that is several of its 3"):
        resolve(model, ["1"])
