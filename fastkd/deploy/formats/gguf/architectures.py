"""The architectures that GGUF names: their hyperparameters, and their weights as llama.cpp expects them.

| of transformers | in GGUF | weights that differ |
|---|---|---|
| Llama, Mistral | llama | rows of q and k: RoPE there rotates neighbours, in transformers halves of a head |
| Qwen2, Qwen3 | qwen2, qwen3 | – |
| Gemma, Gemma 2, Gemma 3 (text) | gemma, gemma2, gemma3 | norms: w + 1, which transformers adds in the forward |
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ....errors import ExportError
from ...model import Deployable

Floats = NDArray[np.float32]
_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Architecture:
    """name: in GGUF. permuted: rows of q and k are reordered. norm_offset: added to the weights of norms. activation:
    the one that llama.cpp computes. every: the last of each `every` layers attends to all positions, the others to a
    sliding window; None: all attend to all. soft_caps: it caps attention scores and logits."""

    name: str
    permuted: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    every: int | None = None
    soft_caps: bool = False


LLAMA = Architecture("llama", permuted=True)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_offset=1.0, activation=_GELU),
    "gemma2": Architecture("gemma2", norm_offset=1.0, activation=_GELU, every=2, soft_caps=True),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, activation=_GELU, every=6),
}
"""By transformers' model_type."""


def architecture_of(model: Deployable) -> Architecture:
    """The architecture of a model. Raises ExportError for one that GGUF does not name, or that llama.cpp would not
    compute as transformers does."""
    config = model.config
    if model.kind != "text" or config is None:
        kind = "a classifier" if model.kind != "text" else f"{type(model.model).__name__}, a module"
        raise ExportError(f"to: got 'gguf' for {model.name}, {kind}; expected a language model of transformers.")
    if (found := ARCHITECTURES.get(config.model_type)) is None:
        raise ExportError(
            f"to: got 'gguf' for {model.name}, whose model_type is {config.model_type!r}; expected one of "
            f"{', '.join(ARCHITECTURES)}. Export it to onnx."
        )
    if problem := _problem(config, found):
        raise ExportError(
            f"to: got 'gguf' for {model.name} with {problem}, as llama.cpp computes {found.name}. Export it to onnx."
        )
    return found


def _problem(config: Any, found: Architecture) -> str | None:
    """Why llama.cpp would compute something else, as "...; expected ...", or None."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != found.activation:
        return f"hidden_act {activation!r}; expected {found.activation!r}"
    for parameters in _rope(config):
        kind = parameters.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3", "yarn"):
            return f"RoPE scaling {kind!r}; expected linear, llama3, yarn or none"
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            return f"partial_rotary_factor {parameters['partial_rotary_factor']}; expected 1.0"
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [_FULL] * count
    if found.every is None and getattr(config, "sliding_window", None) and config.model_type == "mistral":
        kinds = [_SLIDING] * count
    if kinds != (expected := layer_kinds(found, count)):
        which = next(n for n, (a, b) in enumerate(zip(kinds, expected, strict=True)) if a != b)
        return f"{kinds[which]} in layer {which}; expected {expected[which]}"
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale is not None and scale != head_dim(config) and not _is_27b(config):
        return f"query_pre_attn_scalar {scale}; expected head_dim, {head_dim(config)}"
    caps = (getattr(config, "attn_logit_softcapping", None), getattr(config, "final_logit_softcapping", None))
    if [cap is not None for cap in caps] != [found.soft_caps] * 2:
        return f"softcapping {caps}; expected {'both' if found.soft_caps else 'none'}"
    return None


_FULL, _SLIDING = "full_attention", "sliding_attention"


def layer_kinds(found: Architecture, count: int) -> list[str]:
    """Which layers attend to all positions, as llama.cpp takes it to be."""
    return [_SLIDING if found.every and (n + 1) % found.every else _FULL for n in range(count)]


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _is_27b(config: Any) -> bool:
    """Gemma 2 and 3 of 27 billion, of which llama.cpp knows, by their layers, that they scale by the width."""
    layers = {"gemma2": 46, "gemma3_text": 62}.get(config.model_type)
    by_width = config.query_pre_attn_scalar == config.hidden_size // config.num_attention_heads
    return bool(config.num_hidden_layers == layers and by_width)


def _rope(config: Any) -> list[dict[str, Any]]:
    """The parameters of RoPE: of the layers that attend to all, and then, if they differ, of those with a window."""
    parameters = config.rope_parameters
    if _FULL in parameters:
        return [parameters[_FULL], parameters[_SLIDING]]
    return [parameters]


def add_hyperparameters(writer: Any, model: Deployable) -> None:
    """Write what llama.cpp has to know of a model. writer: a GGUFWriter."""
    import gguf

    config, found = model.config, ARCHITECTURES[model.config.model_type]
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_positions or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if found.every is not None:
        writer.add_sliding_window(config.sliding_window)
    if found.soft_caps:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope, *local = _rope(config)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if local:
        writer.add_rope_freq_base_swa(local[0]["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)


def tensors(model: Deployable) -> Iterator[tuple[str, str, Tensor]]:
    """The weights, in the order of the model: name in GGUF, name in transformers, float32 values. One that is tied to
    another is written once."""
    import gguf

    module: Any = model.model
    config, found = model.config, ARCHITECTURES[model.config.model_type]
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == found.name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tied = module.get_input_embeddings().weight is module.get_output_embeddings().weight
    for name, weight in module.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if (named := names.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            raise ExportError(
                f"to: got 'gguf' for {model.name} with the weight {name}, which {found.name} does not name there. "
                "Export it to onnx."
            )
        if found.norm_offset and name.endswith("norm.weight"):
            weight = weight + found.norm_offset
        if found.permuted and (which := re.search(r"\.([qk])_proj\.", name)):
            weight = _neighbours(weight, config.num_attention_heads if which[1] == "q" else config.num_key_value_heads)
        yield named, name, weight.detach().float()
    rope = _rope(config)[0]
    if rope.get("rope_type") == "llama3":
        dimensions = head_dim(config)
        plain = rope["rope_theta"] ** -(np.arange(0, dimensions, 2, dtype=np.float64) / dimensions)
        scaled = module.get_decoder().rotary_emb.inv_freq
        yield "rope_freqs.weight", "rotary_emb.inv_freq", scaled.new_tensor(plain) / scaled.float()


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k `[heads · d, ...]` such that the two that RoPE rotates together, n and n + d/2 of a head, are
    neighbours."""
    halves: Tensor = rows.unflatten(0, (heads, 2, -1))  # type: ignore[no-untyped-call]
    return halves.transpose(1, 2).flatten(0, 2).contiguous()
