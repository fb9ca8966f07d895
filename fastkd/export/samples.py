"""The samples of a cache with features: its documents, each as tokens, a loss mask and hidden states of some layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import HiddenTargets

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sample:
    """A document, or the part of it that lies in one window, of L tokens.

    tokens int64 `[L]`. loss_mask int64 `[L]`: 1 where the token is one that the capture wants predicted (the row before
    it has a target), as other programs mark the tokens of an assistant. states: for each layer float32 `[L, D]`.
    """

    tokens: Tensor
    loss_mask: Tensor
    states: tuple[Tensor, ...]


def samples_of(cache: Any, features: Sequence[Any], shard: int) -> Iterator[Sample]:
    """The samples of a shard, in order. features: of `cache.features`, with states of all positions.

    Parts of a single token are left out: they have nothing to predict. Memory: the codes of the shard, and the states
    of one sample.
    """
    arrays = cache.read_shard(shard)
    tokens = torch.from_numpy(arrays["tokens"].astype(np.int64))
    counts = arrays["logprobs"][:, 0] > -np.inf
    if "loss_mask" in arrays:
        counts = counts & arrays["loss_mask"].astype(bool)
    targets = [
        HiddenTargets.from_arrays(feature.read_codes(shard), feature.basis, feature.spec.step) for feature in features
    ]
    for first, stop in segments(arrays):
        if stop - first < 2:
            continue
        # row i predicts token i + 1
        mask = np.concatenate([[False], counts[first : stop - 1]]).astype(np.int64)
        states = tuple(hidden[first:stop].states() for hidden in targets)
        yield Sample(tokens[first:stop], torch.from_numpy(mask), states)


def segments(arrays: dict[str, NDArray[Any]]) -> Iterator[tuple[int, int]]:
    """First row and end of each part of a document that lies in one window, in order."""
    begins: set[int] = set()
    for name in ("sequence_lengths", "document_lengths"):
        if name in arrays:
            begins.update(np.cumsum(arrays[name], dtype=np.int64).tolist())
    ordered = [0, *sorted(begins)]
    yield from pairwise(ordered)
