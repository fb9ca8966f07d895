"""Queries, keys and values of an attention layer in every forward of a model of transformers, with their gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.features.attention import QueriesKeysValues, attention_maps
from .hub import brief
from .taps import layers_of, recomputing

BOUND = 1e-5
"""By how much maps recomputed from what is recorded may differ from the model's own on a probe."""
_PROBE = (2, 11)  # rows and tokens: no model has as many heads as tokens here
_PARTS = ("q_proj", "k_proj", "v_proj")


class AttentionTaps:
    """Records what the attention of one layer compares: the outputs of its q, k and v projections (and of its norms of
    queries and keys), rotated by the layer's rotary embedding.

    model: of transformers, which names these modules q_proj, k_proj, v_proj and maybe q_norm, k_norm, as LLaMA, Qwen,
    Gemma, SmolLM and Mistral do. layer: its number. max_positions: the longest input; None: unknown.

    It is proven on a probe: attention maps from what is recorded are those that the model computes ("eager"). Raises
    `error` if they are not, for a layer that attends to a window only, and for other kinds of attention.
    """

    def __init__(self, model: Any, layer: int, max_positions: int | None, error: type[Exception]) -> None:
        layers = layers_of(model)[layer : layer + 1]
        where = f"attention of layer {layer} of {type(model).__name__}"
        found = [m for one in layers for m in one.modules() if all(hasattr(m, part) for part in _PARTS)]
        if len(found) != 1:
            raise error(
                f"{where}: got {len(found)} modules with {', '.join(_PARTS)}; expected one, as of LLaMA or Qwen. Its "
                "maps cannot be recomputed (latent attention, for example); match its states instead."
            )
        self._attention: Any = found[0]
        window = getattr(self._attention, "sliding_window", None)
        if window is not None and (max_positions is None or window < max_positions):
            raise error(f"{where}: it attends to a window of {window} positions; expected all. Choose another layer.")
        self._recorded: dict[str, Any] = {}
        self.recording = True
        self._handles: list[Any] = []
        self._heads_first = False  # whether heads come before positions in what the norms return
        self.attach()
        try:
            difference = self._prove(model)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as problem:
            self.detach()
            raise error(f"{where}: it cannot be recomputed ({brief(problem)}). Match its states instead.") from problem
        bound = max(BOUND, 4 * torch.finfo(self._attention.q_proj.weight.dtype).eps)
        if not difference <= bound:
            self.detach()
            raise error(
                f"{where}: maps recomputed from its queries and keys differ from the model's by {difference:.2g}; "
                f"expected at most {bound:g}. Match its states instead."
            )

    def attach(self) -> None:
        if self._handles:
            return
        self._handles = [self._attention.register_forward_pre_hook(self._before, with_kwargs=True)]
        for part in (*_PARTS, "q_norm", "k_norm"):
            if isinstance(module := getattr(self._attention, part, None), nn.Module):
                self._handles.append(module.register_forward_hook(self._recorder(part)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> QueriesKeysValues:
        """What the last forward recorded, at its B·L positions in order; then forgotten. KeyError if it was not run."""
        recorded, self._recorded = self._recorded, {}
        batch, length = recorded["v_proj"].shape[:2]

        def heads(part: str) -> Tensor:
            """`[B, L, heads, d]`."""
            x: Tensor = recorded.get(f"{part}_norm", recorded[f"{part}_proj"])
            if x.ndim == 4 and self._heads_first:
                x = x.transpose(1, 2)
            return x.reshape(batch, length, -1, self._attention.head_dim)

        queries, keys, values = (heads(part) for part in "qkv")
        if (rotary := recorded.get("rotary")) is not None:
            queries, keys = (_rotated(x, *rotary) for x in (queries, keys))
        scale, softcap = (getattr(self._attention, name, None) for name in ("scaling", "attn_logit_softcapping"))
        return QueriesKeysValues(*(x.flatten(0, 1) for x in (queries, keys, values)), scale=scale, softcap=softcap)

    def _before(self, module: nn.Module, arguments: Any, keywords: Any) -> None:
        if self.recording and not recomputing():
            rotary = keywords.get("position_embeddings", arguments[1] if len(arguments) > 1 else None)
            self._recorded["rotary"] = rotary if isinstance(rotary, tuple) else None

    def _recorder(self, part: str) -> Any:
        def after(module: nn.Module, arguments: Any, result: Tensor) -> None:
            if self.recording and not recomputing():
                self._recorded[part] = result

        return after

    @torch.no_grad()
    def _prove(self, model: Any) -> float:
        """The largest difference of maps recomputed from what is recorded, from the model's own, on a probe."""
        vocab = model.get_input_embeddings().weight.shape[0]
        tokens = torch.randint(vocab, _PROBE, generator=torch.Generator().manual_seed(0)).to(model.device)
        maps: list[Tensor] = []
        hook = self._attention.register_forward_hook(lambda module, arguments, result: maps.append(result[1]))
        training = model.training
        model.eval()
        try:
            with _eager(model):
                model(input_ids=tokens, use_cache=False)
        finally:
            hook.remove()
            model.train(training)
        norm = self._recorded.get("q_norm")
        self._heads_first = norm is not None and norm.ndim == 4 and norm.shape[1] != _PROBE[1]
        layer = self.take()
        difference = 0.0
        for row, theirs in enumerate(maps[-1]):
            some = slice(row * _PROBE[1], (row + 1) * _PROBE[1])
            own = layer._replace(queries=layer.queries[some], keys=layer.keys[some], values=None)
            ours = attention_maps(own, slice(0, _PROBE[1]))
            difference = max(difference, float((ours - theirs).abs().max()))
        return difference


def _rotated(x_BLHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads rotated by a rotary embedding `[B, L, d']`: the first d' components of each, in halves (RoFormer, Su et al.
    2021, as LLaMA arranges it)."""
    width = cos.shape[-1]
    cos, sin = cos[:, :, None].to(x_BLHd.dtype), sin[:, :, None].to(x_BLHd.dtype)
    x, rest = x_BLHd[..., :width], x_BLHd[..., width:]
    a, b = x.chunk(2, -1)
    return torch.cat([x * cos + torch.cat([-b, a], -1) * sin, rest], -1)


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """The model with the attention implementation that returns maps."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
