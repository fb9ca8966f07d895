"""How a transformers model computes logits from its last hidden states: read from its config, proven on the model."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import LMHead
from ..utils.distributed import is_dtensor
from .adapters import base_of, random_adapters
from .protocol import Projection

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
DIVISORS = ("logits_scaling",)  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Hidden states are also scaled up until the largest product is this: small logits show no softcap.
_LARGE_PRODUCTS = (50.0, 1000.0)


@dataclass(frozen=True)
class LogitTransform:
    """From the product s of hidden states and LM head to logits: softcap·tanh(s·scale/softcap); None: not applied."""

    scale: float | None = None
    softcap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        if self.scale is None and self.softcap is None:
            return product
        s = product.float() * (1.0 if self.scale is None else self.scale)
        return s if self.softcap is None else torch.tanh(s / self.softcap) * self.softcap


class LowRank(NamedTuple):
    """What an adapter adds to a product x Wᵀ: scale · dropout(x) downᵀ upᵀ. down `[r, D]`, up `[V, r]`."""

    down: Tensor
    up: Tensor
    scale: float
    dropout: nn.Module


@dataclass(frozen=True, eq=False)
class LowRankHead:
    """An LM head with LoRA. A `Projection`; for the fused loss, `widened` writes it as one matrix, exactly.

    plain: without the adapters. added: what they add.
    """

    plain: LMHead
    added: tuple[LowRank, ...]

    def widened(self, states: Tensor) -> tuple[Tensor, LMHead]:
        """States `[..., D + r]` and the LM head `[V, D + r]` of the same logits: x Wᵀ + s dropout(x) Aᵀ Bᵀ = [x,
        s dropout(x) Aᵀ] [W, B]ᵀ. (W + s B A would round what the adapter adds to the type of W.)"""
        weight = self.plain.weight
        states_, weights = [states.to(weight.dtype)], [weight]
        for down, up, scale, dropout in self.added:
            states_.append((nn.functional.linear(dropout(states.to(down.dtype)), down) * scale).to(weight.dtype))
            weights.append(up.to(weight.dtype))
        return torch.cat(states_, -1), replace(self.plain, weight=torch.cat(weights, 1))

    def __call__(self, states: Tensor) -> Tensor:
        return logits_of(*self.widened(states))


@dataclass(frozen=True, eq=False)
class LMHeadMatch:
    """An LM head that reproduces a model's logits, and the floating-point type of the hidden states it takes."""

    lm_head: LMHead | LowRankHead | Projection
    dtype: torch.dtype

    @property
    def fusable(self) -> bool:
        """Whether the loss can be fused with it."""
        return isinstance(self.lm_head, (LMHead, LowRankHead))

    def read(self, model: Any, width: int) -> LMHead | LowRankHead | Projection:
        """The LM head as it is now: FSDP2 replaces parameters, and adapters may be switched. width: V."""
        if not isinstance(self.lm_head, (LMHead, LowRankHead)):
            return self.lm_head
        known = self.lm_head.plain if isinstance(self.lm_head, LowRankHead) else self.lm_head
        return _head(
            *_linear(base_of(model).get_output_embeddings()), width, LogitTransform(known.logit_scale, known.softcap)
        )


def find_lm_head(model: Any, tokens: Tensor) -> LMHeadMatch | None:
    """The LM head that computes the model's logits from its last hidden states; None if no reading of its config does.

    tokens int64 `[B, L]`: the inputs it is tested on. An LM head that is one plain matrix on this device is returned as
    `LMHead`, with LoRA as `LowRankHead`; any other (sharded over several devices, quantized) as a function that calls
    the model's own module. Of a PeftModel it is read inside the wrapper, and compared with the wrapper's logits.
    """
    with random_adapters(model):
        return _find(model, base_of(model), tokens)


