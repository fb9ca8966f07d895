"""The same teacher, data and settings at other sizes, and what reading takes: arithmetic on what a slice measured."""

import math
from dataclasses import dataclass

import numpy as np

from .costs import manifest_bytes, objects
from .sizes import Sizes

POSITIONS = 10**9, 10**11, 10**12
GPUS = 8, 64, 512
SHARD = 2**20  # positions: the most that a shard has unless it is asked for


@dataclass(frozen=True)
class Scale:
    """A capture of so many positions. bytes: of its shards, of SHARD positions each. objects: in the store when all is
    done, manifest_bytes: of the one that a reader begins with. worker_hours: of workers like the one measured; cost:
    of these, at price_per_hour."""

    positions: int
    bytes: float
    shards: int
    objects: int
    manifest_bytes: int
    worker_hours: float
    cost: float | None


def scales(sizes: Sizes, seconds: float, price_per_hour: float | None) -> list[Scale]:
    """A capture of each of POSITIONS. seconds: of a worker, for each position."""
    found = []
    for positions in POSITIONS:
        shards = math.ceil(positions / SHARD)
        hours = positions * seconds / 3600
        found.append(
            Scale(
                positions=positions,
                bytes=sum(sizes.of(np.full(1, SHARD)).values()) * positions / SHARD,
                shards=shards,
                objects=objects(shards, 1, hours),
                manifest_bytes=manifest_bytes(shards),
                worker_hours=hours,
                cost=None if price_per_hour is None else hours * price_per_hour,
            )
        )
    return found


def readers(student_rate: float, decode: float) -> dict[int, int]:
    """Cores that decode what so many GPUs train on, for each of GPUS. student_rate: positions a second of one GPU;
    decode: seconds of a core for a position."""
    return {gpus: max(1, math.ceil(gpus * student_rate * decode)) for gpus in GPUS}
