"""How a model of transformers makes logits of its last hidden states: read from its config, proven on the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..kernels.lm_head import LMHead
from .protocol import Project

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
DIVISORS = ("logits_scaling",)  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Hidden states are also tried so loud that the largest product is this: in small logits no cap shows.
_LOUD = (50.0, 1000.0)


@dataclass(frozen=True)
class Reading:
    """z = softcap·tanh(s/softcap) of s = (the head's product)·scale; None where there is none."""

    scale: float | None = None
    softcap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        if self.scale is None and self.softcap is None:
            return product
        s = product.float() * (1.0 if self.scale is None else self.scale)
        return s if self.softcap is None else torch.tanh(s / self.softcap) * self.softcap


@dataclass(frozen=True, eq=False)
class LMHeadMatch:
    """A head, and the floating-point type of the hidden states that go into it."""

    head: LMHead | Project
    dtype: torch.dtype


def readings(config: Any) -> Iterator[Reading]:
    """What a config may mean, the likeliest first: it says what is there, but not what the model does with it."""
    configs = [config, config.get_text_config()]

    def values(names: tuple[str, ...]) -> list[float]:
        given = [getattr(c, name, None) for name in names for c in configs]
        return [float(value) for value in given if isinstance(value, (int, float)) and value > 0]

    scales = [1 / value for value in values(DIVISORS)] + values(MULTIPLIERS)
    for softcap in dict.fromkeys([*values(SOFTCAPS), None]):
        for scale in dict.fromkeys([*scales, None]):
            yield Reading(None if scale == 1 else scale, softcap)


def find_head(model: Any, tokens: Tensor) -> LMHeadMatch | None:
    """The head that the model's last hidden states go into; None where no reading of its config gives its logits.

    tokens int64 `[B, L]`: what it is tried on. A head that is one plain matrix on this device comes as such, any other
    (in parts over several devices, quantised) as the module that it is.
    """
    module = model.get_output_embeddings()
    output = model.base_model(input_ids=tokens, use_cache=False)
    states = getattr(output, "last_hidden_state", None)
    if module is None or states is None:
        return None
    weight = getattr(module, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else model.dtype
    largest = float(module(states.to(dtype)).abs().max()) or 1.0
    factors = (1.0, *(loud / largest for loud in _LOUD))
    tried = [(states * factor, _logits(model, module, tokens, factor)) for factor in factors]
    width = tried[0][1].shape[-1]
    for reading in readings(model.config):
        for head in (_matrix(module, reading, width), _project(module, reading, width)):
            if head and all(_same(logits_of(louder.to(dtype), head), logits, dtype) for louder, logits in tried):
                return LMHeadMatch(head, dtype)
    return None


def logits_of(states: Tensor, head: LMHead | Project) -> Tensor:
    """Hidden states `[..., D]` to logits `[..., V]`."""
    if not isinstance(head, LMHead):
        return head(states)
    return Reading(head.logit_scale, head.softcap)(torch.nn.functional.linear(states, head.weight, head.bias))


def _logits(model: Any, module: Any, tokens: Tensor, factor: float) -> Tensor:
    """The model's own logits, of what it puts into its head times a factor."""

    def louder(_: Any, arguments: tuple[Any, ...]) -> Any:
        return (arguments[0] * factor, *arguments[1:]) if arguments else None

    hook = module.register_forward_pre_hook(louder)
    try:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits
    finally:
        hook.remove()


def _matrix(module: Any, reading: Reading, width: int) -> LMHead | None:
    """A head that is one matrix of floating-point numbers, of which some models use the first rows only."""
    weight: Any = getattr(module, "weight", None)
    if type(module) is not torch.nn.Linear or isinstance(weight, DTensor) or not weight.is_floating_point():
        return None
    bias = None if module.bias is None else module.bias.detach()[:width]
    return LMHead(weight.detach()[:width], bias, reading.softcap, reading.scale)


def _project(module: Any, reading: Reading, width: int) -> Project:
    return lambda states: reading(module(states)[..., :width])


def _same(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same logits differ by rounding alone."""
    if ours.shape != theirs.shape:
        return False
    bound = max(1e-4, 2 * torch.finfo(dtype).eps) * theirs.float().abs().max()
    return bool(((ours.float() - theirs.float()).abs() <= bound).all())
