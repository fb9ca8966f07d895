"""What capture asks of a teacher, and what it gets: hidden states and a head, or logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """What makes hidden states into logits: z = softcap·tanh(s/softcap) of s = (hidden @ weight.T + bias)·logit_scale.

    weight `[V, D]`, bias `[V]` or None; softcap, logit_scale: None where there is none.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float | None = None


Project = Callable[[Tensor], Tensor]
"""Hidden states `[n, D]` to logits `[n, V]`: a head that is not one matrix on this device (one in parts, say)."""


@dataclass(frozen=True, eq=False)
class Hidden:
    """The last hidden states, `[B, L, D]` of text or `[B, D]` of examples, and the head that they go into."""

    states: Tensor
    head: Head | Project


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits, `[B, L, V]` of text or `[B, V]` of examples, in whatever floating-point type the model has."""

    values: Tensor


Output = Hidden | Logits


class Teacher(Protocol):
    """A model in evaluation mode. It is called under `torch.inference_mode`.

    Of text it must be causal: what stands behind a position, pads among it, must not change what it says there.
    """

    @property
    def vocab_size(self) -> int:
        """V, the width of its head (which may be wider than its tokenizer), or its number of classes."""
        ...

    @property
    def fingerprint(self) -> str:
        """All that decides what it says, as one line of text: architecture, sha256 of the weights, dtype, attention.
        Never where it lies, nor on which device. It is asked for once a job, and may take as long as hashing does."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its inputs go, and its outputs come from."""
        ...

    @property
    def max_positions(self) -> int | None:
        """The longest piece of text it takes, in tokens; None where there is no limit, or it is not known."""
        ...

    def __call__(self, inputs: Tensor) -> Output:
        """inputs: on its device; tokens int64 `[B, L]`, padded behind, or examples `[B, ...]`."""
        ...
