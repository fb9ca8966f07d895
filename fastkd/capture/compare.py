"""Compares stored targets with those that capture makes of the teacher now: their distance, and what the codec allows.

Entries are compared by id. Rounding may exchange entries of nearly equal probability at the end of the top-k; the
teacher's log-probability of a stored entry that it now leaves out is at most that of its last one.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache import CacheSpec
from ..cache.encoding.grid import steps_at

Array = NDArray[Any]
Floats = NDArray[np.float64]

# What float32 adds to the codec's error: nats, nats per nat of the value, and nats per nat of the bound.
_ROUNDING = 1e-5, 1e-6, 2e-3


class Deviations(NamedTuple):
    """e numbers of one kind, in nats, `[e]` each: the row of each, its distance from the teacher's, the distance that
    the codec allows, and the excess of the one over the other."""

    row: NDArray[np.int64]
    distance: Floats
    bound: Floats
    excess: Floats


class Comparison(NamedTuple):
    """Of m rows. deviations: by kind: "top_k", "draws" and "tail" (log-probabilities).

    outcomes, same_top_k, same_draws: bool `[m]`, whether the number of outcomes, and the ids, are the same.
    """

    deviations: dict[str, Deviations]
    outcomes: NDArray[np.bool_]
    same_top_k: NDArray[np.bool_]
    same_draws: NDArray[np.bool_]


def compare(spec: CacheSpec, stored: dict[str, Array], now: dict[str, Array]) -> Comparison:
    """Compare m rows. stored, now: ids, logprobs, tail, outcomes and maybe draws, as `SparseTargets.arrays` names them.

    Drawn entries are compared where both have them; tails where both have as many top-k entries.
    """
    codec = spec.settings
    used, top_k = _used_and_top_k(stored)
    used_now, top_k_now = _used_and_top_k(now)
    row, entry = np.nonzero(used)
    keys, b = _keys(stored, row, entry, spec), stored["logprobs"][row, entry].astype(np.float64)
    row_now, entry_now = np.nonzero(used_now)
    keys_now, values_now = _keys(now, row_now, entry_now, spec), now["logprobs"][row_now, entry_now].astype(np.float64)
    order = np.argsort(keys_now)
    at = order[np.searchsorted(keys_now, keys, sorter=order).clip(max=len(order) - 1)]
    found = keys_now[at] == keys
    best = np.where(top_k_now, now["logprobs"], np.inf).min(1, initial=np.inf)
    most = np.where(np.isneginf(now["tail"][:, 0]), -np.inf, best).astype(np.float64)  # of an entry left out
    a = np.where(found, values_now[at], np.minimum(b, most[row]))

    deviations, first = {}, top_k[row, entry]
    if spec.k:
        half_steps = steps_at(np.minimum(a, b)[first], codec.step, codec.growth, codec.cap) / 2
        deviations["top_k"] = _deviations(row[first], a[first], b[first], half_steps)
    if spec.draws:
        drawn = ~first & found
        deviations["draws"] = _deviations(row[drawn], a[drawn], b[drawn], codec.draw_step / 2)
    counts, counts_now = top_k.sum(1), top_k_now.sum(1)
    rows = np.flatnonzero(counts == counts_now)
    a, b = (x["tail"][rows].astype(np.float64).flatten() for x in (now, stored))
    deviations["tail"] = _deviations(np.repeat(rows, stored["tail"].shape[1]), a, b, codec.tail_step / 2)
    return Comparison(
        deviations,
        outcomes=stored["outcomes"] + counts == now["outcomes"] + counts_now,
        same_top_k=_same(stored, top_k, now, top_k_now),
        same_draws=_same(stored, used & ~top_k, now, used_now & ~top_k_now),
    )


def _used_and_top_k(arrays: dict[str, Array]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    used = arrays["logprobs"] > -np.inf
    return used, used & (arrays["draws"] == 0) if "draws" in arrays else used


def _keys(arrays: dict[str, Array], row: Array, entry: Array, spec: CacheSpec) -> NDArray[np.int64]:
    """Row and id of entries as one number."""
    return row * np.int64(spec.vocab_size) + arrays["ids"][row, entry]


def _same(stored: dict[str, Array], some: Array, now: dict[str, Array], some_now: Array) -> NDArray[np.bool_]:
    """Whether some entries are the same, as ids and numbers of draws, bool `[m]`."""
    a, b = (
        np.sort(np.where(mask, x["ids"].astype(np.int64) << 32 | x.get("draws", 0), -1), axis=1)
        for x, mask in ((stored, some), (now, some_now))
    )
    same: NDArray[np.bool_] = (a == b).all(1)
    return same


def _deviations(row: Array, now: Floats, stored: Floats, bound: Floats | float) -> Deviations:
    with np.errstate(invalid="ignore"):
        distance = np.where(now == stored, 0.0, np.abs(now - stored))  # −inf and −inf are equal
    nats, of_value, of_bound = _ROUNDING
    bound = np.broadcast_to(bound, distance.shape)
    allowed = bound * (1 + of_bound) + nats + of_value * np.abs(np.where(np.isfinite(stored), stored, 0.0))
    return Deviations(row, distance, bound, np.maximum(distance - allowed, 0))
