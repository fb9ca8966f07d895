"""Outputs of a network: hidden states and an LM head, logits, or the top-k entries of a server."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..kernels import LMHead

Projection = Callable[[Tensor], Tensor]
"""Maps hidden states `[n, D]` to logits `[n, V]`: an LM head that is not one matrix on this device."""


@dataclass(frozen=True, eq=False)
class Hidden:
    """The last hidden states, `[B, L, D]` for text or `[B, D]` for examples, and the LM head that projects them."""

    states: Tensor
    lm_head: LMHead | Projection

    @property
    def head(self) -> LMHead | Projection:
        """Deprecated: use `lm_head`."""
        warnings.warn("Hidden.head is deprecated; use Hidden.lm_head", DeprecationWarning, stacklevel=2)
        return self.lm_head


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits, `[B, L, V]` for text or `[B, V]` for examples, of any floating-point type."""

    values: Tensor


@dataclass(frozen=True, eq=False)
class TopK:
    """The most likely tokens of each position and their log-probabilities, as an inference server returns them.

    ids `[B, L, K]` int (`[B, K]` for examples): token ids, each at most once a position, in any order.
    logprobs `[B, L, K]` float: natural logarithm of the probability under the full softmax at T = 1; -inf marks an
        unused entry.
    tail `[B, L, M]` float or None: `log Σ p^(1/T)` over all tokens outside the K entries, for each temperature. None:
        computed from the entries, as the log of the missing probability; this needs temperatures=(1.0,).
    temperatures: the M temperatures of `tail`.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor | None = None
    temperatures: tuple[float, ...] = (1.0,)


Output = Hidden | Logits
"""What a network on this machine returns."""
