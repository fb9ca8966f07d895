"""Copies without layers, heads, MLP units and hidden channels compute what the original with these masked does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import VOCAB, model_of
from torch import Tensor, nn

from fastkd.errors import TrainError
from fastkd.models.axes import FAMILIES, Shape, read_axes
from fastkd.models.hub import load_transformers
from fastkd.models.module import parameters_and_bytes
from fastkd.models.prune import Kept, prune, resized_config
from fastkd.models.pruned import OriginalLayers, original_layers
from fastkd.models.taps import layers_of

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
WIDE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "num_hidden_layers": 4,
        "mlp_bias": True}  # fmt: skip
CASES = [
    (name, tied)
    for number, name in enumerate(FAMILIES)
    for tied in (False, True)
    if name == "gemma" or number % 2 == tied
]


def teacher_of(name: str, tied: bool = False) -> Any:
    """In float64 (norms compute in float32 even so), with weights away from their initial values: none is 0 or 1."""
    changes: dict[str, Any] = dict(WIDE)
    if name == "gpt2":
        changes = {"n_layer": 4, "n_head": 4, "n_inner": 64, "bos_token_id": 0, "eos_token_id": 1}
    if name == "gemma3_text":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    if name == "smollm3":
        changes["no_rope_layers"] = [1, 0, 1, 1]
    if name in ("llama", "qwen3"):
        changes["attention_bias"] = True
    model = model_of(name.removesuffix("_text"), dtype=torch.float64, tie_word_embeddings=tied, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@contextmanager
def masked(model: Any, axes: Any, kept: Kept) -> Iterator[None]:
    """The original with the removed parts masked, in obvious lines; see `fastkd.models.prune`."""
    handles: list[Any] = []
    hidden = torch.zeros(axes.shape.hidden, dtype=torch.float64)
    hidden[slice(None) if kept.hidden is None else kept.hidden] = 1
    share = float(hidden.mean())

    def input_times(module: nn.Module, mask: Tensor) -> None:
        handles.append(module.register_forward_pre_hook(lambda _, given: (given[0] * mask, *given[1:])))

    def norm(module: Any, given: tuple[Tensor], result: Tensor) -> Tensor:
        x, weight = given[0] * hidden, module.weight
        if isinstance(module, nn.LayerNorm):
            x = (x - x.sum(-1, keepdim=True) / hidden.sum()) * hidden
        eps = next(getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n))
        y = x / (x.square().mean(-1, keepdim=True) + eps * share).sqrt()
        y = y * (1 + weight if axes.family.startswith("gemma") else weight)
        return (y if getattr(module, "bias", None) is None else y + module.bias) * hidden

    def times_hidden(module: nn.Module, given: Any, result: Tensor) -> Tensor:
        return result * hidden

    for number, layer in enumerate(layers_of(model)):
        if number not in kept.layers:
            layer.forward = lambda states, *_, **__: states
            continue
        modules = dict(layer.named_modules())
        out = modules.get("self_attn.o_proj") or modules["attn.c_proj"]
        heads = torch.zeros(axes.shape.groups, axes.query_heads * axes.head_width, dtype=torch.float64)
        heads[kept.groups.get(number, slice(None))] = 1
        input_times(out, heads.flatten())
        down = modules.get("mlp.down_proj") or modules["mlp.c_proj"]
        units = torch.zeros(axes.shape.mlp, dtype=torch.float64)
        units[kept.mlp.get(number, slice(None))] = 1
        input_times(down, units)
        handles += [module.register_forward_hook(times_hidden) for module in (out, down)]
        norms = [m for n, m in modules.items() if "." not in n and "norm" in type(m).__name__.lower()]
        handles += [module.register_forward_hook(norm) for module in norms]
    for name, module in model.base_model.named_children():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(times_hidden))
        elif name in ("norm", "ln_f"):
            handles.append(module.register_forward_hook(norm))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers_of(model):
            layer.__dict__.pop("forward", None)


def kept_of(axes: Any, seed: int = 0, layers: tuple[int, ...] = (0, 2, 3)) -> Kept:
    """Something of each, at random."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int, most: int) -> Tensor:
        return torch.randperm(most, generator=generator)[:count].sort().values

    whole = axes.shape
    groups = whole.groups - 1
    hidden = groups * axes.head_width if axes.coupled else whole.hidden - 12
    return Kept(
        layers, some(hidden, whole.hidden), {n: some(groups, whole.groups) for n in layers},
        {n: some(whole.mlp - 9, whole.mlp) for n in layers},
    )  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_it_is_the_original_with_the_rest_masked(name: str, tied: bool, tmp_path: Path) -> None:
    teacher = teacher_of(name, tied)
    axes = read_axes(teacher)
    assert axes.tied == tied
    assert axes.parameters(axes.shape) == parameters_and_bytes(teacher)[0]
    before = logits(teacher)
    whole = prune(teacher, axes, Kept.all_of(axes))
    torch.testing.assert_close(logits(whole), before, rtol=1e-5, atol=1e-6)
    kept = kept_of(axes)
    only = {name: value for name, value in vars(Kept.all_of(axes)).items() if name != "hidden"}
    parts = {
        "layers": replace(Kept.all_of(axes), layers=kept.layers),
        "mlp": Kept(**only | {"mlp": dict.fromkeys(range(4), kept.mlp[0])}),
        "everything": kept,
    }
    if not axes.coupled:
        parts["groups"] = Kept(**only | {"groups": dict.fromkeys(range(4), kept.groups[0])})
        parts["hidden"] = replace(Kept.all_of(axes), hidden=kept.hidden)
    for part, one in parts.items():
        pruned = prune(teacher, axes, one)
        with masked(teacher, axes, one):
            expected = logits(teacher)
        torch.testing.assert_close(logits(pruned), expected, rtol=1e-4, atol=2e-5, msg=lambda m, p=part: f"{p}: {m}")
        assert not torch.allclose(expected, before, rtol=1e-2)
        assert read_axes(pruned).shape == one.shape(axes)
        assert axes.parameters(one.shape(axes)) == parameters_and_bytes(pruned)[0], part
    assert torch.equal(logits(teacher), before)
    # and again from its files, with keys and values of earlier tokens
    pruned.save_pretrained(tmp_path)
    loaded = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(loaded), logits(pruned))
    with torch.no_grad():
        first = loaded(input_ids=TOKENS[:, :12], use_cache=True)
        rest = loaded(input_ids=TOKENS[:, 12:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), logits(pruned), rtol=1e-4, atol=2e-5)


