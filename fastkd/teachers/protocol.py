"""The protocol `Teacher`: what a capture needs of a teacher, and how it answers."""

from typing import Protocol

import torch
from torch import Tensor

from ..kernels import LMHead
from ..models.protocol import Hidden, Logits, Output, TopK

__all__ = ["Answer", "Hidden", "LMHead", "Logits", "Teacher", "TopK"]

Answer = Output | TopK
"""What a teacher returns for a batch: `Hidden`, `Logits` or `TopK`."""


class Teacher(Protocol):
    """A model in evaluation mode, here or behind a server. It is called under `torch.inference_mode`.

    For text it must be causal: tokens after a position, padding included, must not change its answer there.

    A teacher that answers with `TopK` may also have two attributes, which a capture checks before it writes anything:
    `max_k`, the most entries a position that it returns, and `tail_temperatures`, the temperatures of its tails.
    """

    @property
    def vocab_size(self) -> int:
        """V, the width of its logits (which may exceed the size of its tokenizer), or its number of classes."""
        ...

    @property
    def fingerprint(self) -> str:
        """Everything that decides its answers, as one line of text: architecture, sha256 of the weights, dtype,
        attention; not its path or device. Read once a capture, so it may take as long as hashing the weights does."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of its inputs and outputs."""
        ...

    @property
    def max_positions(self) -> int | None:
        """The longest input that it takes, in tokens; None: no limit, or unknown."""
        ...

    def __call__(self, inputs: Tensor) -> Answer:
        """inputs: on its device; token ids, int64 `[B, L]`, padded at the end, or examples `[B, ...]`."""
        ...
