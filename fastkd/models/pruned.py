"""Which layers of its original a model consists of, if it is a copy of one with layers removed.

The numbers are kept in the model's config, as `fastkd_original_layers` and `fastkd_original_count`, and so in its
config.json, also in that of a trained student. Equal weights would not do: after training there are none.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .taps import layers_of

_LAYERS, _COUNT = "fastkd_original_layers", "fastkd_original_count"


@dataclass(frozen=True)
class OriginalLayers:
    """layers: the number of each layer of the model in its original, ascending. count: layers of the original."""

    layers: tuple[int, ...]
    count: int


def original_layers(model: Any) -> OriginalLayers | None:
    """The original layers of a model of transformers, by its config. None if it says nothing, or what cannot be so: it
    is a note of the person who pruned it, and anybody can write a config."""
    config = getattr(model, "config", None)
    layers: Any = getattr(config, _LAYERS, None)
    count: Any = getattr(config, _COUNT, None)
    if not isinstance(layers, (list, tuple)) or not layers or not all(type(n) is int for n in (*layers, count)):
        return None
    ascending = all(a < b for a, b in pairwise(layers))
    if not ascending or layers[0] < 0 or layers[-1] >= count:
        return None
    return OriginalLayers(tuple(layers), count) if len(layers) == getattr(config, "num_hidden_layers", -1) else None


def note_original_layers(model: Any, kept: Sequence[int], count: int) -> None:
    """Note in a model's config that it consists of these layers, of `count` before. Layers that were removed earlier
    are accounted for. Call it before `num_hidden_layers` is changed."""
    before = original_layers(model)
    numbers = list(kept) if before is None else [before.layers[n] for n in kept]
    setattr(model.config, _LAYERS, numbers)
    setattr(model.config, _COUNT, count if before is None else before.count)


def kept_layers(count: int, every: int) -> list[int]:
    """The layers that stay when the middle one of each `every` is removed: the first and the last matter too much."""
    return [i for i in range(count) if i % every != every // 2]


def keep_layers(model: Any, numbers: Sequence[int]) -> None:
    """Remove all other layers from a causal model of transformers. Its config keeps the numbers that they had.

    Raises ValueError if its base model has no list of layers.
    """
    base, layers = model.base_model, layers_of(model)
    lists = {name: list(child) for name, child in base.named_children() if isinstance(child, nn.ModuleList)}
    if not layers or layers not in lists.values():
        raise ValueError(f"{type(model).__name__} has no list of layers")
    note_original_layers(model, numbers, len(layers))
    kept = nn.ModuleList(layers[i] for i in numbers)
    setattr(base, next(name for name, found in lists.items() if found == layers), kept)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                numbered: Any = module
                numbered.layer_idx = index  # its index in a key-value cache
    text = model.config.get_text_config()
    text.num_hidden_layers = len(numbers)
    cut_layer_lists(text, numbers, len(layers))


def cut_layer_lists(config: Any, kept: Sequence[int], count: int) -> None:
    """Keep the entries of these layers in the lists of a config that have one for each, such as layer_types. count: of
    layers before."""
    for name, value in list(vars(config).items()):
        if "layer" in name and name != _LAYERS and isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[n] for n in kept])


def truncated(model: Any, count: int) -> Any:
    """A model of transformers that consists of the first layers of another: its config, with meta tensors as weights.

    Its parameters have the names that they have in the other model. Raises ValueError if the config does not say how
    many layers there are.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    note_original_layers(SimpleNamespace(config=config), range(count), before)
    cut_layer_lists(text, range(count), before)
    text.num_hidden_layers = count
    with torch.device("meta"):
        made = type(model)(config)
    if len(layers_of(made)) != count or not made.state_dict().keys() <= model.state_dict().keys():
        raise ValueError(f"{type(model).__name__} with num_hidden_layers={count} is not its first {count} layers")
    if hasattr(model, "generation_config"):
        made.generation_config = copy.deepcopy(model.generation_config)
    return made
