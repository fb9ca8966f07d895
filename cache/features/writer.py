"""Writing a feature: its basis, its spec, and its shards, each bound to a shard of the cache."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from numpy.typing import NDArray

from ..checks import check_record
from ..errors import CacheError, NotFound, type_name
from ..manifest import read_spec
from ..shard_reader import ShardReader
from ..shard_writer import Commit, ShardWriter
from ..spec import differences, integer
from ..stores import Store, open_store
from ..target_shards import TargetShards
from .basis import Basis
from .layout import FeatureShards, encode_shard, page_of
from .objects import BASIS, BLOCK, SPEC, read_basis, read_feature_spec
from .spec import FeatureSpec, folder_of

Array = NDArray[Any]
MOST_BLOCK = 2**32  # bytes


def share_basis(path_or_store: Any, name: str, basis: Basis) -> Basis:
    """The basis of a feature: this one if there is none yet, else the one that is there.

    So all workers that capture one feature use the basis of the first. Raises CacheError if the one there is damaged.
    """
    store = open_store(path_or_store)
    if store.create(f"{folder_of(name)}{BASIS}", basis.to_bytes()):
        return basis
    found = read_basis(store, name)
    if found is None:
        raise CacheError(f"{store.describe()}: {folder_of(name)}{BASIS} was there and is gone. Run again.")
    return found


def create_feature(
    path_or_store: Any,
    spec: FeatureSpec,
    basis: Basis,
    block: bytes | None = None,
    *,
    threads: int = 1,
    queue: int = 2,
) -> "FeatureWriter":
    """A writer for a feature of an existing cache: a new feature, or an existing one of the same settings.

    basis: the one that the spec names (see `share_basis`). block: likewise, bytes that are kept beside it.
    threads, queue: as in `create_cache`.

    Raises CacheError for a cache of other settings than `spec.base`, and for an existing feature of other settings,
    naming what differs; before anything is written.
    """
    if not isinstance(spec, FeatureSpec) or not isinstance(basis, Basis):
        raise CacheError(f"spec: got {type_name(spec)} and {type_name(basis)}; expected a FeatureSpec and a Basis.")
    threads, queue = integer("threads", threads, 1), integer("queue", queue, 0)
    store = open_store(path_or_store)
    name = f"feature {spec.name} of {store.describe()}"
    base = read_spec(store)
    if base.hash != spec.base:
        raise CacheError(f"{name}: base: got {spec.base}; expected {base.hash}, the hash of the cache's settings.")
    if basis.sha256 != spec.basis or basis.width != spec.width:
        raise CacheError(
            f"{name}: basis: got one of width {basis.width} and hash {basis.sha256}; expected width {spec.width} and "
            f"hash {spec.basis}, by the spec."
        )
    digest = None if block is None else hashlib.sha256(block).hexdigest()
    if digest != spec.block or (block is not None and len(block) > MOST_BLOCK):
        raise CacheError(f"{name}: block: got one of hash {digest}; expected {spec.block}, by the spec.")
    existing = read_feature_spec(store, spec.name)
    if existing is None:
        _create(store, spec, basis, block)
        existing = read_feature_spec(store, spec.name)
    if existing is None or existing.hash != spec.hash:
        differ = "; ".join(differences(existing, spec)) if existing else "it is gone"
        raise CacheError(
            f"{name}: one of other settings exists ({differ}). Use its settings, or drop it first "
            "(`fastkd features CACHE --drop NAME`)."
        )
    store.sweep()
    return FeatureWriter(store, existing, basis, threads=threads, queue=queue)


def _create(store: Store, spec: FeatureSpec, basis: Basis, block: bytes | None) -> None:
    """Create the objects of a feature without shards, its spec last."""
    name, objects = f"feature {spec.name} of {store.describe()}", {BASIS: basis.to_bytes()}
    objects |= {} if block is None else {BLOCK: block}
    for key in (entry.key for entry in store.list(f"{spec.folder}shards/")):
        raise CacheError(
            f"{name}: there is {key} without a {SPEC}, the rest of a feature that was dropped. Drop it again "
            "(`fastkd features CACHE --drop NAME`) and then capture it."
        )
    for key, data in objects.items():
        if store.create(f"{spec.folder}{key}", data):
            continue
        found = read_basis(store, spec.name) if key == BASIS else None
        there = found.sha256 if found else hashlib.sha256(store.get(f"{spec.folder}{key}")).hexdigest()
        if there != (spec.basis if key == BASIS else spec.block):
            raise CacheError(
                f"{name}: another {key} exists. Use that one (`share_basis` returns the basis), or drop the feature "
                "first (`fastkd features CACHE --drop NAME`)."
            )
    store.create(f"{spec.folder}{SPEC}", spec.to_json())


class FeatureWriter(ShardWriter):
    """Writes the shards of a feature. Use as a context manager, or call `close`. Its methods may be called from several
    threads.

    A forked process must create another writer.

    sizes: bytes of each shard that this writer has committed, by its number.
    """

    def __init__(self, store: Store, spec: FeatureSpec, basis: Basis, *, threads: int, queue: int) -> None:
        super().__init__(store, FeatureShards(spec, basis.scale), threads=threads, queue=queue)
        self.spec = spec
        self.basis = basis
        self._shards = ShardReader(store, TargetShards(read_spec(store)), None)

    def write_shard(
        self,
        index: int,
        arrays: Mapping[str, Array],
        rows: Array | None = None,
        record: Mapping[str, Any] | None = None,
        after: "Future[Commit] | None" = None,
    ) -> Commit:
        """Check, encode and commit the vectors of a shard of the cache; returns when they are durable.

        index: the number of the cache's shard, which must exist. arrays: of m vectors, as of `encode_hidden`.
        rows: which of the shard's n·P vectors they are, int `[m]`, ascending; None: all.
        record: how the shard was made, for people and tools: JSON of up to 16 KiB. Its member `kl`, if there is one, is
        the divergence of the rest of the teacher, run from the coded states (nats a position).
        after: a future to wait for, of the cache's shard.

        Returns COMMITTED, or ALREADY_THERE for a shard that was committed before and stays as it is. Raises CacheError
        if there is no shard of the cache of this number, or for arrays that are not as expected.
        """
        self._check_open()
        index = integer("index", index, 0, 10**18 - 1)
        recorded = None if record is None else check_record(record)
        if after is not None:
            after.result()
        base = self._base(index)
        mine: dict[str, Any] = {"base": base["content"], "positions": base["positions"]}
        commit = Commit.ALREADY_THERE
        if self._attempt_of(index, mine) is None:
            self._check_unsealed(index)
            if base["positions"] > self.spec.most_positions:
                raise CacheError(
                    f"shard {index} of {self.store.describe()}: got {base['positions']} positions; a shard of this "
                    f"feature has at most {self.spec.most_positions}. Capture a cache of smaller shards."
                )
            streams = encode_shard(self.spec, self.basis.scale, base["positions"], arrays, rows)
            counts = {"vectors": len(streams["scale"]), "exact": len(streams["exact"])}
            pages = {"codes": page_of(streams["codes"])}
            commit = self._commit(index, mine, counts, streams, self.spec, recorded, pages)
        self._failed.pop(index, None)
        return commit

    def _check_unsealed(self, index: int) -> None:
        super()._check_unsealed(index)
        try:
            self.store.get_tail(f"{self.spec.folder}{SPEC}", 8)
        except NotFound as error:
            raise CacheError(
                f"feature {self.spec.name} of {self.store.describe()}: it was dropped meanwhile. Nothing was written."
            ) from error

    def _base(self, index: int) -> dict[str, Any]:
        """The attributes of the cache's shard."""
        try:
            return self._shards.attributes(index)
        except CacheError as error:
            if not isinstance(error.__cause__, NotFound):
                raise
            raise CacheError(
                f"feature {self.spec.name} of {self.store.describe()}: the cache has no shard {index}; expected the "
                "shard before its features."
            ) from error
