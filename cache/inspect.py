"""A report of the contents of a cache, in JSON values."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from .capture_plan import CapturePlan, readable_plan
from .credentials import without_credentials
from .errors import CacheError, NotFound, StoreError
from .features.inspect import inspect_features
from .manifest import PREFIX, STATISTICS, corrupt, gaps, overlaps, runs
from .progress import Shown
from .provenance import TEXTS
from .shard.container import Damage
from .shard.kind import shard_index
from .spec import CODECS, FORMAT
from .target_shards import TargetShards

if TYPE_CHECKING:
    import pyarrow as pa

    from .reader import Cache

Report = dict[str, Any]

MOST_READ = 32  # shards from which the sizes of arrays are read
_COUNTS = ("sequences", "positions", "counted", "head_entries", "draw_entries", "bytes")


def inspect_cache(cache: "Cache", *, progress: Shown = False) -> Report:
    """The settings and fingerprints of a cache, its counts, its sizes in bytes, and what is missing.

    The end of each shard is read; of a sealed cache, the ends of up to 32 shards. If the store cannot be listed,
    `missing.listed` is False, and the report is from the manifest alone, without features. Numbers of shards and
    sequences are given as [from, to], both included. progress: see `Shown`.

    Raises CorruptShard if a shard's end is damaged, StoreError if the store fails.
    """
    try:
        sizes = {entry.key: entry.size for entry in cache.store.list(PREFIX)}
    except StoreError:
        if not cache.sealed:
            raise
        sizes = None
    there = {i: size for key, size in sorted((sizes or {}).items()) if (i := shard_index(key)) is not None}
    table = cache.manifest if cache.sealed else cache.scan(there, progress=progress)
    total = {name: int(table.column(name).to_numpy().sum()) for name in _COUNTS}
    spec = cache.spec
    settings = {k: v for k, v in asdict(spec).items() if k not in TEXTS}
    name = next((name for name, codec in CODECS.items() if codec == spec.settings), "custom")
    known = set(table.column("shard").to_pylist())
    plan = readable_plan(cache.store)
    arrays, gone = _arrays(cache, table, [i for i in sorted(known) if sizes is None or i in there])
    return {
        "cache": cache.store.describe(),
        "format": FORMAT,
        "sealed": cache.sealed,
        "spec_sha256": spec.hash,
        **{name: without_credentials(getattr(spec, name)) for name in TEXTS},
        "settings": settings | {"codec": {"name": name, **asdict(spec.settings)}},
        "shards": len(table),
        **total,
        "held_out": _held_out(plan, table),
        "bytes_per_position": total["bytes"] / total["positions"] if total["positions"] else None,
        "arrays": arrays,
        "mass": _statistics(table, "mass"),
        "entropy": _statistics(table, "entropy"),
        "missing": {
            "shards": gaps(table.column("shard").to_numpy(), end=0 if plan is None else plan.shards),
            "sequences": gaps(*(table.column(name).to_numpy() for name in ("first_sequence", "sequences"))),
            "objects": runs(gone | (known - there.keys() if sizes is not None else set())),
            "listed": sizes is not None,
        },
        "overlaps": [list(pair) for pair in overlaps(table)],
        "not_in_manifest": runs(there.keys() - known),
        "foreign": sorted(key for key in sizes or {} if shard_index(key) is None),
        "features": {} if sizes is None else inspect_features(cache, progress=progress),
    }


def _held_out(plan: CapturePlan | None, table: "pa.Table") -> Report:
    """Documents that are held out, by the plan, and the sequences and positions of their shards that are there; None
    each where that is not known, and why."""
    if plan is None:
        why = "there is no plan.json that can be read"
        return {"documents": None, "sequences": None, "positions": None, "why": why}
    held = table.column("shard").to_numpy() >= plan.train_shards
    counts = {name: int(table.column(name).to_numpy()[held].sum()) for name in ("sequences", "positions")}
    return {"documents": plan.totals.get("held_out", 0), **counts}


def _statistics(table: "pa.Table", what: str) -> dict[str, float | None]:
    """The mean over all counted positions; for quantiles the mean over shards, weighted by their counted positions."""
    weight = table.column("counted").to_numpy().astype(np.float64)
    found: dict[str, float | None] = {}
    for which in STATISTICS:
        values = table.column(f"{what}_{which}").to_numpy()
        use = (weight > 0) & np.isfinite(values)
        found[which] = float(np.average(values[use], weights=weight[use])) if use.any() else None
    return found


def _arrays(cache: "Cache", table: "pa.Table", shards: list[int]) -> tuple[Report, set[int]]:
    """Bytes per position by array, from up to MOST_READ evenly chosen shards; and the shards that do not exist."""
    places = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), MOST_READ)).round().astype(int))
    chosen, gone = [shards[i] for i in places] if shards else [], set()
    rows = {row["shard"]: row for row in table.select(["shard", "bytes", "positions"]).to_pylist()}
    by_array: dict[str, int] = {}
    positions = total = read = 0
    for index in chosen:
        size = rows[index]["bytes"]
        try:
            taken = cache.attributes(index).get("bytes")
        except CacheError as error:
            if not isinstance(error.__cause__, NotFound):
                raise
            gone.add(index)
            continue
        if not isinstance(taken, dict) or not all(type(n) is int and 0 <= n <= size for n in taken.values()):
            raise corrupt(
                cache.store, TargetShards(cache.spec), index, Damage("it does not have the sizes of its arrays")
            )
        for name, stored in taken.items():
            by_array[name] = by_array.get(name, 0) + stored
        positions += rows[index]["positions"]
        total += size
        read += 1
    sized = [*sorted(by_array.items(), key=lambda item: -item[1]), ("other", total - sum(by_array.values()))]
    each = {name: size / positions for name, size in sized} if positions else {}
    return {"shards_read": read, "bytes_per_position": each}, gone
