"""LMHead: the projection from hidden states to logits over the vocabulary."""

from dataclasses import dataclass

from torch import Tensor

from .arguments import describe
from .errors import KDError


@dataclass(frozen=True, eq=False)
class LMHead:
    """An LM head: logits z = softcap·tanh(s/softcap) of hidden states, with s = (hidden @ weight.T + bias)·logit_scale.

    weight `[V, D]`, bias `[V]` or None. softcap, logit_scale: None for a model without one.
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
