"""In which order layers are removed from a teacher: each time the one without which the KL divergence from its own
answers, in the cache, is least.

As in SLEB (Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer
Blocks"), layers are judged together with those that are already gone: of two that do much the same, either can go, but
not both. What a layer's removal adds to the KL hardly ever becomes less as others go, so a layer is tried again only
while what it added when it was last tried is the least of all (lazy greedy, Minoux 1978).
"""

import heapq
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.taps import Taps, layers_of, replaced, resolve
from ..stream.batch import MicroBatch
from .sample import Sample, kl_on


def removal_order(
    layers: int, count: int, kl_without: Callable[[frozenset[int]], float]
) -> tuple[list[int], list[float]]:
    """The first `count` layers to be removed, of `layers`, and the KL after each.

    kl_without: the KL of the model without some layers.
    """
    removed: list[int] = []
    after: list[float] = []
    # what it adds, layer, KL, and how many were removed when it was tried
    queue = [(kl := kl_without(frozenset([n])), n, kl, 0) for n in range(layers)]
    heapq.heapify(queue)
    while len(removed) < count:
        _, layer, kl, tried = heapq.heappop(queue)
        if tried == len(removed):
            removed.append(layer)
            after.append(kl)
        else:
            kl = kl_without(frozenset([*removed, layer]))
            heapq.heappush(queue, (kl - after[-1], layer, kl, len(removed)))
    return removed, after


class Skipping:
    """The KL divergence of a model without some of its layers: these return the states that enter them.

    run: the model on a micro-batch, see `kl_on`. The states that enter each layer are kept, `[L, P, D]` for P positions
    of the sample, so that only what comes after the first layer that is left out is computed again.
    """

    def __init__(
        self, model: Any, sample: Sample, run: Callable[[MicroBatch], Tensor], done: Callable[[int], object]
    ) -> None:
        self._layers, self._sample, self._run, self._done = layers_of(model), sample, run, done
        self._taps = resolve(model, [str(n) for n in range(len(self._layers))])
        self._states: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad(), Taps(model, self._taps) as taps:
            for batch in sample.batches:
                run(batch)
                self._states[id(batch)] = taps.take()

    def __call__(self, gone: frozenset[int]) -> float:
        first = min(gone)
        skipped = [layer for n, layer in enumerate(self._layers) if n < first or n in gone]

        def run(batch: MicroBatch) -> Tensor:
            with replaced(self._taps[first], self._states[id(batch)][str(first)], skipped):
                return self._run(batch)

        return kl_on(self._sample, run, self._done)
