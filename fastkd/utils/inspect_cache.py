"""What a cache holds: from a `Cache` to a plain report, made of what JSON knows. `report_text.py` makes it text."""

from collections.abc import Collection
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache.capture_plan import planned_shards
from ..cache.errors import NotFound, StoreError
from ..cache.manifest import STATISTICS, gaps, overlaps
from ..cache.scan import (
    PREFIX,
    corrupt,
    scan,
    shard_index,
    shard_key,
)
from ..cache.shard.container import TAIL_LENGTH, Damage, read_attributes
from ..cache.shard.layout import check_attributes
from ..cache.spec import CODECS, FORMAT
from .text import TEXTS, without_credentials

if TYPE_CHECKING:
    import pyarrow as pa

    from ..cache import Cache

Report = dict[str, Any]

MOST_READ = 32  # shards whose own account of their arrays is read
_COUNTS = ("sequences", "positions", "counted", "head_entries", "draw_entries", "bytes")


def inspect_cache(cache: "Cache", *, progress: bool = False) -> Report:
    """What the cache is, from whom, how much it holds, what that costs, and what is missing.

    Of each shard its end is read; of a sealed cache, the ends of up to 32 shards. Where the store cannot be listed,
    `missing.listed` is False, and only the manifest speaks. Numbers of shards and sequences are given as [from, to],
    both included. progress: a bar on stderr.

    Raises CorruptShard where a shard's end is damaged, StoreError where the store fails.
    """
    try:
        sizes = {entry.key: entry.size for entry in cache.store.list(PREFIX)}
    except StoreError:
        if not cache.sealed:
            raise
        sizes = None
    there = {i: size for key, size in sorted((sizes or {}).items()) if (i := shard_index(key)) is not None}
    table = cache.manifest if cache.sealed else scan(cache.store, cache.spec, there, progress=progress)
    total = {name: int(table.column(name).to_numpy().sum()) for name in _COUNTS}
    spec = cache.spec
    settings = {k: v for k, v in asdict(spec).items() if k not in TEXTS}
    name = next((name for name, codec in CODECS.items() if codec == spec.settings), "custom")
    known = set(table.column("shard").to_pylist())
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
        "bytes_per_position": total["bytes"] / total["positions"] if total["positions"] else None,
        "arrays": arrays,
        "mass": _statistics(table, "mass"),
        "entropy": _statistics(table, "entropy"),
        "missing": {
            "shards": gaps(table.column("shard").to_numpy(), end=planned_shards(cache.store)),
            "sequences": gaps(*(table.column(name).to_numpy() for name in ("first_sequence", "sequences"))),
            "objects": runs(gone | (known - there.keys() if sizes is not None else set())),
            "listed": sizes is not None,
        },
        "overlaps": [list(pair) for pair in overlaps(table)],
        "not_in_manifest": runs(there.keys() - known),
        "foreign": sorted(key for key in sizes or {} if shard_index(key) is None),
    }


def _statistics(table: "pa.Table", what: str) -> dict[str, float | None]:
    """The mean over all positions that count; and of each quantile, the mean of the shards' own, by what counts."""
    weight = table.column("counted").to_numpy().astype(np.float64)
    found: dict[str, float | None] = {}
    for which in STATISTICS:
        values = table.column(f"{what}_{which}").to_numpy()
        use = (weight > 0) & np.isfinite(values)
        found[which] = float(np.average(values[use], weights=weight[use])) if use.any() else None
    return found


def _arrays(cache: "Cache", table: "pa.Table", shards: list[int]) -> tuple[Report, set[int]]:
    """Bytes a position by array, from up to MOST_READ shards, evenly chosen; and those that were not to be had."""
    places = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), MOST_READ)).round().astype(int))
    chosen, gone = [shards[i] for i in places] if shards else [], set()
    rows = {row["shard"]: row for row in table.select(["shard", "bytes", "positions"]).to_pylist()}
    by_array: dict[str, int] = {}
    positions = total = read = 0
    for index in chosen:
        try:
            attributes = read_attributes(cache.store.get_tail(shard_key(index), TAIL_LENGTH))
            check_attributes(attributes, cache.spec, index)
            taken = attributes.get("bytes")
            size = rows[index]["bytes"]
            if not isinstance(taken, dict) or not all(type(n) is int and 0 <= n <= size for n in taken.values()):
                raise Damage("it does not say how many bytes its arrays take")
        except NotFound:
            gone.add(index)
            continue
        except Damage as damage:
            raise corrupt(cache.store, index, damage) from damage
        for name, stored in taken.items():
            by_array[name] = by_array.get(name, 0) + stored
        positions += rows[index]["positions"]
        total += size
        read += 1
    sized = [*sorted(by_array.items(), key=lambda item: -item[1]), ("other", total - sum(by_array.values()))]
    each = {name: size / positions for name, size in sized} if positions else {}
    return {"shards_read": read, "bytes_per_position": each}, gone


def runs(numbers: Collection[int]) -> list[list[int]]:
    """Numbers as [from, to], both included."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found