def test_a_copy_of_a_copy() -> None:
    teacher = teacher_of("llama")
    axes = read_axes(teacher)
    once = prune(teacher, axes, kept_of(axes))
    assert original_layers(once) == OriginalLayers((0, 2, 3), 4)
    inner = read_axes(once)
    twice = kept_of(inner, seed=1, layers=(0, 2))
    pruned = prune(once, inner, twice)
    assert original_layers(pruned) == OriginalLayers((0, 3), 4)
    with masked(once, inner, twice):
        expected = logits(once)
    torch.testing.assert_close(logits(pruned), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_of_any_size(name: str) -> None:
    """Of random weights: nothing but the shape changes, and the number of parameters is that of the formula."""
    teacher = teacher_of(name)
    axes = read_axes(teacher)
    shape = Shape(3, 16 if axes.coupled else 24, 2, 40)
    config = resized_config(teacher.config, axes, shape)
    made = load_transformers().AutoModelForCausalLM.from_config(config)
    assert parameters_and_bytes(made)[0] == axes.parameters(shape)
    assert read_axes(made).shape == shape
    assert original_layers(made) is None
    assert logits(made).isfinite().all()


def test_refused() -> None:
    with pytest.raises(TrainError, match=r"MixtralForCausalLM: got a mixture of experts; expected .* one MLP a layer"):
        read_axes(model_of("mixtral"))
    with pytest.raises(TrainError, match="got a model of type 'opt'; expected one of llama, "):
        read_axes(model_of("opt"))
    with pytest.raises(TrainError, match="scale_attn_by_inverse_layer_idx"):
        read_axes(model_of("gpt2", scale_attn_by_inverse_layer_idx=True))
    model = model_of("llama")
    model.model.layers[1].extra = nn.Linear(4, 4)
    with pytest.raises(
        TrainError, match=r"a parameter 'model.layers.1.extra.weight' of shape \(4, 4\); expected .* of"
    ):
        read_axes(model)
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 60, bias=False)
    with pytest.raises(TrainError, match=r"layers.1.mlp.up_proj.weight of shape \(60, 32\); expected \(64, 32\)"):
        read_axes(model)
