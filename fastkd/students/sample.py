"""A part of a cache's training split, kept in memory, and the KL divergence of a model from the teacher on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import Cache
from ..errors import StreamError
from ..evaluate.rows import student_rows
from ..stream.batch import MicroBatch
from ..stream.cached import CachedSource

_MICRO = 256  # positions of a micro-batch
_MAX_LOGITS = 2**26  # numbers in the logits of a micro-batch, unless one row has more


@dataclass(frozen=True, eq=False)
class Sample:
    """Micro-batches of text."""

    batches: list[MicroBatch]

    @property
    def positions(self) -> int:
        """Without padding."""
        return sum(batch.positions for batch in self.batches)

    @property
    def counted(self) -> int:
        """Positions with a target."""
        return sum(batch.count for batch in self.batches)

    def first(self, positions: int) -> "Sample":
        """The first micro-batches with at least so many positions, or all."""
        batches: list[MicroBatch] = []
        for batch in self.batches:
            if sum(one.positions for one in batches) >= positions:
                break
            batches.append(batch)
        return Sample(batches)


def read_sample(
    cache: Cache, positions: int, *, seed: int, device: torch.device, allow_partial: bool = False
) -> Sample:
    """At least so many positions of the training split, or all of it, in an order by the seed.

    Raises StreamError if no position counts, or the cache has no top-k entries.
    """
    if not cache.spec.k:
        raise StreamError(f"cache: got {cache!r} without top-k entries; expected some, to measure the KL divergence.")
    micro = max(1, min(_MICRO, _MAX_LOGITS // cache.spec.vocab_size))
    source = CachedSource(
        cache, batch_tokens=micro, micro_tokens=micro, seed=seed, device=device, shards_open=2, prefetch=1,
        allow_partial=allow_partial,
    )  # fmt: skip
    found = Sample([])
    try:
        for step in source:
            found.batches.extend(batch for batch in step.micro_batches if batch.count)
            if found.positions >= positions:
                break
    finally:
        source.close()
    if not found.counted:
        raise StreamError(f"cache: got {cache!r}, in whose training split no position counts.")
    return found


@torch.no_grad()
def kl_on(
    sample: Sample, logits: Callable[[MicroBatch], Tensor], done: Callable[[int], object] = lambda counted: None
) -> float:
    """Mean KL(teacher ‖ model) at T = 1 in nats per counted position, with the tokens outside the teacher's top-k
    entries as one outcome (`kl_bucket` of an evaluation).

    logits: from a micro-batch to `[m, V]` at the positions that count. done: called with the positions of each.
    """
    total = 0.0
    for batch in sample.batches:
        labels = batch.labels.flatten()[batch.targets.index]
        total += float(student_rows(logits(batch), batch.targets, labels)["kl_bucket"].double().sum())
        done(batch.count)
    return total / sample.counted
