"""Smoothing: the same logits, in float32, and less lost where inputs of layers have 8 bits."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import VOCAB, model_of
from torch import Tensor, nn

from fastkd.deploy.model import Deployable, load_deployable
from fastkd.deploy.smoothing import POSITIONS, DividedEmbedding, smoothed
from fastkd.models.quantization import NOTE, SCHEMES, fake_quantize, fake_quantize_rows, quantised_modules

IDS = torch.randint(0, VOCAB, (64, 1, 16), generator=torch.Generator().manual_seed(0))


def outlying(name: str, factor: float = 25.0, **changes: Any) -> Deployable:
    """A model in which a few channels of what norms give are `factor` larger than the others, and the weights that they
    meet as much smaller, as in trained models."""
    model = model_of(name, initializer_range=0.2, hidden_size=64, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += torch.rand(parameter.shape, generator=generator) / 4
            if key.endswith(("layernorm.weight", "model.norm.weight", "up_proj.weight")):
                parameter[::23] *= factor
            if key.endswith(tuple(f"{layer}_proj.weight" for layer in ("q", "k", "v", "gate", "up", "down"))):
                parameter[:, ::23] /= factor
    return load_deployable(model)


def logits_of(model: Deployable) -> Tensor:
    with torch.no_grad():
        return model.plain(IDS[:4, 0])


def in_8_bits(model: Deployable) -> Tensor:
    """The logits with weights and inputs of all linear layers in 8 bits, a scale for each output channel and row."""
    found = copy.deepcopy(model)
    for module, how in list(quantised_modules(found.model, SCHEMES["int8"])):
        module.weight = nn.Parameter(fake_quantize(module.weight, how))
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (fake_quantize_rows(args[0]),))
    return logits_of(found)


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("llama", {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}, 7),
        ("llama", {"tie_word_embeddings": False}, 7),
        ("gemma", {"head_dim": 8}, 7),  # its norms multiply by 1 + weight, its embedding by 8, and its head is tied
        ("qwen3", {}, 7),  # its norms of queries and keys are followed by no layer
        ("phi", {}, 3),  # layer norms with biases, and no gate
    ],
)
def test_logits_are_the_same(name: str, changes: dict[str, Any], count: int) -> None:
    model = outlying(name, **changes)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    expected = logits_of(model)
    found, notes = smoothed(model, iter(IDS))
    assert not notes
    assert (logits_of(found) - expected).abs().max() < 1e-5 * expected.abs().max()
    after = found.model.state_dict()
    ups = [key for key in before if key.endswith(("up_proj.weight", "norm.weight", "layernorm.weight"))]
    assert sum(not torch.equal(before[key], after[key]) for key in ups) == count
    # and the model that was given is as it was
    assert all(torch.equal(before[key], value) for key, value in model.model.state_dict().items())
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_8_bits_cost_less(tied: bool) -> None:
    model = outlying("llama", tie_word_embeddings=True)
    expected = logits_of(model)
    found, notes = smoothed(model, IDS, tied=tied)
    assert not notes
    ends: Any = found.model
    assert ends.get_input_embeddings().weight is ends.get_output_embeddings().weight
    assert isinstance(ends.get_input_embeddings(), DividedEmbedding) == tied
    assert (in_8_bits(found) - expected).norm() < (0.4 if tied else 0.6) * (in_8_bits(model) - expected).norm()


def test_few_inputs_are_read() -> None:
    read = []

    def batches() -> Iterator[Tensor]:
        for ids in IDS:
            read.append(ids.numel())
            yield ids

    smoothed(outlying("llama"), batches())
    assert sum(read) == POSITIONS


class Block(nn.Module):
    """A norm before a linear layer; with `beside`, what the norm gives is also added to the result."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.embedding, self.norm, self.linear = nn.Embedding(VOCAB, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.beside = beside

    def forward(self, ids: Tensor) -> Tensor:
        states = self.norm(self.embedding(ids))
        found: Tensor = self.linear(states) + self.beside * states
        return found


def test_a_norm_that_something_else_reads_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model = load_deployable(Block(beside=True))
    found, notes = smoothed(model, IDS)
    assert found is model
    assert len(notes) == 1
    assert notes[0].startswith("inputs of layers are not smoothed: logits would differ by ")
    assert smoothed(load_deployable(Block(beside=False)), IDS)[1] == []


def test_without_a_cache_and_after_training_in_8_bits_nothing_is_changed(tmp_path: Path) -> None:
    model = outlying("llama")
    found, notes = smoothed(model, None)
    assert found is model
    assert "needs a cache" in notes[0]
    (tmp_path / "config.json").write_text(json.dumps({NOTE: {"scheme": "int8"}}))
    trained = replace(model, folder=tmp_path)
    assert smoothed(trained, IDS) == (trained, [])
