"""What the features of a cache are, and what they take, in JSON values."""

import json
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..credentials import without_credentials
from ..manifest import runs
from ..progress import Shown
from .objects import listed_objects

if TYPE_CHECKING:
    from ..reader import Cache
    from .reader import Feature

Report = dict[str, Any]
_SETTINGS = ("kind", "layer", "layers", "shape", "step", "positions", "seed", "dtype")


def inspect_features(cache: "Cache", *, progress: Shown = False) -> dict[str, Report]:
    """The features of a cache by name: settings, counts, sizes in bytes, and which shards are missing.

    bytes: of all objects of a feature. bytes_per_position: of its shards, over the positions that they have values of;
    bytes_beside: of basis, block and everything else. kl: the divergence that the capture measured when it chose the
    step, or recorded in the first shard (nats a position), or None.
    missing: shards of the cache that the feature does not have, as [from, to].
    Raises CorruptShard if a shard's end is damaged, StoreError if the store fails or cannot be listed.
    """
    (sizes, _), shards = listed_objects(cache.store), cache.shards
    return {name: _inspect(cache, name, sizes[name], shards, progress) for name in cache.features if name in sizes}


def _inspect(cache: "Cache", name: str, sizes: dict[str, int], shards: list[int], progress: Shown) -> Report:
    feature = cache.features[name]
    table = feature.manifest if feature.sealed else feature.scan(progress=progress)
    there: list[int] = table.column("shard").to_pylist()
    total = {n: int(table.column(n).to_numpy().sum()) for n in ("positions", "vectors", "exact", "bytes")}
    stored = total["vectors"] / feature.spec.vectors
    return {
        **{n: getattr(feature.spec, n) for n in _SETTINGS},
        "notes": without_credentials(feature.spec.notes),
        "sha256": feature.spec.hash,
        "sealed": feature.sealed,
        "shards": len(there),
        **{n: total[n] for n in ("positions", "vectors", "exact")},
        "stored_positions": int(stored),
        "bytes": sum(sizes.values()),
        "bytes_beside": sum(size for key, size in sizes.items() if not key.startswith("shards/")),
        "bytes_per_position": total["bytes"] / stored if stored else None,
        "kl": _divergence(feature, there),
        "missing": runs(set(shards) - set(there)),
    }


def _divergence(feature: "Feature", shards: list[int]) -> float | None:
    """What the coded states cost, if the notes or the record of the first shard tell."""
    found: Any = None
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        found = json.loads(feature.spec.notes)["step_search"]["kl"]
    if found is None and shards:
        record = feature.attributes(shards[0]).get("record")
        found = record.get("kl") if isinstance(record, dict) else None
    return found if type(found) is float and math.isfinite(found) else None
