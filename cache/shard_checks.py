"""Checks that the shards of a set are those that were committed, and a list of what is wrong."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from .errors import NotFound, Refused, StoreError
from .manifest import PREFIX, read_object
from .progress import Shown, shown
from .shard.container import Damage, content_hash, unpack
from .shard.kind import ShardKind
from .stores import Store


@dataclass(frozen=True)
class Problem:
    """A problem. shard: None for all of the cache or feature. array: None if it is not known, or all of them.

    feature: the name of the feature; None if it is not one's.
    """

    shard: int | None
    array: str | None
    what: str
    feature: str | None = None

    def __str__(self) -> str:
        whole = "the cache" if self.feature is None else f"feature {self.feature}"
        shard = f"shard {self.shard}" if self.feature is None else f"{whole}, shard {self.shard}"
        place = whole if self.shard is None else shard
        return f"{place}{f', array {self.array}' if self.array else ''}: {self.what}"


@dataclass
class CheckedShards:
    """The result of `check_shards`.

    rows: of the manifest, of every shard without a problem. indices: the numbers of all shards. shards, bytes: how many
    were read. foreign: other objects among them. unlisted: why the store could not be listed.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    shards: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    unlisted: str | None = None


def check_shards(
    store: Store, kind: ShardKind, manifest: pa.Table | None, *, deep: bool, progress: Shown, feature: str | None = None
) -> CheckedShards:
    """Read every shard of a set whole, and compare it with its own hash, its name, its spec, and the manifest.

    manifest: of a sealed set. deep: its arrays are decoded as a reader would, and compared with the hash of their
    contents. feature: its name, for problems. Raises StoreError if the store fails.
    """
    found = CheckedShards()
    numbers: dict[str, int | None] = {}
    try:
        numbers = {entry.key: kind.index(entry.key) for entry in store.list(f"{kind.folder}{PREFIX}")}
    except StoreError as error:  # HTTP has no listing
        if manifest is None:
            raise
        found.unlisted = str(error)
    known = {} if manifest is None else {row["shard"]: row for row in manifest.to_pylist()}
    found.indices = sorted({index for index in numbers.values() if index is not None} | known.keys())
    found.foreign = sorted(key for key, index in numbers.items() if index is None)
    label = "verify" if feature is None else f"verify {feature}"
    for index in shown(found.indices, len(found.indices), label, progress):
        try:
            data = read_object(store, kind, index)
            found.bytes += len(data)
            row = _checked_row(kind, index, data, known.get(index), deep)
        except NotFound:
            what = "it is in the manifest, and its object is missing"
            found.problems.append(Problem(index, None, what, feature))
            continue
        except (Damage, Refused, MemoryError) as error:
            what = "there is not enough memory for it" if isinstance(error, MemoryError) else str(error)
            found.problems.append(Problem(index, getattr(error, "array", None), what, feature))
            found.shards += 1
            continue
        found.shards += 1
        if manifest is not None and index not in known:
            what = f"it is not in the manifest: it was written after the {kind.whole} was sealed"
            found.problems.append(Problem(index, None, what, feature))
        found.rows.append(row)
    return found


def _checked_row(kind: ShardKind, index: int, data: bytes, known: dict[str, Any] | None, deep: bool) -> dict[str, Any]:
    """The manifest's row of a shard, from its object. Damage if it is wrong. known: the row as it was sealed."""
    row, attributes = kind.row(index, data, len(data))
    if known is not None and known["object_sha256"] != row["object_sha256"]:
        raise Damage("it is another object than the one that was sealed")
    if known is not None and known != row:
        raise Damage("its attributes differ from the manifest")
    if deep:
        arrays = unpack(data, kind.expected(attributes))
        if content_hash(arrays) != attributes["content"]:
            raise Damage("its decoded arrays differ from the hash of its contents")
        kind.check_values(attributes, arrays)
    return row
