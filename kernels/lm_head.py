"""LMHead: the projection from hidden states to logits over the vocabulary."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import describe, refuse_dtensor
from .errors import KDError
from .fields import FLOATS


@dataclass(frozen=True, eq=False)
class LMHead:
    """An LM head: logits z = softcap·tanh(s/softcap) of hidden states, with s = (hidden @ weight.T + bias)·logit_scale.

    weight `[V, D]`: the matrix.
    bias `[V]` or None: added to the products.
    softcap, logit_scale: None for a model without one.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float | None = None


def as_lm_head(
    weight: Tensor | LMHead, bias: Tensor | None, softcap: float | None, logit_scale: float | None
) -> LMHead:
    """The LM head of a call's arguments. KDError for an LMHead beside its own fields."""
    if not isinstance(weight, LMHead):
        return LMHead(weight, bias, softcap, logit_scale)
    for name, value in (("bias", bias), ("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None:
            raise KDError(f"{name}: got {describe(value)} beside an LMHead; expected it in the LMHead.")
    return weight


def check_floats(name: str, value: Any) -> None:
    """Raise KDError unless it is a dense tensor `[..., X]` of a floating-point type that the kernels support."""
    refuse_dtensor(name, value)
    if not isinstance(value, Tensor) or value.dtype not in FLOATS or value.layout != torch.strided or not value.ndim:
        raise KDError(
            f"{name}: got {describe(value)}; expected a dense tensor of float16, bfloat16, float32 or float64."
        )


def check_lm_head(hidden: Tensor, lm_head: LMHead, *, any_type: bool = False) -> None:
    """Raise KDError unless hidden states `[..., D]` and the LM head can be multiplied.

    any_type: under autocast, the types may differ, if none is float64.
    """
    weight, bias, width = lm_head.weight, lm_head.bias, hidden.shape[-1]
    check_floats("weight", weight)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_floats(name, tensor)
        converts = any_type and torch.float64 not in (tensor.dtype, hidden.dtype)
        if tensor.device != hidden.device or (tensor.dtype != hidden.dtype and not converts):
            found, expected = f"{tensor.dtype} on {tensor.device}", f"{hidden.dtype} on {hidden.device}"
            raise KDError(f"{name}: got {found}; expected {expected}, as of hidden.")
    if weight.ndim != 2 or weight.shape[1] != width:
        shapes = f"{tuple(weight.shape)} with hidden {tuple(hidden.shape)}"
        raise KDError(f"weight: got shape {shapes}; expected (V, {width}).")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KDError(f"bias: got shape {tuple(bias.shape)}; expected ({len(weight)},), as of weight.")
