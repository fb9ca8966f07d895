"""LMHead: the projection from hidden states to logits over the vocabulary."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LMHead:
    """An LM head: logits z = softcap·tanh(s/softcap) of hidden states, with s = (hidden @ weight.T + bias)·logit_scale.

    weight `[V, D]`, bias `[V]` or None; softcap, logit_scale: None where there is none.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float | None = None