def _find(model: Any, base: Any, tokens: Tensor) -> LMHeadMatch | None:
    module = base.get_output_embeddings()
    output = base.base_model(input_ids=tokens, use_cache=False)
    states = getattr(output, "last_hidden_state", None)
    if module is None or states is None:
        return None
    weight = getattr(module, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else base.dtype
    largest = float(module(states.to(dtype)).abs().max()) or 1.0
    factors = (1.0, *(large / largest for large in _LARGE_PRODUCTS))
    cases = [((states * factor).to(dtype), _model_logits(model, module, tokens, factor)) for factor in factors]
    width = cases[0][1].shape[-1]
    for transform in _transforms(base.config):
        for lm_head in (_matrix(module, transform, width), _projection(module, transform, width)):
            if lm_head and all(_same(logits_of(scaled, lm_head), logits, dtype) for scaled, logits in cases):
                return LMHeadMatch(lm_head, dtype)
    return None


def logits_of(states: Tensor, lm_head: LMHead | LowRankHead | Projection) -> Tensor:
    """Hidden states `[..., D]` to logits `[..., V]`."""
    if not isinstance(lm_head, LMHead):
        return lm_head(states)
    product = torch.nn.functional.linear(states, lm_head.weight, lm_head.bias)
    return LogitTransform(lm_head.logit_scale, lm_head.softcap)(product)


def _transforms(config: Any) -> Iterator[LogitTransform]:
    """What a config may mean, the likeliest first: models differ in what they do with the same field."""
    configs = [config, config.get_text_config()]

    def values(names: tuple[str, ...]) -> list[float]:
        given = [getattr(c, name, None) for name in names for c in configs]
        return [float(value) for value in given if isinstance(value, (int, float)) and value > 0]

    scales = [1 / value for value in values(DIVISORS)] + values(MULTIPLIERS)
    for softcap in dict.fromkeys([*values(SOFTCAPS), None]):
        for scale in dict.fromkeys([*scales, None]):
            yield LogitTransform(None if scale == 1 else scale, softcap)


def _model_logits(model: Any, module: Any, tokens: Tensor, factor: float) -> Tensor:
    """The model's own logits, with the input of its LM head multiplied by a factor."""

    def scale_input(_: Any, arguments: tuple[Any, ...]) -> Any:
        return (arguments[0] * factor, *arguments[1:]) if arguments else None

    hook = module.register_forward_pre_hook(scale_input)
    try:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits
    finally:
        hook.remove()


def _matrix(module: Any, transform: LogitTransform, width: int) -> LMHead | LowRankHead | None:
    """The LM head of a linear layer with floating-point weights, of which some models use the first rows only."""
    linear, added = _linear(module)
    weight: Any = getattr(linear, "weight", None)
    if type(linear) is not nn.Linear or is_dtensor(weight) or not weight.is_floating_point():
        return None
    found = _head(linear, added, width, transform)
    plain = found.plain if isinstance(found, LowRankHead) else found
    bias = None if plain.bias is None else plain.bias.detach()
    plain = replace(plain, weight=plain.weight.detach(), bias=bias)
    return LowRankHead(plain, found.added) if isinstance(found, LowRankHead) else plain


def _head(linear: Any, added: tuple[LowRank, ...], width: int, transform: LogitTransform) -> LMHead | LowRankHead:
    weight, bias = linear.weight, linear.bias
    if len(weight) != width:
        weight, bias = weight[:width], None if bias is None else bias[:width]
        added = tuple(one._replace(up=one.up[:width]) for one in added)
    head = LMHead(weight, bias, transform.softcap, transform.scale)
    return LowRankHead(head, added) if added else head


def _linear(module: Any) -> tuple[Any, tuple[LowRank, ...]]:
    """The linear layer that a module of PEFT runs now, and what its LoRA adds; any other module, or one that PEFT
    changes otherwise (DoRA), as it is."""
    peft = sys.modules.get("peft")
    if peft is None:
        return module, ()
    if isinstance(module, peft.utils.ModulesToSaveWrapper):
        active = [] if module.disable_adapters else [n for n in module.active_adapters if n in module.modules_to_save]
        return (module.modules_to_save[active[0]] if active else module.original_module), ()
    if type(module) is not peft.tuners.lora.Linear:
        return module, ()
    if module.disable_adapters or module.merged:
        return module.base_layer, ()
    active = [name for name in module.active_adapters if name in module.lora_A]
    if any(name in module.lora_variant or module.lora_bias[name] for name in active):
        return module, ()
    return module.base_layer, tuple(
        LowRank(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], module.lora_dropout[name])
        for name in active
    )


def _projection(module: Any, transform: LogitTransform, width: int) -> Projection:
    return lambda states: transform(module(states)[..., :width])


def _same(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same logits differ by rounding alone."""
    if ours.shape != theirs.shape:
        return False
    bound = max(1e-4, 2 * torch.finfo(dtype).eps) * theirs.float().abs().max()
    return bool(((ours.float() - theirs.float()).abs() <= bound).all())
