"""Students whose weights are codes: trained through an adapter, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import model_of
from lora_cases import adapted
from torch import Tensor, nn
from train_cases import SMALL, bits, make_cache, stopped

import fastkd
from fastkd.errors import TrainError
from fastkd.kernels import LMHead
from fastkd.models.hub import load_transformers
from fastkd.settings import TrainSettings
from fastkd.train.checkpoint import newest
from fastkd.train.lora import check_sharded
from fastkd.train.student import make_student

pytestmark = pytest.mark.usefixtures("one_thread")
TRAINED: dict[str, Any] = SMALL | {"steps": 3, "rate": 1e-2}
NEW: dict[str, Any] = TRAINED | {"lora_rank": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    make_cache(folder / "cache")
    return folder


class Coded(nn.Linear):
    """A linear layer of int8 codes and a scale."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        scale = plain.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def coded(*, head: bool = False) -> Any:
    """A model whose layers are quantised, and its LM head if that is said."""
    model = model_of("llama", seed=5)
    model.name_or_path = "tiny"
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Coded(getattr(layer.self_attn, name)))
    if head:
        model.lm_head = Coded(model.lm_head)
    return model


def trains(student: Any, place: Path, out: Path, changes: dict[str, Any]) -> None:
    """It learns, its checkpoints have no codes, and a resume is exact."""
    assert fastkd.train(student, place / "cache", out / "whole", **changes).complete
    found = newest(out / "whole")
    assert found is not None
    assert {tensor.dtype for tensor in found.tensors("model").values()} <= {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in found.tensors("model").items() if "lora_B" in name)
    assert not fastkd.train(student, place / "cache", out / "parts", **changes, stop=stopped()).complete
    assert fastkd.train(student, place / "cache", out / "parts", **changes).resumed == 1
    assert bits(out / "whole", 3) == bits(out / "parts", 3)
    assert (out / "whole" / "student" / "adapter_model.safetensors").exists()
    with pytest.raises(TrainError, match=r"lora_merge: .* whose base is quantised, so that merging would round"):
        fastkd.train(student, place / "cache", out / "merged", **changes, lora_merge=True)


def test_codes(place: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"LlamaForCausalLM: got quantised weights, .* \(--lora-rank 16\)"):
        fastkd.train(coded(), place / "cache", tmp_path / "run", **TRAINED)
    trains(coded(), place, tmp_path, NEW)


def test_a_quantised_head(place: Path) -> None:
    """Its own module makes the logits, which is said."""
    student = make_student(adapted(base=coded(head=True)), None).student
    assert "full logits" in student.notes[0]
    output: Any = student.eval().run(student.probe())
    assert not isinstance(output.lm_head, LMHead)
    wanted = student.model(input_ids=student.probe().input_ids, use_cache=False).logits
    assert torch.equal(output.lm_head(output.states), wanted)


def test_four_bits_of_bitsandbytes(place: Path, tmp_path: Path) -> None:
    """As transformers loads them, where the package is installed."""
    pytest.importorskip("bitsandbytes")
    transformers = load_transformers()
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model_of("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    loaded.save_pretrained(tmp_path / "quantised")
    with pytest.raises(TrainError, match="quantised: got quantised weights, which cannot be trained"):
        fastkd.train(tmp_path / "quantised", place / "cache", tmp_path / "run", **TRAINED)
    student = make_student(tmp_path / "quantised", None, TrainSettings(lora_rank=3)).student
    assert not student.notes
    trains(tmp_path / "quantised", place, tmp_path, NEW)


def test_codes_are_not_sharded() -> None:
    check_sharded(TrainSettings(parallel="ddp"), coded(), "tiny", 2)
    with pytest.raises(TrainError, match="parallel: got 'fsdp' for tiny, whose base is quantised"):
        check_sharded(TrainSettings(parallel="fsdp"), coded(), "tiny", 2)
