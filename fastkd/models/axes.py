"""Along what the dimensions of a language model's tensors run: hidden width, attention heads, the MLP's width.

axes = read_axes(teacher)
axes.shape  # Shape(layers=30, hidden=576, groups=3, mlp=1536)
axes.parameters(replace(axes.shape, mlp=1024))  # of a copy with a narrower MLP
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal, NamedTuple

from ..errors import TrainError
from .taps import layers_of

Axis = Literal["hidden", "query", "key", "query_key_value", "mlp"]
Role = Literal["", "embedding", "lm_head", "norm", "final_norm"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "gpt2")
"""Model types whose parts can be removed; each is tested against the original with these parts masked."""
_WHOLE_HEADS = ("llama", "gemma2", "gemma3_text")  # whose configs refuse a hidden width that heads do not divide
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LAYER = re.compile(r"(?P<layers>(?:\w+\.)*(?:layers|h))\.(?P<number>\d+)\.(?P<rest>.+)")
# of an nn.Linear: outputs, inputs; of transformers' Conv1D: inputs, outputs
_LINEAR: dict[str, tuple[Axis, Axis]] = {
    "self_attn.q_proj": ("query", "hidden"), "self_attn.k_proj": ("key", "hidden"),
    "self_attn.v_proj": ("key", "hidden"), "self_attn.o_proj": ("hidden", "query"),
    "mlp.gate_proj": ("mlp", "hidden"), "mlp.up_proj": ("mlp", "hidden"), "mlp.down_proj": ("hidden", "mlp"),
}  # fmt: skip
_CONV1D: dict[str, tuple[Axis, Axis]] = {
    "attn.c_attn": ("hidden", "query_key_value"), "attn.c_proj": ("query", "hidden"),
    "mlp.c_fc": ("hidden", "mlp"), "mlp.c_proj": ("mlp", "hidden"),
}  # fmt: skip
_EMBEDDINGS = ("embed_tokens", "wte", "wpe")
_FINAL_NORMS = ("norm", "ln_f")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Shape:
    """The size of a language model, apart from its vocabulary and the width of a head.

    layers: L. hidden: D. groups: key-value heads, each with its query heads. mlp: the MLP's inner width.
    """

    layers: int
    hidden: int
    groups: int
    mlp: int

    @property
    def text(self) -> str:
        named = {"layers": self.layers, "hidden": self.hidden, "key-value heads": self.groups, "MLP": self.mlp}
        return ", ".join(f"{name} {size}" for name, size in named.items())


AXES = tuple(field.name for field in fields(Shape))


class TensorAxes(NamedTuple):
    """axes: of each dimension; None: it never changes. sizes: of each dimension. layer: its number, None outside the
    layers. role: what it is, where its values depend on the hidden width."""

    axes: tuple[Axis | None, ...]
    sizes: tuple[int, ...]
    layer: int | None
    role: Role


@dataclass(frozen=True)
class ModelAxes:
    """A model's shape, and the axes of its parameters by their names, shared ones once.

    family: its model_type. query_heads: for each key-value head. head_width: d. layers: the name of the list of layers.
    tied: whether the LM head is the embeddings. coupled: whether its hidden width is heads · d (GPT-2), so that heads
    and hidden width can only be removed together.
    """

    family: str
    shape: Shape
    query_heads: int
    head_width: int
    layers: str
    tied: bool
    coupled: bool
    tensors: Mapping[str, TensorAxes]

    def allows(self, shape: Shape) -> bool:
        """Whether a config of the family can have this shape."""
        heads = shape.groups * self.query_heads
        if self.coupled:
            return shape.hidden == heads * self.head_width
        return self.family not in _WHOLE_HEADS or shape.hidden % heads == 0

    def sizes(self, shape: Shape) -> dict[str, int]:
        """The length of each axis."""
        key = shape.groups * self.head_width
        query = key * self.query_heads
        return {
            "hidden": shape.hidden, "query": query, "key": key, "query_key_value": query + 2 * key, "mlp": shape.mlp,
        }  # fmt: skip

    def tensor_sizes(self, shape: Shape) -> list[tuple[str, tuple[int, ...], int]]:
        """Of a copy with another shape: the name of each parameter (of its first layer), its sizes, and how many."""
        sizes = self.sizes(shape)
        return [
            (
                name,
                tuple(n if axis is None else sizes[axis] for n, axis in zip(one.sizes, one.axes, strict=True)),
                1 if one.layer is None else shape.layers,
            )
            for name, one in self.tensors.items()
            if not one.layer
        ]

    def parameters(self, shape: Shape) -> int:
        """The number of parameters of a copy with another shape."""
        return sum(count * prod(sizes) for _, sizes, count in self.tensor_sizes(shape))


def read_axes(model: Any) -> ModelAxes:
    """The axes of a causal language model of transformers.

    Raises TrainError, which says why, for a mixture of experts, a model of another family than `FAMILIES`, and one with
    parameters that are not known.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    kind = getattr(config, "model_type", "")
    if any(getattr(config, key, None) for key in _EXPERTS):
        raise TrainError(
            f"{name}: got a mixture of experts; expected a model with one MLP a layer ({', '.join(FAMILIES)}), as the "
            "experts' use is not measured."
        )
    if kind not in FAMILIES:
        raise TrainError(f"{name}: got a model of type {kind!r}; expected one of {', '.join(FAMILIES)}.")
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise TrainError(f"{name}: got scale_attn_by_inverse_layer_idx; expected layers that do not know their number.")
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    hidden = config.hidden_size
    width = getattr(config, "head_dim", None) or hidden // heads
    parameters = {key: tuple(p.shape) for key, p in model.named_parameters()}
    found = {key: _read(key, sizes, width) for key, sizes in parameters.items()}
    if unknown := [key for key, one in found.items() if one is None]:
        raise TrainError(
            f"{name}: got a parameter {unknown[0]!r} of shape {parameters[unknown[0]]}; expected those of {kind} alone."
        )
    tensors = {key: one for key, one in found.items() if one is not None}
    mlp = next(one.sizes[one.axes.index("mlp")] for one in tensors.values() if "mlp" in one.axes)
    shape = Shape(len(layers_of(model)), hidden, groups, mlp)
    lists = {match["layers"] for key in parameters if (match := _LAYER.fullmatch(key))}
    axes = ModelAxes(
        kind, shape, heads // groups, width, lists.pop(),
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        coupled=kind == "gpt2", tensors=tensors,
    )  # fmt: skip
    sizes = axes.sizes(shape)
    for key, one in tensors.items():
        expected = tuple(n if axis is None else sizes[axis] for n, axis in zip(one.sizes, one.axes, strict=True))
        if one.sizes != expected:
            raise TrainError(f"{name}: got {key} of shape {one.sizes}; expected {expected}, by its config.")
    return axes


