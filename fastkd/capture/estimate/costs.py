"""What a capture takes beside the bytes of its shards: time, requests, objects, memory."""

import math

import numpy as np
import torch

from ...cache import CacheSpec
from ...data.lengths import lengths_to_npz
from ..claims import FIRST_SECONDS, LONGEST_SECONDS
from ..window_plan import WindowPlan

_PAGE = 1000  # objects in one response to LIST
_CLAIM_BYTES = 200
_MANIFEST_BYTES = 7000, 190  # fixed, and for each shard
_ENCODING_BYTES = 20, 40  # for an entry, while a shard is encoded: measured; with the codec's contexts


def position_seconds(run: float, encode: float, device: torch.device) -> float:
    """Seconds a position, from those of the teacher with its top-k and those of encoding: a GPU runs while the host
    encodes; a CPU does both, encoding on all cores."""
    return max(run, encode) if device.type == "cuda" else run + encode / torch.get_num_threads()


def capture_hours(plan: WindowPlan, workers: int, seconds: float) -> float:
    """Hours until all workers are done, from one worker's seconds a position. Shards are not divided, so in the last
    round some workers may have none."""
    rounds = math.ceil(plan.shards / workers)
    return seconds * plan.totals["positions"] * rounds / plan.shards / 3600


def objects(shards: int, workers: int = 1, hours: float = 0.0) -> int:
    """Objects in the store after a capture: spec, plan, lengths, manifest, the claim on the lengths; and for each shard
    the shard and its claims."""
    return 5 + shards * (2 + _renewals(hours * 3600 * workers / shards))


def requests(shards: int, workers: int = 1, hours: float = 0.0) -> dict[str, dict[str, int]]:
    """Requests of a whole capture, sealing included, and of an epoch of training from the cache.

    hours: of the capture; claims on shards are renewed from time to time. Several workers may need a few more, if two
    of them want the same shard.
    """
    pages = max(1, math.ceil(shards / _PAGE))
    renewals = shards * _renewals(hours * 3600 * workers / shards)
    # each worker reads plan, lengths, spec and manifest first, the last two again at its end; and for each shard,
    # before it is run and before it is encoded, whether it was written meanwhile, and whether the cache was sealed.
    # sealing writes the manifest, and reads and lists all shards
    capture = {
        "PUT": 3 + 2 * workers + 2 * shards + renewals,
        "GET": 6 * workers + 4 * shards + (workers - 1) * shards,
        # each worker first looks for foreign objects
        "LIST": 1 + workers + (2 * workers + 1) * pages + shards,
    }
    return {"capture": capture, "epoch": {"PUT": 0, "GET": shards + 2, "LIST": 0}}


def _renewals(seconds: float) -> int:
    """How often a claim held for that long is renewed: each time half-way to its end, and for a longer time."""
    count, at = 0, FIRST_SECONDS / 2
    while at < seconds:
        count += 1
        at += (min(at, LONGEST_SECONDS - FIRST_SECONDS) + FIRST_SECONDS) / 2
    return count


def other_bytes(plan: WindowPlan, spec: CacheSpec) -> float:
    """Bytes of all objects except shards."""
    lengths = len(lengths_to_npz(plan.lengths, plan.dataset))
    metadata = len(spec.to_json()) + len(plan.to_json()) + lengths + manifest_bytes(plan.shards)
    return float(metadata + _CLAIM_BYTES * (plan.shards + 1))


def manifest_bytes(shards: int) -> int:
    """Bytes of the manifest of a sealed cache."""
    return _MANIFEST_BYTES[0] + _MANIFEST_BYTES[1] * shards


def host_bytes(spec: CacheSpec, plan: WindowPlan) -> int:
    """Memory of a worker on the host, from shapes: the plan, and the shards that are run, encoded and waiting."""
    n = int(np.diff(plan.shard_rows).max())
    entries = n * spec.width
    entry = 8 + 4 * bool(spec.draws)  # ids, log-probabilities, draws
    shard = entries * entry + n * (4 * len(spec.temperatures) + 4 + 32)
    encoding = entries * _ENCODING_BYTES[spec.settings.contexts]
    return min(3, plan.shards) * shard + encoding + 64 * n + 24 * len(plan.lengths) + 8 * int(plan.first_segment[-1])
