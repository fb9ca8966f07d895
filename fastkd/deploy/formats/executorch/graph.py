"""A causal model of transformers as one graph with a KV cache, and quantised weights, for ExecuTorch.

The model keeps its own code. Only its attention is exchanged, through transformers' AttentionInterface: keys and values
go to a buffer of a fixed length, and ExecuTorch's operator `llama::custom_sdpa` reads as much of it as is filled.
"""

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....errors import ExportError
from ....models.quantization import Scheme, Weights, quantised_modules, quantize
from ....utils.quiet import quiet
from ...model import Deployable
from ...smoothing import DividedEmbedding

MAX_LENGTH = 2048
"""The longest sequence of a file, in tokens, unless the model's own is shorter: the size of its KV cache."""
CHUNK = 128
"""Tokens in a call at most: what bounds the memory of a long prompt."""
TOLERANCE = 1e-4
_ATTENTION = "fastkd_executorch"
_UNFIT = {"softcap": "a cap on its scores", "position_bias": "a bias by position", "s_aux": "attention sinks"}


class Unfit(Exception):
    """Why a model cannot have this cache, as the rest of a sentence that begins with the model's name."""


class Layers:
    """The attention layers of a model, found in one pass, and their caches, once they are made.

    start: the position of the first token of the call that runs. window: the narrowest sliding window, or None.
    """

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        self.caches: dict[int, LayerCache] = {}
        self.start: Any = 0
        self.window: int | None = None

    def note(self, module: nn.Module, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        """Take down a layer. Raises Unfit for an attention that the operator cannot compute."""
        for name, what in _UNFIT.items():
            if options.get(name) is not None:
                raise Unfit(f"has {what} in its attention")
        causal = options.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise Unfit("attends to later tokens")
        if key.shape[-1] != value.shape[-1]:
            raise Unfit("has keys and values of different widths")
        if id(module) in self.shapes:
            raise Unfit("uses an attention layer more than once")
        self.shapes[id(module)] = (key.shape[1], key.shape[3])
        window = options.get("sliding_window")
        if window is not None:
            self.window = min(window, self.window or window)


class LayerCache(nn.Module):
    """Keys and values `[1, T, H, d]` of a layer, of T positions."""

    keys: Tensor
    values: Tensor

    def __init__(self, length: int, heads: int, width: int) -> None:
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, length, heads, width), persistent=False)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    dropout: float = 0.0, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: queries `[1, H, L, d]`, new keys and values `[1, G, L, d]`, to `[1, L, H, d]`.

    Causal attention of the new positions to themselves and all before them, which are in the cache.
    """
    layers: Layers = module.fastkd_layers
    if not layers.caches:  # the pass that finds the layers
        layers.note(module, key, value, options)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return found.transpose(1, 2), None
    query, key, value = (states.transpose(1, 2).contiguous() for states in (query, key, value))
    cache, start = layers.caches[id(module)], layers.start
    torch.ops.llama.update_cache(key, cache.keys, start)
    torch.ops.llama.update_cache(value, cache.values, start)
    return torch.ops.llama.custom_sdpa(query, cache.keys, cache.values, start, None, 0.0, True, scaling), None


class CachedLM(nn.Module):
    """ids `[1, L]` with 1 <= L <= CHUNK, the position `[1]` of the first, and the rows `[K]` that are wanted, to logits
    `[1, K, V]`. Keys and values of positions before it are those of the last calls. length: of the longest sequence.

    Its parameters are the model's own. Raises Unfit if the model's answers are not those that it gives without.
    """

    def __init__(self, model: Deployable) -> None:
        super().__init__()
        from transformers import AttentionInterface

        # a copy of the modules, not of the weights: the attention of the model that was given stays as it is
        given: Any = model.model
        shared = {id(tensor): tensor for tensor in (*given.parameters(), *given.buffers())}
        self.model: Any = copy.deepcopy(given, shared)
        takes = inspect.signature(given.forward).parameters
        if "position_ids" not in takes:
            raise Unfit("takes no positions")
        self._keeps = "logits_to_keep" in takes
        AttentionInterface.register(_ATTENTION, _attention)
        self.model.set_attn_implementation(_ATTENTION)
        self._layers = Layers()
        for module in self.model.modules():
            module.fastkd_layers = self._layers
        ids = model.example[:1]
        with torch.no_grad():
            self.model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False)
        if not self._layers.shapes:
            raise Unfit("computes its attention without transformers' interface for it")
        limits = (MAX_LENGTH, model.max_positions, self._layers.window, _config_of(given, "attention_chunk_size"))
        self.length: int = min(limit for limit in limits if limit)
        for layer, (heads, width) in self._layers.shapes.items():
            self._layers.caches[layer] = LayerCache(self.length, heads, width)
        self.caches = nn.ModuleList(self._layers.caches.values())
        self._compare(model)

    def forward(self, ids: Tensor, start: Tensor, rows: Tensor) -> Tensor:
        first: Any = start.item()
        torch._check(first >= 0)  # type: ignore[no-untyped-call]
        torch._check(first < self.length)  # type: ignore[no-untyped-call]
        torch._check(first + ids.shape[1] <= self.length)  # type: ignore[no-untyped-call]
        self._layers.start = first
        positions = (torch.arange(ids.shape[1]) + start)[None]
        options = {"logits_to_keep": rows} if self._keeps else {}
        logits: Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=False, **options).logits
        return logits if self._keeps else logits.index_select(1, rows)

    def _compare(self, model: Deployable) -> None:
        """In two calls as the model in one, or Unfit: a state, or a mask, that this cache does not hold."""
        ids = model.example[:1, : self.length]
        half = ids.shape[1] // 2
        with torch.no_grad():
            expected = model.plain(ids)
            found = torch.cat(
                [
                    self(part, torch.tensor([start]), torch.arange(part.shape[1]))
                    for start, part in ((0, ids[:, :half]), (half, ids[:, half:]))
                ],
                1,
            )
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise Unfit(f"answers otherwise with a KV cache alone (its logits differ by {error:.2g} of the largest)")


class CodedEmbedding(nn.Module):
    """A token embedding in codes, of which only the rows of the tokens are read. ids `[B, L]` to `[B, L, D]`."""

    codes: Tensor
    scales: Tensor
    factor: Tensor | None

    def __init__(self, embedding: nn.Embedding, how: Weights) -> None:
        super().__init__()
        codes, scales = quantize(embedding.weight, how)
        factor = getattr(embedding, "embed_scale", None)  # Gemma's, times the root of the width
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales if factor is None else scales * float(factor))
        self.register_buffer("factor", embedding.factor if isinstance(embedding, DividedEmbedding) else None)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids.flatten()
        found = self.codes.index_select(0, rows).float() * self.scales.index_select(0, rows)
        found = found if self.factor is None else found * self.factor
        return found.view(*ids.shape, -1)


def quantise(model: nn.Module, scheme: Scheme, *, embedding: nn.Embedding | None) -> None:
    """Quantise the linear layers of a model in place, by torchao, whose weights have the codes of the scheme and whose
    inputs are quantised in int8, each row by its own range; and the token embedding. The tensors that were its weights
    stay as they are: a tied LM head has codes of its own, equal to those of the embedding.

    In int4 too are the inputs quantised (ExecuTorch's 8da4w): XNNPACK has no kernel for 4-bit weights without.
    """
    with quiet():
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, PerGroup, quantize_
    linear = [(module, how) for module, how in quantised_modules(model, scheme) if isinstance(module, nn.Linear)]
    for how in {how for _, how in linear}:
        chosen = {id(module) for module, found in linear if found == how}
        config = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=getattr(torch, f"int{how.bits}"),
            weight_granularity=PerAxis(0) if how.group is None else PerGroup(how.group),
        )
        with quiet():
            quantize_(model, config, lambda module, name, chosen=chosen: id(module) in chosen)
    if embedding is not None:
        _exchange(model, embedding, CodedEmbedding(embedding, scheme.ends))


def unsupported(model: nn.Module, scheme: Scheme) -> Iterable[str]:
    """The names of weights that the scheme quantises and ExecuTorch keeps in float32: convolutions."""
    names = {id(module): name for name, module in model.named_modules()}
    ends = (nn.Linear, nn.Embedding)
    return [names[id(module)] for module, _ in quantised_modules(model, scheme) if not isinstance(module, ends)]


def _exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)


def _config_of(model: Any, key: str) -> int | None:
    found = getattr(model.config.get_text_config(), key, None)
    return None if found is None else int(found)


def refusal(model: Deployable, why: str) -> ExportError:
    """One sentence of a model that ExecuTorch cannot take."""
    return ExportError(
        f"to: got 'executorch' for {model.name} ({type(model.model).__name__}), which {why}; expected another format."
    )