def _read(name: str, sizes: tuple[int, ...], width: int) -> TensorAxes | None:
    """The axes of a parameter by its name; None if it is not known. width: of a head."""
    module, _, kind = name.rpartition(".")
    match = _LAYER.fullmatch(module)
    if match is None:
        last = module.rpartition(".")[2]
        if last in _EMBEDDINGS and kind == "weight":
            return TensorAxes((None, "hidden"), sizes, None, "embedding")
        if module == "lm_head":
            return TensorAxes((None, "hidden") if kind == "weight" else (None,), sizes, None, "lm_head")
        if last in _FINAL_NORMS:
            return TensorAxes(("hidden",), sizes, None, "final_norm" if kind == "weight" else "")
        return None
    layer, part = int(match["number"]), match["rest"]
    if part in _LINEAR or part in _CONV1D:
        pair = _LINEAR.get(part) or _CONV1D[part]
        return TensorAxes(pair if kind == "weight" else (pair[part in _CONV1D],), sizes, layer, "")
    if part in _HEAD_NORMS and sizes == (width,):
        return TensorAxes((None,), sizes, layer, "")
    if "." not in part and len(sizes) == 1:  # the norms of a layer
        return TensorAxes(("hidden",), sizes, layer, "norm" if kind == "weight" else "")
    return None
