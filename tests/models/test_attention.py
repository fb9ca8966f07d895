"""What a layer's attention is read as gives its own maps; whatever is not reproduced is refused."""

import json
from typing import Any

import pytest
import torch
from hf_cases import USUAL, VOCAB, model_of
from safetensors.torch import load, save

from fastkd.errors import TeacherError
from fastkd.kernels import HiddenTargets
from fastkd.models.attention import from_bytes, read_attention, to_bytes
from fastkd.models.hub import load_transformers
from fastkd.models.taps import Taps

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {**USUAL, "head_dim": 16}),
    "olmo2": ("Olmo2", USUAL),
    "neox": ("GPTNeoX", {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                         "num_attention_heads": 4}),
    "gpt_oss": ("GptOss", {**USUAL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                           "layer_types": ["full_attention"] * 2}),
    # queries are scaled by their position, from 32 positions on
    "ministral3": ("Ministral3", {**USUAL, "head_dim": 8, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
        "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "llama4": ("Llama4Text", {**USUAL, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2,
                              "no_rope_layers": [0, 0], "floor_scale": 32}),
}  # fmt: skip


def model_with_large_weights(kind: str) -> Any:
    """A model whose maps are far from uniform, and whose norms and biases matter."""
    if kind in MORE:
        name, arguments = MORE[kind]
        transformers = load_transformers()
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**arguments)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        model = model_of(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


READ = ["llama", "gpt2", "gemma2", "gemma3", "cohere", "phi", "qwen3", "olmo2", "neox"]


@pytest.mark.parametrize("kind", READ)
def test_attention_follows_from_the_state_that_enters_the_layer(kind: str) -> None:
    model = model_with_large_weights(kind)
    attention = read_attention(model, 1)
    tokens = torch.randint(0, 90, (2, 17), generator=torch.Generator().manual_seed(3))
    model.set_attn_implementation("eager")
    with Taps(model, ["1", *dict.fromkeys(attention.outputs)]) as taps:
        maps = model.base_model(input_ids=tokens, use_cache=False, output_attentions=True).attentions[1]
    positions = torch.arange(17).expand(2, 17)
    student = attention.of_outputs(taps.values, positions)
    block = from_bytes(to_bytes(attention.block()))
    states = taps.values["1"].detach().flatten(0, 1)
    teacher = block.queries_keys_values(states, positions.flatten())
    coded = block.queries_keys_values(HiddenTargets.from_states(states, step=1e-4), positions.flatten())
    for one, other, third in zip(student[:3], teacher[:3], coded[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(third, other, rtol=2e-3, atol=2e-3)
    q, k, scale = student.queries, student.keys, student.logit_scale
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.view(2, 17, *q.shape[1:]), k.view(2, 17, *k.shape[1:])) * scale
    if student.softcap is not None:
        logits = student.softcap * torch.tanh(logits / student.softcap)
    mine = logits.masked_fill(torch.ones(17, 17, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert float(maps.detach()[:, :, -1].max()) > 0.07
    torch.testing.assert_close(mine, maps, rtol=0, atol=1e-5)
    mine.square().sum().backward()
    assert all(parameter.grad is not None for parameter in list(model.parameters())[:2])


@pytest.mark.parametrize(
    ("kind", "layer", "context", "message"),
    [
        ("minicpm3", 0, None, "multi-head latent attention"),
        ("gemma2", 0, 5, r"attends to the last 4 positions only; expected all of the context \(5\)"),
        ("gemma3", 0, None, "attends to the last 4 positions"),
        ("phi3", 1, 64, "changes beyond 32 positions"),
        ("bloom", 1, None, "not reproduced from the state that enters it"),
        ("gpt_oss", 1, None, "not reproduced"),  # its attention has sinks
        ("bert", 0, None, "not reproduced"),
        ("mamba", 0, None, "no attention maps"),
        ("ministral3", 1, 64, "not reproduced"),
        ("llama4", 1, 32, "scales queries by their position from 32 positions on"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_reproduced_is_refused(kind: str, layer: int, context: int | None, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        read_attention(model_with_large_weights(kind), layer, context=context)


def test_scaling_by_position_beyond_the_context_is_none() -> None:
    for kind in ("ministral3", "llama4"):
        assert read_attention(model_with_large_weights(kind), 1, context=31).heads == 4


def test_maps_of_half_precision_that_are_nearly_uniform_are_told_apart() -> None:
    """Their differences are below what half precision rounds."""
    model = model_with_large_weights("llama")
    attention = model.base_model.layers[1].self_attn
    with torch.no_grad():
        attention.q_proj.weight.mul_(2e-3 / attention.q_proj.weight.std())
    model.bfloat16()
    read_attention(model, 1)
    handle = attention.q_proj.register_forward_hook(lambda m, a, out: out.roll(1, -1))
    with pytest.raises(TeacherError, match="not reproduced"):
        read_attention(model, 1)
    handle.remove()


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert read_attention(model_with_large_weights("phi3"), 1, context=32).rotary is not None
    model = model_of("gemma2", sliding_window=64)
    assert read_attention(model, 0, context=64).softcap == 50.0
    model = model_of("llama")
    model.set_attn_implementation("sdpa")
    read_attention(model, 0)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_that_does_something_else_is_refused() -> None:
    model = model_with_large_weights("llama")
    module = model.base_model.layers[1].self_attn.q_proj
    handle = module.register_forward_hook(lambda m, a, out: out * 1.01)
    with pytest.raises(TeacherError, match="expected at most 1e-05"):
        read_attention(model, 1)
    handle.remove()
    read_attention(model, 1)
    with pytest.raises(TeacherError, match="no model of transformers"):
        read_attention(torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)])), 0)


def test_bytes_that_are_no_block_are_refused() -> None:
    data = to_bytes(read_attention(model_of("llama"), 0).block())
    tensors = load(data)
    deep = save(tensors, {"settings": "[" * 100_000})
    uncapped = data.replace(b'\\"softcap\\": null', b'\\"softcap\\": 0   ')
    assert uncapped != data
    for damaged in (b"", data[:100], data[:-4], b"x" * 200, data.replace(b"heads", b"hands"), deep, uncapped):
        with pytest.raises(ValueError, match="no attention block"):
            from_bytes(damaged)
    settings = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    with pytest.raises(ValueError, match="NaN or infinity in key"):
        from_bytes(save({**tensors, "key": tensors["key"] / 0}, settings))
