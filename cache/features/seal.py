"""Sealing the features of a cache."""

from typing import TYPE_CHECKING, Any

from ..manifest import runs
from ..progress import Shown
from .writer import FeatureWriter

if TYPE_CHECKING:
    from ..reader import Cache


def seal_features(cache: "Cache", *, progress: Shown = False) -> dict[str, dict[str, Any]]:
    """Seal the features of a cache that have all of its shards; what was found, by name.

    already: it was sealed before. shards: how many. missing: shards of the cache that it does not have, as [from, to];
    it is then left open. Raises as `ShardWriter.seal`.
    """
    reports: dict[str, dict[str, Any]] = {}
    for name in cache.features:
        try:
            feature = cache.features[name]
        except KeyError:  # dropped meanwhile
            continue
        there = feature.shards
        missing = runs(set(cache.shards) - set(there))
        reports[name] = {"already": feature.sealed, "shards": len(there), "missing": missing}
        if there and not missing:
            with FeatureWriter(cache.store, feature.spec, feature.basis, threads=1, queue=0) as writer:
                writer.seal(progress=progress)
    return reports
