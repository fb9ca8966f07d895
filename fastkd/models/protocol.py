"""What a model answers with: hidden states and an LM head, or logits."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..kernels.lm_head import LMHead

Project = Callable[[Tensor], Tensor]
"""Hidden states `[n, D]` to logits `[n, V]`: a head that is not one matrix on this device (one in parts, say)."""


@dataclass(frozen=True, eq=False)
class Hidden:
    """The last hidden states, `[B, L, D]` of text or `[B, D]` of examples, and the head that they go into."""

    states: Tensor
    head: LMHead | Project


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits, `[B, L, V]` of text or `[B, V]` of examples, in whatever floating-point type the model has."""

    values: Tensor


Output = Hidden | Logits
