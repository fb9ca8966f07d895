"""Reading a cache: whole shards, decoded, and sequences by their numbers."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import CacheError, NotFound
from .manifest import (
    corrupt,
    listed,
    read_manifest,
    read_object,
    read_spec,
    read_twice,
    refuse_overlaps,
    scan,
    shard_key,
)
from .shard.container import TAIL_LENGTH, Damage, length_of_end, members, stored_digest, unpack
from .shard.layout import COUNTS, check_lengths, decode_shard, expected_arrays, shard_attributes
from .spec import CacheSpec
from .stores import Store, open_store
from .workspace import Workspace

if TYPE_CHECKING:
    import zarr

    from .verify import Report

Array = NDArray[Any]
Arrays = dict[str, Array]
Ints = NDArray[np.int64]
_LENGTHS = ("sequence_lengths", "document_lengths")
_KEPT = 2  # decoded shards a thread keeps for `sequences`


def open_cache(path_or_store: Any) -> "Cache":
    """A cache to read from: a folder, a zip of one, a URL, an obstore store, or a `Store`.

    A sealed cache takes two requests; the shards of any other are listed when they are first needed.
    CacheError if there is no cache, or none that this version can read.
    """
    store = open_store(path_or_store)
    spec = read_spec(store)
    return Cache(store, spec, read_manifest(store, spec))


class Cache:
    """A cache, open for reading. Safe to use from several threads and processes (forked or spawned).

    store, spec: its store and its settings. sealed: whether it has a manifest, and takes no more shards.
    """

    def __init__(self, store: Store, spec: CacheSpec, manifest: pa.Table | None) -> None:
        self.store = store
        self.spec = spec
        self.sealed = manifest is not None
        self._manifest = manifest
        self._order: tuple[Ints, Ints, Ints] | None = None
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "spec": self.spec, "sealed": self.sealed, "_manifest": self._manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _order=None)
        self._local = threading.local()

    def __repr__(self) -> str:
        return f"Cache({self.store.describe()})"

    @property
    def manifest(self) -> pa.Table:
        """One row per shard: its sequences, counts, statistics and hashes. Unsealed: as of the first access."""
        if self._manifest is None:
            self._manifest = scan(self.store, self.spec, listed(self.store))
        return self._manifest

    @property
    def shards(self) -> list[int]:
        """The numbers of the shards, ascending."""
        if self._manifest is None:
            return list(listed(self.store))
        numbers: list[int] = self._manifest.column("shard").to_pylist()
        return numbers

    def read_shard(self, index: int, *, into: Workspace | None = None) -> Arrays:
        """All of a shard of n positions, decoded.

        ids int32 and logprobs float32 `[n, K]` (unused entries: 0 and −inf), tail float32 `[n, M]`, outcomes int32
        `[n]`, draws int32 `[n, K]` where the cache has draws, the input columns by their names `[n]`, sequence_lengths
        and (where given) document_lengths uint32 `[s]`, first_sequence int64 `[]`. K is the spec's width.

        into: memory for the `[n, K]` arrays, which the next shard read into it overwrites: much faster than new memory,
        for many shards. Each thread that reads keeps memory for the streams of one shard.

        Raises CorruptShard, naming shard and array, if its bytes are not those that were committed.
        """
        data, attributes = self._object(index)
        streams: Workspace = self._local.__dict__.setdefault("streams", Workspace())
        with self._errors(index):
            arrays = unpack(data, expected_arrays(self.spec, attributes), streams)
            del data  # its memory is needed for the decoded arrays
            return decode_shard(self.spec, attributes, arrays, into)

    def attributes(self, index: int) -> dict[str, Any]:
        """The attributes of a shard (FORMAT.md, "Attributes"), from its last bytes."""
        with self._errors(index):
            return read_twice(self.store, lambda: self._end(index)[0])

    def sequence_lengths(self, index: int) -> NDArray[np.int64]:
        """Rows of each sequence of a shard, `[s]`, from the end of its object: some 3% of it, and no decoding.

        Raises CorruptShard as `read_shard`, but only for the bytes that it reads.
        """

        def read() -> Arrays:
            attributes, end = self._end(index)
            if (length := length_of_end(attributes, "sequence_lengths")) > len(end) >= TAIL_LENGTH:
                end = self.store.get_tail(shard_key(index), length)
            known = {"sequence_lengths": expected_arrays(self.spec, attributes)["sequence_lengths"]}
            if not (arrays := unpack(end, known, check=True)):
                raise Damage("it is missing", "sequence_lengths")
            check_lengths(attributes, arrays)
            return arrays

        with self._errors(index):
            return read_twice(self.store, read)["sequence_lengths"].astype(np.int64)

    def sequences(self, numbers: Iterable[int]) -> Arrays:
        """The arrays of `read_shard` for these sequences (by their numbers in the whole cache), one after another.

        sequence_lengths are those of these sequences. Whole shards are read; each thread keeps the last two.
        """
        wanted = _numbers(numbers)
        shard, first, stop = self._by_sequence()
        place = np.searchsorted(first, wanted, side="right") - 1
        missing = (place < 0) | (wanted >= stop[place]) if len(stop) else np.ones(len(wanted), bool)
        if missing.any():
            raise CacheError(f"numbers: got sequence {wanted[missing.argmax()]}, which no shard of {self!r} holds.")
        pieces: list[Arrays] = [{} for _ in wanted]
        for index in dict.fromkeys(shard[place].tolist()):  # in the order of the numbers
            arrays = self._kept(index)
            lengths = arrays["sequence_lengths"].astype(np.int64)
            ends = lengths.cumsum()
            rows = {n: a for n, a in arrays.items() if a.ndim and n not in _LENGTHS}
            for i in np.flatnonzero(shard[place] == index).tolist():
                number = int(wanted[i] - arrays["first_sequence"])
                some = slice(int(ends[number] - lengths[number]), int(ends[number]))
                # copies: the next shard may be read into this one's memory
                pieces[i] = {name: array[some].copy() for name, array in rows.items()}
                pieces[i]["sequence_lengths"] = arrays["sequence_lengths"][number : number + 1]
        for name in pieces[0]:
            if len(types := {piece[name].dtype for piece in pieces}) > 1:
                raise CacheError(
                    f"numbers: got {name} of types {' and '.join(sorted(map(str, types)))} in these shards. Read "
                    "them one by one, with read_shard."
                )
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def verify(self, deep: bool = True, progress: bool = False) -> "Report":
        """Check every shard against its hash and the manifest; deep: its decoded arrays, too. See `verify.verify`."""
        from .verify import verify

        return verify(self.store, self.spec, self._manifest if self.sealed else None, deep=deep, progress=progress)

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
        """A shard's object and its attributes: the bytes that were committed, of this shard of this cache."""

        with self._errors(index):
            data = read_object(self.store, index)
            return data, self._attributes(data, index)

    def _end(self, index: int) -> tuple[dict[str, Any], bytes]:
        """The attributes of a shard, and the end of its object."""
        end = self.store.get_tail(shard_key(index), TAIL_LENGTH)
        return self._attributes(end, index), end

    @contextmanager
    def _errors(self, index: int) -> Iterator[None]:
        """Errors with a shard, as CacheError and CorruptShard that name it."""
        try:
            yield
        except NotFound as error:
            raise CacheError(f"shard {index}: {self.store.describe()} has none of this number.") from error
        except Damage as damage:
            raise corrupt(self.store, index, damage) from damage
        except MemoryError as error:
            raise CacheError(f"shard {index} of {self.store.describe()}: there is not enough memory for it.") from error

    def _attributes(self, end: bytes, index: int) -> dict[str, Any]:
        """The attributes of an object, or of its end. Damage if it is not this shard of this cache."""
        if self.sealed:
            numbers = self.manifest.column("shard").to_numpy()
            row = int(np.searchsorted(numbers, index))
            if row == len(numbers) or numbers[row] != index:
                raise CacheError(f"shard {index}: the cache was sealed without it.")
            if self.manifest.column("object_sha256")[row].as_py().hex() != stored_digest(end):
                raise Damage("it is another object than the one that was sealed")
        attributes = shard_attributes(end, self.spec, index)
        if self.sealed and any(self.manifest.column(n)[row].as_py() != attributes[n] for n in COUNTS):
            raise Damage("its attributes differ from the manifest")
        return attributes

    def _by_sequence(self) -> tuple[Ints, Ints, Ints]:
        """Numbers of the shards by their first sequences, and where each begins and ends."""
        if self._order is None:
            shard, first, count = (self.manifest.column(n).to_numpy() for n in ("shard", "first_sequence", "sequences"))
            refuse_overlaps(self.store, self.manifest)
            by = np.argsort(first, kind="stable")
            self._order = shard[by], first[by], (first + count)[by]
        return self._order

    def _kept(self, index: int) -> Arrays:
        """A shard's arrays; each thread keeps those of the last two."""
        kept: OrderedDict[int, tuple[Arrays, Workspace]] = self._local.__dict__.setdefault("shards", OrderedDict())
        if index not in kept:
            into = Workspace()
            while len(kept) >= _KEPT:
                _, (_, into) = kept.popitem(last=False)
            kept[index] = self.read_shard(index, into=into), into
        kept.move_to_end(index)
        return kept[index][0]


def _numbers(numbers: Iterable[int]) -> NDArray[np.int64]:
    """Numbers of sequences, `[s]`, at least one."""
    try:
        array = np.asarray(numbers if isinstance(numbers, np.ndarray) else list(numbers))
    except (TypeError, ValueError) as error:
        raise CacheError(f"numbers: got {numbers!r}; expected numbers of sequences.") from error
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu" or int(array.max()) >= 2**62:
        raise CacheError(f"numbers: got {array.dtype} of shape {array.shape}; expected numbers of sequences.")
    return array.astype(np.int64)
