"""Sampling of tokens by numbers that belong to a sequence: not to its batch, its process, or a generator's state."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..utils.splitmix import mixed

Ints = NDArray[np.int64]
_KEY = 0x726F6C6C6F7574  # sets these numbers apart from those of other uses of a seed


def keys_of(count: int, *numbers: int) -> NDArray[np.uint64]:
    """A key for each of `count` sequences, which follows from its number and from `numbers` (0 to 2^64 − 1)."""
    key = np.array([_KEY], np.uint64)
    for number in numbers:
        key = mixed(key ^ np.array([number], np.uint64))
    return mixed(np.arange(count, dtype=np.uint64) + key)


def uniforms(keys_B: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Numbers from 0 to below 1, `[B, count]`, that follow from the keys `[B]`: equally distributed and independent."""
    counters: Any = mixed(keys_B)[:, None] + np.arange(count, dtype=np.uint64)
    return (mixed(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> Tensor:
    """Token ids `[B]`, distributed as softmax(logits / temperature): the first at which the cumulative probability
    exceeds a number from 0 to below 1. temperature = 0: the most likely ones."""
    if temperature == 0:
        return logits_BV.argmax(1)
    # in float64: the rounding of a cumulative sum of a large vocabulary would favour its end
    cumulative_BV = torch.softmax(logits_BV.double() / temperature, 1).cumsum(1)
    threshold_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
    ids_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
    return ids_B.clamp_(max=logits_BV.shape[1] - 1)
