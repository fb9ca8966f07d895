"""How a transformers model computes logits from its last hidden states: read from its config, proven on the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import LMHead
from ..utils.distributed import is_dtensor
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


@dataclass(frozen=True, eq=False)
class LMHeadMatch:
    """An LM head that reproduces a model's logits, and the floating-point type of the hidden states it takes."""

    lm_head: LMHead | Projection
    dtype: torch.dtype


def find_lm_head(model: Any, tokens: Tensor) -> LMHeadMatch | None:
    """The LM head that computes the model's logits from its last hidden states; None if no reading of its config does.

    tokens int64 `[B, L]`: the inputs it is tested on. An LM head that is one plain matrix on this device is returned as
    `LMHead`; any other (sharded over several devices, quantized) as a function that calls the model's own module.
    """
    module = model.get_output_embeddings()
    output = model.base_model(input_ids=tokens, use_cache=False)
    states = getattr(output, "last_hidden_state", None)
    if module is None or states is None:
        return None
    weight = getattr(module, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else model.dtype
    largest = float(module(states.to(dtype)).abs().max()) or 1.0
    factors = (1.0, *(large / largest for large in _LARGE_PRODUCTS))
    cases = [((states * factor).to(dtype), _model_logits(model, module, tokens, factor)) for factor in factors]
    width = cases[0][1].shape[-1]
    for transform in _transforms(model.config):
        for lm_head in (_matrix(module, transform, width), _projection(module, transform, width)):
            if lm_head and all(_same(logits_of(scaled, lm_head), logits, dtype) for scaled, logits in cases):
                return LMHeadMatch(lm_head, dtype)
    return None


def logits_of(states: Tensor, lm_head: LMHead | Projection) -> Tensor:
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


def _matrix(module: Any, transform: LogitTransform, width: int) -> LMHead | None:
    """The LM head of a linear layer with floating-point weights, of which some models use the first rows only."""
    weight: Any = getattr(module, "weight", None)
    if type(module) is not torch.nn.Linear or is_dtensor(weight) or not weight.is_floating_point():
        return None
    bias = None if module.bias is None else module.bias.detach()[:width]
    return LMHead(weight.detach()[:width], bias, transform.softcap, transform.scale)


def _projection(module: Any, transform: LogitTransform, width: int) -> Projection:
    return lambda states: transform(module(states)[..., :width])


def _same(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same logits differ by rounding alone."""
    if ours.shape != theirs.shape:
        return False
    bound = max(1e-4, 2 * torch.finfo(dtype).eps) * theirs.float().abs().max()
    return bool(((ours.float() - theirs.float()).abs() <= bound).all())
