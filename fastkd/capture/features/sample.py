"""The first positions of a plan, and their states, from which a feature's basis is learnt."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ...data.documents import Documents
from ...data.examples import Examples
from ...data.packing import batches
from ...errors import DataError
from ..feature_collect import States
from ..feature_places import Place
from ..feature_settings import ALL
from ..rows import Ints, ShardRows, read_shard_rows
from ..teacher_pass import TeacherPass
from ..window_plan import WindowPlan

POSITIONS = 2**14
"""Positions from which a basis is learnt: those at the beginning of the plan."""
_VECTORS = 2**16  # of maps: more pixels are alike
_MOST = 2**17  # positions that are run for them, where few have a target


def first_rows(
    plan: WindowPlan, data: Documents | Examples, positions: str, count: int, skip: int = 0
) -> Iterator[tuple[int, ShardRows]]:
    """The rows of the first segments of a plan, and their shards, with at least `count` positions that may be stored.

    positions: see `stored_rows`; of a fraction, all that it is chosen among. skip: shards at the beginning that are
    left out. DataError if there is none.
    """
    found = run = 0
    for index in range(skip, plan.shards):
        rows = read_shard_rows(plan, data, index)
        ends = np.cumsum(rows.document_lengths, dtype=np.int64)
        stored = np.cumsum(eligible(rows, positions))[ends - 1]
        segments = 1 + int(np.searchsorted(stored, count - found))
        segments = min(segments, 1 + int(np.searchsorted(ends, _MOST - run)), len(ends))
        yield index, rows.select(np.arange(segments))
        found, run = found + int(stored[segments - 1]), run + int(ends[segments - 1])
        if found >= count or run >= _MOST:
            break
    if not found:
        raise DataError(
            f"features: none of the first {run:,} positions has a target, so that no basis can be learnt. Use "
            "--feature-positions all."
        )


def eligible(rows: ShardRows, positions: str) -> NDArray[np.bool_]:
    """The rows that may be stored, bool `[n]`."""
    return np.ones(len(rows), np.bool_) if positions == ALL else rows.counts


def batches_of(rows: ShardRows, batch_tokens: int) -> list[Ints]:
    """All segments of some rows in batches."""
    return batches(rows.document_lengths.astype(np.int64), batch_tokens)


def sample_states(
    teacher_pass: TeacherPass,
    data: Documents | Examples,
    plan: WindowPlan,
    places: Sequence[Place],
    positions: str,
    count: int = POSITIONS,
) -> list[NDArray[np.float32]]:
    """The states at each place of the first positions of a plan, float32 `[m, W]`, in their order; of maps, up to 2^16
    pixels. Raises TeacherError for NaN or infinity."""
    found: list[list[NDArray[np.float32]]] = [[] for _ in places]
    for shard, rows in first_rows(plan, data, positions, count):
        each = max(1, -(-_VECTORS // min(count, plan.totals["positions"])))
        states = [States(place, rows, eligible(rows, positions), each) for place in places]
        teacher_pass.run(
            rows, batches_of(rows, plan.settings.batch_tokens), data, shard, targets=False, collectors=states
        )
        for kept, some in zip(found, states, strict=True):
            kept.append(some.vectors())
    return [np.concatenate(kept) for kept in found]
