"""Checks that every shard is the one that was committed: every byte is hashed; deep: every array is also decoded."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from .capture_plan import read_capture_plan
from .errors import CacheError, NotFound, StoreError
from .features.verify import FeatureReport, verify_features
from .manifest import PREFIX, gaps, overlaps, read_manifest, read_spec, table_of
from .progress import Shown
from .shard_checks import Problem as Problem
from .shard_checks import check_shards
from .spec import CacheSpec
from .stores import Store, open_store
from .target_shards import TargetShards


@dataclass
class Report:
    """The result of `verify`. False where there is a problem.

    shards, positions, bytes: how many were checked. deep, sealed: whether arrays were decoded, and the cache is sealed.
    unlisted: why a sealed cache's store could not be listed; objects that the manifest does not name, and features,
    were then not looked for. missing: numbers of shards that do not exist, as [from, to], up to the last one or the
    last planned one. features: the same of each feature, by name; their problems are among the others.
    """

    shards: int = 0
    positions: int = 0
    bytes: int = 0
    deep: bool = False
    sealed: bool = False
    unlisted: str | None = None
    problems: list[Problem] = field(default_factory=list)
    missing: list[list[int]] = field(default_factory=list)
    features: dict[str, FeatureReport] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok


def verify_cache(path_or_store: Any, *, deep: bool = True, progress: Shown = False) -> Report:
    """`verify` the cache at a path, a URL or in a store. A spec or a manifest that cannot be read is a problem too.

    Raises CacheError if there is no cache, and StoreError if the store fails.
    """
    store = open_store(path_or_store)
    try:
        spec = read_spec(store)
    except StoreError:
        raise
    except CacheError as error:
        what = str(error).removeprefix(f"{store.describe()}: ")
        if isinstance(error.__cause__, NotFound):
            shards = 0
            with suppress(StoreError):
                shards = sum(1 for _ in store.list(PREFIX))
            if not shards:
                raise
            what = f"spec.json is missing, and {shards} objects in {PREFIX} exist; restore it"
        return Report(deep=deep, problems=[Problem(None, None, what)])
    try:
        return verify(store, spec, read_manifest(store, TargetShards(spec)), deep=deep, progress=progress)
    except StoreError:
        raise
    except CacheError as error:  # shards can be checked without their manifest
        report = Report(deep=deep)
        with suppress(StoreError):
            report = verify(store, spec, None, deep=deep, progress=progress)
        report.problems.insert(0, Problem(None, None, str(error).removeprefix(f"{store.describe()}: ")))
        return report


def verify(
    store: Store, spec: CacheSpec, manifest: pa.Table | None, *, deep: bool = True, progress: Shown = False
) -> Report:
    """Check every shard of a cache, and its features. manifest: that of a sealed cache.

    Each object is read whole and compared with its own hash, its name, the spec, and the manifest. deep: its arrays are
    decoded as a reader would, and compared with the hash of their contents. Shards that are missing between others,
    that overlap, or that are not in the manifest are problems too. Raises StoreError if the store fails.
    """
    sealed, kind = manifest is not None, TargetShards(spec)
    found = check_shards(store, kind, manifest, deep=deep, progress=progress)
    report = Report(found.shards, sum(row["positions"] for row in found.rows), found.bytes, deep, sealed)
    report.unlisted, report.problems = found.unlisted, found.problems
    try:
        plan = read_capture_plan(store, spec)
    except StoreError:
        raise
    except CacheError as error:
        plan = None
        report.problems.append(Problem(None, None, str(error).removeprefix(f"{store.describe()}: ")))
    report.missing = gaps(np.array(found.indices, np.int64), end=0 if plan is None else plan.shards)
    for first, last in [] if sealed else report.missing:
        if 0 < first < max(found.indices, default=0):  # those before the first may be another writer's, not begun yet
            what = "it is missing" if first == last else f"it and all up to {last} are missing"
            report.problems.append(Problem(first, None, f"{what}, between others that exist"))
    for one, other in overlaps(table_of(found.rows, kind)):
        report.problems.append(Problem(other, None, f"it holds some of the sequences of shard {one}"))
    report.problems += [Problem(None, None, f"{key!r} is no shard's name") for key in found.foreign]
    if found.unlisted is None:
        report.features, problems = verify_features(store, spec, found, deep=deep, progress=progress)
        report.problems += problems
    return report
