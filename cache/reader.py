"""Reading a cache: whole shards, decoded, and sequences by their numbers."""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import CacheError
from .manifest import read_manifest, read_spec, read_twice, refuse_overlaps, shard_key
from .progress import Shown
from .shard.container import TAIL_LENGTH, Damage, length_of_end, unpack
from .shard.layout import check_lengths, decode_shard, expected_arrays
from .shard_reader import ShardReader
from .spec import CacheSpec
from .stores import Store, open_store
from .target_shards import TargetShards
from .workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

    from .features.reader import Features
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
    return Cache(store, spec, read_manifest(store, TargetShards(spec)))


class Cache(ShardReader):
    """A cache, open for reading. Safe to use from several threads and processes (forked or spawned).

    store, spec: its store and its settings. sealed: whether it has a manifest, and takes no more shards.
    """

    def __init__(self, store: Store, spec: CacheSpec, manifest: pa.Table | None) -> None:
        super().__init__(store, TargetShards(spec), manifest)
        self.spec = spec
        self._order: tuple[Ints, Ints, Ints] | None = None
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_order", "_local")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _order=None)
        self._local = threading.local()

    def __repr__(self) -> str:
        return f"Cache({self.store.describe()})"

    @property
    def features(self) -> "Features":
        """The hidden states and feature maps of the teacher, by name: `cache.features["20"].read_shard(0)`."""
        from .features.reader import Features

        return Features(self)

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
        with self._errors(index):
            arrays = unpack(data, expected_arrays(self.spec, attributes), self.streams())
            del data  # its memory is needed for the decoded arrays
            return decode_shard(self.spec, attributes, arrays, into)

    def content(self, index: int) -> tuple[str, int]:
        """The hash of a shard's contents, and its positions; from the manifest of a sealed cache."""
        if self.sealed:
            row = self._row(index)
            digits: str = self.manifest.column("content_sha256")[row].as_py().hex()
            return digits, self.manifest.column("positions")[row].as_py()
        attributes = self.attributes(index)
        return attributes["content"], attributes["positions"]

    def streams(self) -> Workspace:
        """Memory of this thread for the streams of one shard at a time."""
        workspace: Workspace = self._local.__dict__.setdefault("streams", Workspace())
        return workspace

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

    def last_rows(self, number: int) -> Ints:
        """The last row of each document within a sequence, or of the part of it that is there; from the sequence's
        first row. A document is the whole sequence if documents are not known."""
        (number,) = _numbers([number])
        shard, first, _ = self._by_sequence()
        place = int(np.searchsorted(first, number, side="right")) - 1
        arrays = self._kept(int(shard[place]))
        ends = [arrays[name].cumsum(dtype=np.int64) for name in _LENGTHS if name in arrays]
        stop = int(ends[0][number - first[place]])
        begin = stop - int(arrays["sequence_lengths"][number - first[place]])
        inside = np.unique(np.concatenate(ends))
        last: Ints = inside[(inside > begin) & (inside <= stop)] - begin - 1
        return last

    def to_pandas(self, sequence: int, tokenizer: Any = None) -> "pd.DataFrame":
        """A look at one sequence: a row a position, with its token, label, the teacher's top tokens with their
        probabilities, the mass of all others, and draws. tokenizer: decodes tokens. See `table.sequence_columns`."""
        from .table import sequence_table

        return sequence_table(self, sequence, tokenizer)

    def verify(self, deep: bool = True, progress: Shown = False) -> "Report":
        """Check every shard against its hash and the manifest; deep: its decoded arrays, too. See `verify.verify`."""
        from .verify import verify

        return verify(self.store, self.spec, self._manifest if self.sealed else None, deep=deep, progress=progress)

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
