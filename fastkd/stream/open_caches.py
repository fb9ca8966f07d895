"""The caches that a loader reads, one or a mixture, and whether they can be used together."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ..cache.reader import Cache, open_cache
from ..errors import StreamError
from .mixture import SMALLEST_SHARE
from .split import ShardTable


def open_sources(cache: Any) -> tuple[list[Cache], list[Fraction]]:
    """The caches and their weights, of one cache or of a mixture [(cache, weight), ...]."""
    if not isinstance(cache, (list, tuple)):
        return [_open(cache)], [Fraction(1)]
    weights = []
    for entry in cache:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise StreamError(f"cache: got {entry!r} in a mixture; expected pairs of a cache and its weight.")
        weight = entry[1]
        if isinstance(weight, (bool, str)) or not hasattr(weight, "__float__") or not 0 < float(weight) < math.inf:
            raise StreamError(f"cache: got the weight {weight!r} for {entry[0]!r}; expected a positive number.")
        weights.append(Fraction(float(weight)))
    if not weights:
        raise StreamError("cache: got an empty mixture; expected a cache, or pairs of a cache and its weight.")
    return [_open(entry[0]) for entry in cache], weights


def _open(cache: Any) -> Cache:
    return cache if isinstance(cache, Cache) else open_cache(cache)


def check_alike(caches: Sequence[Cache]) -> None:
    """StreamError if the caches of a mixture cannot be used for one student."""
    for cache in caches:
        for name in ("vocab_size", "temperatures", "draw_temperature", "tokenizer"):
            ours, first = (getattr(c.spec, name) for c in (cache, caches[0]))
            if ours != first:
                raise StreamError(
                    f"cache: {caches[0]!r} and {cache!r} cannot be mixed: {name} is {first!r} in one and {ours!r} in "
                    "the other. Capture one of them again."
                )


def shares_of(tables: Sequence[ShardTable], weights: Sequence[Fraction]) -> list[Fraction]:
    """The part of the sequences to take from each cache, so that its part of the positions is its weight."""
    per_sequence = [
        weight * int(t.sequences.sum()) / int(t.positions.sum()) for t, weight in zip(tables, weights, strict=True)
    ]
    shares = [part / sum(per_sequence, Fraction(0)) for part in per_sequence]
    for table, share in zip(tables, shares, strict=True):
        if share < SMALLEST_SHARE:
            raise StreamError(
                f"cache: the weight of {table.cache!r} comes to {float(share):.1e} of the sequences; expected at least "
                "1e-6."
            )
    return shares
