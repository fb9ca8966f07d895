"""What capture asks of a teacher, and what it gets: hidden states and a head, or logits."""

from typing import Protocol

import torch
from torch import Tensor

from ..models.protocol import Output


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
