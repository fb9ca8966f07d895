"""A copy of a language model without some of its layers, heads, MLP units and hidden channels.

pruned = prune(teacher, axes, replace(Kept.all_of(axes), layers=(0, 1, 3)))

The copy computes exactly what the original does in which the removed parts are masked:
- layers return their input;
- of a key-value head, the outputs of its query heads are 0 before the output projection;
- an MLP unit is 0 after the activation;
- a hidden channel is 0 wherever it is written (embeddings, attention, MLP) and read (norms, LM head), and the norms
  take the mean (and variance) of the channels that remain, times D'/D for D' of D: as if the others held their mean (0
  for RMSNorm). For this, the weights of norms are multiplied by sqrt(D/D') and, where a model multiplies its embeddings
  by sqrt(D) (Gemma), the embeddings too; a norm's epsilon acts as one of D'/D its size.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .axes import ModelAxes, Shape, TensorAxes
from .pruned import cut_layer_lists, note_original_layers

_OFFSET_NORMS = ("gemma", "gemma2", "gemma3_text")  # multiply by 1 + weight; and the embeddings by sqrt(D)
_NAMES = {  # in configs, of each axis
    "layers": ("num_hidden_layers", "n_layer"), "hidden": ("hidden_size", "n_embd"),
    "groups": ("num_key_value_heads",), "mlp": ("intermediate_size", "n_inner"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Kept:
    """What of a model stays. All numbers are the original's, ascending.

    layers: of layers. hidden: `[D']` of hidden channels, the same in all layers; None: all. groups, mlp: by layer,
    `[G']` of key-value heads (with their query heads) and `[M']` of MLP units, as many in each; without an entry: all.
    """

    layers: tuple[int, ...]
    hidden: Tensor | None = None
    groups: Mapping[int, Tensor] = field(default_factory=dict)
    mlp: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def all_of(cls, axes: ModelAxes) -> "Kept":
        return cls(tuple(range(axes.shape.layers)))

    def shape(self, axes: ModelAxes) -> Shape:
        """The shape of the copy."""
        whole, first = axes.shape, self.layers[0]
        return Shape(
            len(self.layers),
            whole.hidden if self.hidden is None else len(self.hidden),
            len(self.groups[first]) if first in self.groups else whole.groups,
            len(self.mlp[first]) if first in self.mlp else whole.mlp,
        )


def resized_config(config: Any, axes: ModelAxes, shape: Shape, layers: Sequence[int] | None = None) -> Any:
    """A model's config with another shape; it differs in nothing else. layers: the original numbers of its layers, to
    be noted in it; None for a model that is no copy."""
    config = copy.deepcopy(config)
    text, before = config.get_text_config(), axes.shape
    if layers is not None and len(layers) < before.layers:
        note_original_layers(SimpleNamespace(config=config), layers, before.layers)
    if shape.layers != before.layers:
        cut_layer_lists(text, range(shape.layers) if layers is None else layers, before.layers)
    for name, names in _NAMES.items():
        if (size := getattr(shape, name)) != getattr(before, name):
            present = next((n for n in names if hasattr(text, n)), None)
            if present is not None:
                setattr(text, present, size)
    if shape.groups != before.groups:
        text.num_attention_heads = shape.groups * axes.query_heads
    if (shape.hidden, shape.groups) != (before.hidden, before.groups) and not axes.coupled:
        text.head_dim = axes.head_width  # otherwise hidden size / heads
    return config


@torch.no_grad()
def prune(model: Any, axes: ModelAxes, kept: Kept) -> Any:
    """The copy, in evaluation mode. Tensors of which everything stays are shared with the original."""
    factors = _factors(axes, kept)
    places = {number: place for place, number in enumerate(kept.layers)}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.named_parameters():
        one = axes.tensors[name]
        if one.layer is not None:
            if one.layer not in places:
                continue
            name = name.replace(f"{axes.layers}.{one.layer}.", f"{axes.layers}.{places[one.layer]}.", 1)
        tensors[name] = _sliced(tensor.detach(), one, axes, kept, factors)
    config = resized_config(model.config, axes, kept.shape(axes), kept.layers)
    # from_pretrained makes no random weights, and fills what is not in a state dict, such as rotary frequencies
    made = type(model).from_pretrained(None, config=config, state_dict=tensors, dtype=model.dtype)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


def _factors(axes: ModelAxes, kept: Kept) -> dict[str, float]:
    """By what tensors are multiplied, by their role, so that fewer hidden channels compute the same."""
    if kept.hidden is None or len(kept.hidden) == axes.shape.hidden:
        return {}
    root = (axes.shape.hidden / len(kept.hidden)) ** 0.5
    if axes.family not in _OFFSET_NORMS:
        return {"norm": root, "final_norm": root}
    # an LM head that is tied to the embeddings is multiplied as well, which the final norm takes back
    return {"norm": root, "embedding": root, "final_norm": 1.0 if axes.tied else root}


def _sliced(tensor: Tensor, one: TensorAxes, axes: ModelAxes, kept: Kept, factors: Mapping[str, float]) -> Tensor:
    for dimension, axis in enumerate(one.axes):
        if axis is not None and (index := _index(axis, one.layer, axes, kept)) is not None:
            tensor = tensor.index_select(dimension, index.to(tensor.device))
    if (factor := factors.get(one.role, 1.0)) == 1.0:
        return tensor
    if one.role != "embedding" and axes.family in _OFFSET_NORMS:
        return (1 + tensor) * factor - 1
    return tensor * factor


def _index(axis: str, layer: int | None, axes: ModelAxes, kept: Kept) -> Tensor | None:
    """What stays of an axis; None: everything."""
    if axis == "hidden":
        return kept.hidden
    if layer is None:
        return None
    if axis == "mlp":
        return kept.mlp.get(layer)
    groups = kept.groups.get(layer)
    if groups is None:
        return None
    key, query = (spread(groups, n) for n in (axes.head_width, axes.head_width * axes.query_heads))
    if axis == "query_key_value":
        start = axes.sizes(axes.shape)["query"]
        return torch.cat([query, start + key, start + axes.sizes(axes.shape)["key"] + key])
    return key if axis == "key" else query


def spread(numbers: Tensor, width: int) -> Tensor:
    """The numbers of the components of some blocks of `width` each."""
    return (numbers[:, None] * width + torch.arange(width)).flatten()
