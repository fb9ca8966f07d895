"""Reading shards of any kind: which there are, and their objects, checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .errors import CacheError, NotFound
from .manifest import corrupt, listed, read_object, read_twice, scan
from .progress import Shown
from .shard.container import TAIL_LENGTH, Damage, members, stored_digest
from .shard.kind import ShardKind
from .stores import Store

if TYPE_CHECKING:
    import zarr


class ShardReader:
    """A set of shards, open for reading: those of a cache, or of one of its features.

    store: where they are. sealed: whether they have a manifest, and no more are added.
    """

    def __init__(self, store: Store, kind: ShardKind, manifest: pa.Table | None) -> None:
        self.store = store
        self.sealed = manifest is not None
        self._kind = kind
        self._manifest = manifest

    @property
    def manifest(self) -> pa.Table:
        """One row per shard: its counts, statistics and hashes. Unsealed: as of the first access."""
        if self._manifest is None:
            self._manifest = self.scan()
        return self._manifest

    @property
    def shards(self) -> list[int]:
        """The numbers of the shards, ascending."""
        if self._manifest is None:
            return list(listed(self.store, self._kind.folder))
        numbers: list[int] = self._manifest.column("shard").to_pylist()
        return numbers

    def scan(self, sizes: dict[int, int] | None = None, *, progress: Shown = False) -> pa.Table:
        """The manifest of the shards that exist now. sizes: bytes of each, by number; default: as they are listed."""
        if sizes is None:
            sizes = listed(self.store, self._kind.folder)
        return scan(self.store, self._kind, sizes, progress=progress)

    def attributes(self, index: int) -> dict[str, Any]:
        """The attributes of a shard (FORMAT.md, "Attributes"), from its last bytes."""
        with self._errors(index):
            return read_twice(self.store, lambda: self._end(index)[0])

    def zarr_group(self, index: int) -> "zarr.Group":
        """A shard as a Zarr group in memory: the streams as any Zarr reader sees them. Checked as by `read_shard`."""
        import zarr
        from zarr.core.buffer import default_buffer_prototype

        data, _ = self._object(index)
        make = default_buffer_prototype().buffer.from_bytes
        with self._errors(index):
            contents = {name: make(content) for name, content in members(data).items()}
        return zarr.open_group(zarr.storage.MemoryStore(contents, read_only=True), mode="r")

    def _object(self, index: int) -> tuple[bytes, dict[str, Any]]:
        """A shard's object and its attributes: the bytes that were committed, of this shard of this set."""

        with self._errors(index):
            data = read_object(self.store, self._kind, index)
            return data, self._attributes(data, index)

    def _end(self, index: int) -> tuple[dict[str, Any], bytes]:
        """The attributes of a shard, and the end of its object."""
        end = self.store.get_tail(self._kind.key(index), TAIL_LENGTH)
        return self._attributes(end, index), end

    @contextmanager
    def _errors(self, index: int) -> Iterator[None]:
        """Errors with a shard, as CacheError and CorruptShard that name it."""
        name = f"{self._kind.label}{self.store.describe()}"
        try:
            yield
        except NotFound as error:
            raise CacheError(f"shard {index}: {name} has none of this number.") from error
        except Damage as damage:
            raise corrupt(self.store, self._kind, index, damage) from damage
        except MemoryError as error:
            raise CacheError(f"shard {index} of {name}: there is not enough memory for it.") from error

    def _attributes(self, end: bytes, index: int) -> dict[str, Any]:
        """The attributes of an object, or of its end. Damage if it is not this shard of this set."""
        if self.sealed:
            row = self._row(index)
            if self.manifest.column("object_sha256")[row].as_py().hex() != stored_digest(end):
                raise Damage("it is another object than the one that was sealed")
        attributes = self._kind.attributes(end, index)
        if self.sealed and any(self.manifest.column(n)[row].as_py() != attributes[n] for n in self._kind.counts):
            raise Damage("its attributes differ from the manifest")
        return attributes

    def _row(self, index: int) -> int:
        """The row of a shard in the manifest of a sealed set."""
        numbers = self.manifest.column("shard").to_numpy()
        row = int(np.searchsorted(numbers, index))
        if row == len(numbers) or numbers[row] != index:
            raise CacheError(f"shard {index}: the {self._kind.whole} was sealed without it.")
        return row
