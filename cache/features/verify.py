"""Checks of the features of a cache: every byte is hashed; deep: every array is also decoded."""

from dataclasses import dataclass, field
from typing import Any

from ..errors import CacheError, StoreError
from ..manifest import read_manifest, runs, shard_key
from ..progress import Shown
from ..shard.container import Damage
from ..shard_checks import CheckedShards, Problem, check_shards
from ..spec import CacheSpec
from ..stores import Store
from .basis import Basis
from .layout import FeatureShards, check_base
from .objects import BASIS, SPEC, listed_objects, read_basis, read_block, read_feature_spec
from .spec import FeatureSpec


@dataclass
class FeatureReport:
    """What was checked of a feature. Its problems are in the report of the cache.

    shards, vectors, bytes: how many; with the bytes of everything beside the shards. sealed: whether it has a manifest.
    missing: numbers of shards that the cache has, and the feature does not have, as [from, to].
    """

    shards: int = 0
    vectors: int = 0
    bytes: int = 0
    sealed: bool = False
    missing: list[list[int]] = field(default_factory=list)


def verify_features(
    store: Store, spec: CacheSpec, base: CheckedShards, *, deep: bool, progress: Shown
) -> tuple[dict[str, FeatureReport], list[Problem]]:
    """Check all features of a cache, and what lies beside them. base: the shards of the cache, checked.

    Raises StoreError if the store fails.
    """
    reports: dict[str, FeatureReport] = {}
    problems: list[Problem] = []
    sizes, foreign = listed_objects(store)
    problems += [Problem(None, None, f"{key!r} belongs to no feature") for key in foreign]
    for name, objects in sorted(sizes.items()):
        if SPEC not in objects:  # a basis alone is of a feature whose capture has begun
            if shards := sum(key.startswith("shards/") for key in objects):
                what = f"there are {shards} shards and no {SPEC}: restore it, or drop the feature"
                problems.append(Problem(None, None, what, name))
            continue
        report = reports[name] = FeatureReport(bytes=sum(size for key, size in objects.items() if "/" not in key))
        try:
            problems += check_feature(store, spec, base, name, report, deep=deep, progress=progress)
        except StoreError:
            raise
        except (CacheError, Damage) as error:
            problems.append(Problem(None, getattr(error, "array", None), _plain(store, error), name))
    return reports, problems


def check_feature(
    store: Store, spec: CacheSpec, base: CheckedShards, name: str, report: FeatureReport, *, deep: bool, progress: Shown
) -> list[Problem]:
    """The problems of a feature; its counts into the report. CacheError or Damage for one that ends the checks."""
    feature = read_feature_spec(store, name)
    if feature is None:
        raise CacheError(f"its {SPEC} was there and is gone")
    if feature.base != spec.hash:
        raise CacheError("it belongs to a cache of other settings")
    basis = read_basis(store, name)
    if basis is None:
        raise CacheError(f"its {BASIS} is missing")
    problems = [Problem(None, None, what, name) for what in _parts(store, feature, basis, deep)]
    kind = FeatureShards(feature, basis.scale)
    manifest = None
    try:
        manifest = read_manifest(store, kind)
    except StoreError:
        raise
    except CacheError as error:  # shards can be checked without their manifest
        problems.append(Problem(None, None, _plain(store, error), name))
    report.sealed = manifest is not None
    found = check_shards(store, kind, manifest, deep=deep, progress=progress, feature=name)
    report.shards, report.bytes = found.shards, report.bytes + found.bytes
    report.vectors = sum(row["vectors"] for row in found.rows)
    problems += found.problems
    problems += [Problem(None, None, f"{key!r} is no shard's name", name) for key in found.foreign]
    bases: dict[int, dict[str, Any]] = {row["shard"]: row for row in base.rows}
    for row in found.rows:
        index, there = row["shard"], bases.get(row["shard"])
        if index not in base.indices:
            # a capture that is running may have written both since the cache's shards were listed
            if not store.exists(shard_key(index)):
                problems.append(Problem(index, None, "the cache has no shard of this number", name))
        elif there:  # else the cache's shard has a problem itself
            try:
                check_base(row["base_sha256"], row["positions"], there["content_sha256"], there["positions"])
            except Damage as damage:
                problems.append(Problem(index, None, str(damage), name))
    report.missing = runs(set(base.indices) - set(found.indices))
    return problems


def _parts(store: Store, spec: FeatureSpec, basis: Basis, deep: bool) -> list[str]:
    """What is wrong with the basis and the block of a feature."""
    found = []
    if basis.sha256 != spec.basis or basis.width != spec.width:
        found.append(f"its {BASIS} is another than the one that its spec names")
    elif deep:
        try:
            basis.check_orthonormal()
        except Damage as damage:
            found.append(f"its {BASIS}: {damage}")
    try:
        read_block(store, spec)
    except StoreError:
        raise
    except CacheError as error:
        found.append(_plain(store, error))
    return found


def _plain(store: Store, error: Exception) -> str:
    return str(error).removeprefix(f"{store.describe()}: ")
