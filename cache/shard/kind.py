"""What sets of shards have in common, whatever they hold: their folder, their attributes, their manifest.

`TargetShards` (target_shards.py) describes the shards of a cache, `FeatureShards` (features/layout.py) those of a
feature. Writers, readers, the manifest and `verify` take such a description.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import pyarrow as pa
from numpy.typing import NDArray

from ..spec import FORMAT
from .container import Damage, Expected, read_attributes, stored_digest

Array = NDArray[Any]
SHARDS = "shards/"
MANIFEST = "manifest.parquet"
_NAME = re.compile(r"shards/(0|[1-9][0-9]{0,17})\.zarr\.zip")


def shard_key(index: int, folder: str = "") -> str:
    """The name of a shard's object. folder: as in `ShardKind`."""
    return f"{folder}{SHARDS}{index}.zarr.zip"


def shard_index(key: str, folder: str = "") -> int | None:
    """The number in the name of a shard's object; None for any other name."""
    match = _NAME.fullmatch(key.removeprefix(folder)) if key.startswith(folder) else None
    return int(match[1]) if match else None


class ShardKind(ABC):
    """A set of shards of one spec.

    spec_hash: stands in each of them. folder: before all of its keys, "" or "features/20/".
    label: what messages call the set, before the store: "", or "feature 20 of ".
    """

    noun: ClassVar[str]  # what a shard holds: "target"
    whole: ClassVar[str]  # what the set is: "cache"

    counts: ClassVar[tuple[str, ...]]  # integers in the attributes, each a column of the manifest
    hashes: ClassVar[tuple[str, ...]]  # likewise: 64 digits each, columns `<name>_sha256`
    floats: ClassVar[tuple[str, ...]] = ()  # columns of the manifest, from `floats_of`

    def __init__(self, spec_hash: str, folder: str = "", label: str = "") -> None:
        self.spec_hash = spec_hash
        self.folder = folder
        self.label = label

    def key(self, index: int) -> str:
        """The name of a shard's object."""
        return shard_key(index, self.folder)

    def index(self, key: str) -> int | None:
        """The number in the name of a shard's object; None for any other name."""
        return shard_index(key, self.folder)

    @property
    def manifest_key(self) -> str:
        """The name of the manifest."""
        return f"{self.folder}{MANIFEST}"

    @classmethod
    def schema(cls) -> pa.Schema:
        """The columns of the manifest."""
        return pa.schema(
            [pa.field(name, pa.int64(), nullable=False) for name in ("shard", *cls.counts, "bytes")]
            + [pa.field(name, pa.float64()) for name in cls.floats]
            + [pa.field(f"{name}_sha256", pa.binary(32), nullable=False) for name in (*cls.hashes, "object")]
            + [pa.field("written", pa.int64(), nullable=False), pa.field("attempt", pa.string(), nullable=False)]
        )

    def attributes(self, end: bytes, index: int) -> dict[str, Any]:
        """A shard's attributes, from its object or the last TAIL_LENGTH bytes of it. Raises as `check`."""
        attributes = read_attributes(end)
        self.check(attributes, index)
        return attributes

    def row(self, index: int, end: bytes, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """The manifest's row of a shard of `size` bytes, and its attributes, from its object or the end of it.

        Damage if it is not this shard of this set.
        """
        attributes = self.attributes(end, index)
        row: dict[str, Any] = {"shard": index, "bytes": size, **self.floats_of(attributes)}
        row |= {name: attributes[name] for name in (*self.counts, "written", "attempt")}
        row |= {f"{name}_sha256": bytes.fromhex(attributes[name]) for name in self.hashes}
        return row | {"object_sha256": bytes.fromhex(stored_digest(end))}, attributes

    def check(self, attributes: Mapping[str, Any], index: int) -> None:
        """Damage if the attributes are malformed, or those of another shard, or of another set."""
        for name, number in (("format", FORMAT), ("index", index)):
            need(type(attributes.get(name)) is int and attributes[name] == number, attributes, name, number)
        if attributes.get("spec") != self.spec_hash:
            raise Damage(f"it belongs to a {self.whole} of other settings")
        for name in (*self.counts, "written"):
            value = attributes.get(name)
            need(type(value) is int and 0 <= value < 10**18, attributes, name, "an integer from 0 on")
        for name, digits in (*((name, 64) for name in self.hashes), ("attempt", 32)):
            value = attributes.get(name)
            good = isinstance(value, str) and bool(re.fullmatch(f"[0-9a-f]{{{digits}}}", value))
            need(good, attributes, name, f"{digits} digits")
        self.check_counts(attributes)

    @abstractmethod
    def check_counts(self, attributes: Mapping[str, Any]) -> None:
        """Damage unless the counts fit the settings and each other, and everything else of this kind is well formed."""

    def floats_of(self, attributes: Mapping[str, Any]) -> dict[str, float | None]:
        """The columns `floats` of the manifest."""
        return {}

    @abstractmethod
    def expected(self, attributes: Mapping[str, Any]) -> dict[str, Expected]:
        """The arrays of a shard whose attributes were checked."""

    @abstractmethod
    def check_values(self, attributes: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Damage if arrays that are as expected are not what FORMAT.md allows: a reader's checks, and all others."""


def need(good: bool, attributes: Mapping[str, Any], name: str, expected: Any) -> None:
    """Damage "its <name>: got ...; expected ..." unless `good`."""
    if not good:
        got = repr(attributes.get(name))
        raise Damage(f"its {name}: got {got if len(got) < 80 else got[:80] + ' …'}; expected {expected}")


def exactly(size: int) -> range:
    """The one size that a dimension may have."""
    return range(size, size + 1)
