"""What a capture costs beside its bytes: requests, objects, memory, hours. From a plan, by what the job does."""

import math

import numpy as np
import torch

from ...cache import CacheSpec
from ...data.lengths import lengths_to_npz
from ..claims import FIRST_SECONDS, LONGEST_SECONDS
from ..window_plan import WindowPlan

_PAGE = 1000  # objects that a listing names at a time
_CLAIM_BYTES = 200
_MANIFEST_BYTES = 7000, 190  # and for each shard
_ENCODING_BYTES = 20, 40  # of an entry, while a shard is encoded: measured; with contexts


def objects(shards: int, workers: int = 1, hours: float = 0.0) -> int:
    """Objects in the store when a capture is done: spec, plan, lengths, manifest; of each shard, itself and the claims
    on it; and the claim on the lengths. hours: by the clock."""
    return 5 + shards * (2 + _renewals(hours * 3600 * workers / shards))


def requests(shards: int, workers: int = 1, hours: float = 0.0) -> dict[str, dict[str, int]]:
    """Requests of a capture from nothing, of sealing alone, and of an epoch of reading the sealed cache.

    hours: by the clock; a claim that is held is renewed now and then. Several workers may ask a little more, where two
    want the same shard.
    """
    pages = max(1, math.ceil(shards / _PAGE))
    seal = {"PUT": 1, "GET": shards, "LIST": pages}
    renewals = shards * _renewals(hours * 3600 * workers / shards)
    # each worker looks for plan, lengths, spec and manifest, at its end for the last two again; and, shard by shard,
    # whether another was faster: before it is run, before it is encoded, and whether the cache is sealed meanwhile
    capture = {
        "PUT": 2 + 2 * workers + 2 * shards + renewals,
        "GET": 6 * workers + 3 * shards + (workers - 1) * shards,
        # each worker looks first whether anything else lies there
        "LIST": 1 + workers + 2 * workers * pages + shards,
    }
    return {
        "capture": {name: count + seal[name] for name, count in capture.items()},
        "seal": {**seal, "GET": shards + 2},
        "epoch": {"PUT": 0, "GET": shards + 2, "LIST": 0},
    }


def _renewals(seconds: float) -> int:
    """How often a claim is renewed that is held for so long: half-way to its end, and each time for longer."""
    count, at = 0, FIRST_SECONDS / 2
    while at < seconds:
        count += 1
        at += (min(at, LONGEST_SECONDS - FIRST_SECONDS) + FIRST_SECONDS) / 2
    return count


def other_bytes(plan: WindowPlan, spec: CacheSpec) -> float:
    """Bytes of all objects that are no shards."""
    lengths = len(lengths_to_npz(plan.lengths, plan.dataset))
    written = len(spec.to_json()) + len(plan.to_json()) + lengths + manifest_bytes(plan.shards)
    return float(written + _CLAIM_BYTES * (plan.shards + 1))


def manifest_bytes(shards: int) -> int:
    """Bytes of the manifest of a sealed cache."""
    return _MANIFEST_BYTES[0] + _MANIFEST_BYTES[1] * shards


def host_bytes(spec: CacheSpec, plan: WindowPlan) -> int:
    """Memory of a worker on the host, by shapes: the plan, and shards being run, read, encoded and written."""
    n = int(np.diff(plan.shard_rows).max())
    places = n * spec.width
    entry = 8 + 4 * bool(spec.draws)  # ids, log-probabilities, draws
    shard = places * entry + n * (4 * len(spec.temperatures) + 4 + 32)
    held = min(3, plan.shards)  # one is run, one is encoded, one waits
    encoding = places * _ENCODING_BYTES[spec.settings.contexts]
    return held * shard + encoding + 64 * n + 24 * len(plan.lengths) + 8 * int(plan.first_segment[-1])


class Clock:
    """From seconds a position to hours and cost of a whole capture.

    price_per_hour: of a worker; None: not known. device: where the teacher is.
    """

    def __init__(self, plan: WindowPlan, workers: int, price_per_hour: float | None, device: torch.device) -> None:
        # shards are not shared: the last ones leave workers without any
        rounds = math.ceil(plan.shards / workers)
        self._positions = plan.totals["positions"] * rounds / plan.shards
        self._workers, self._price = workers, price_per_hour
        self._threads = None if device.type == "cuda" else torch.get_num_threads()

    def position(self, run: float, encode: float) -> float:
        """Seconds of a position: a GPU works while the host encodes; a CPU does both."""
        return max(run, encode) if self._threads is None else run + encode / self._threads

    def hours(self, position: float) -> float:
        """Hours by the clock."""
        return position * self._positions / 3600

    def cost(self, position: float) -> float | None:
        """What all workers cost for so long."""
        return None if self._price is None else self._price * self._workers * self.hours(position)
