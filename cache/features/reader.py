"""Reading features: `Cache.features`, by name, and the states of a shard."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..encoding.hidden import decode_states
from ..errors import CacheError
from ..manifest import read_manifest
from ..progress import Shown
from ..shard.container import unpack
from ..shard_checks import CheckedShards, Problem
from ..shard_reader import ShardReader
from ..workspace import Workspace
from .basis import Basis
from .layout import FeatureShards, check_base, decode_shard
from .objects import BASIS, is_number, listed_features, read_basis, read_block, read_feature_spec
from .spec import FeatureSpec
from .verify import FeatureReport, check_feature

if TYPE_CHECKING:
    from ..reader import Cache

Array = NDArray[Any]
Arrays = dict[str, Array]


class Features(Mapping[str, "Feature"]):
    """The features of a cache by name. A feature is opened by its name alone; only iteration lists the store.

    The state that enters the final norm is found as "-1" and by the number of the layers; other negative numbers count
    from there.
    """

    def __init__(self, cache: "Cache") -> None:
        self._cache = cache

    def __getitem__(self, name: str) -> "Feature":
        cache = self._cache
        spec = read_feature_spec(cache.store, name)
        if spec is None and (other := self._alias(name)) is not None:
            spec = read_feature_spec(cache.store, other)
        if spec is None:
            raise KeyError(name)
        return open_feature(cache, spec)

    def __iter__(self) -> Iterator[str]:
        return iter(listed_features(self._cache.store))

    def __len__(self) -> int:
        return len(listed_features(self._cache.store))

    def __repr__(self) -> str:
        return f"Features({self._cache.store.describe()})"

    def _alias(self, name: str) -> str | None:
        """The other name of a state, if it has one."""
        if not is_number(name):
            return None
        number = int(name)
        final = read_feature_spec(self._cache.store, "-1")
        layers = final.layers if final else None
        if layers is None and number < 0:  # any state knows how many layers there are
            specs = (read_feature_spec(self._cache.store, other) for other in self if is_number(other))
            layers = next((spec.layers for spec in specs if spec and spec.layers), None)
        if layers is None:
            return None
        if number < 0:
            number += layers + 1
        return "-1" if number == layers else str(number)


def open_feature(cache: "Cache", spec: FeatureSpec) -> "Feature":
    """The feature of this spec, with its basis. CacheError if it belongs to another cache, or a part is damaged."""
    store = cache.store
    if spec.base != cache.spec.hash:
        raise CacheError(f"feature {spec.name} of {store.describe()}: it belongs to a cache of other settings.")
    basis = read_basis(store, spec.name)
    if basis is None or basis.sha256 != spec.basis or basis.width != spec.width:
        what = "is missing" if basis is None else "is another than the one that the spec names"
        raise CacheError(
            f"feature {spec.name} of {store.describe()}: {spec.folder}{BASIS} {what}. Restore it, or drop the feature."
        )
    return Feature(cache, spec, basis, read_manifest(store, FeatureShards(spec, basis.scale)))


class Feature(ShardReader):
    """A feature of a cache, open for reading.

    store, spec, basis: its store, its settings, its basis. name: as in the spec. sealed: whether it has a manifest.
    shards: the numbers of its shards, those of the cache's shards that they belong to.
    """

    def __init__(self, cache: "Cache", spec: FeatureSpec, basis: Basis, manifest: pa.Table | None) -> None:
        super().__init__(cache.store, FeatureShards(spec, basis.scale), manifest)
        self.spec = spec
        self.basis = basis
        self._cache = cache

    def __repr__(self) -> str:
        return f"Feature({self.name!r} of {self.store.describe()})"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def block(self) -> bytes | None:
        """What lies beside the basis (the layer's own weights); None if nothing does. CacheError if it is damaged."""
        return read_block(self.store, self.spec)

    def read_codes(self, index: int, into: Workspace | None = None) -> Arrays:
        """The coded vectors of a shard, m of them.

        codes int16 `[m, W]`, scale float32 `[m]`, exact_rows int64 `[e]` and exact float32 `[e, W]` as of
        `encode_hidden`; rows int64 `[m]`, ascending: position · P + vector, of the shard.

        into: memory for the codes, which the next shard read into it overwrites.
        Raises CorruptShard, naming shard and array, if its bytes are not those that were committed, or if they belong
        to another shard of the cache than the one that is there.
        """
        return self._read(index, into)[0]

    def read_shard(self, index: int) -> NDArray[np.float32]:
        """The values of a shard's n positions, float32 `[n, *shape]`; NaN in those that are not stored.

        Raises CorruptShard as `read_codes`.
        """
        arrays, n = self._read(index, None)
        spec = self.spec
        values = np.full((n * spec.vectors, spec.width), np.nan, np.float32)
        values[arrays["rows"]] = decode_states(arrays, self.basis, spec.step)
        if spec.kind == "map":
            channels, height, width = spec.shape
            return np.ascontiguousarray(np.moveaxis(values.reshape(n, height, width, channels), 3, 1))
        return values.reshape(n, *spec.shape)

    def verify(self, deep: bool = True, progress: Shown = False) -> list[Problem]:
        """The problems of this feature alone; none if it is whole. See `verify.verify`."""
        base = CheckedShards(rows=self._cache.manifest.to_pylist(), indices=self._cache.shards)
        report = FeatureReport()
        return check_feature(self.store, self._cache.spec, base, self.name, report, deep=deep, progress=progress)

    def _read(self, index: int, into: Workspace | None) -> tuple[Arrays, int]:
        """The arrays of `read_codes`, and the positions of the shard."""
        data, attributes = self._object(index)
        content, positions = self._cache.content(index)
        with self._errors(index):
            check_base(attributes["base"], attributes["positions"], content, positions)
            arrays = unpack(data, self._kind.expected(attributes), self._cache.streams())
            del data  # its memory is needed for the decoded arrays
            return decode_shard(self.spec, attributes, arrays, into), positions
