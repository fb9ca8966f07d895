"""Writing a cache: several shards at a time, each committed whole or not at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .checks import check_inputs, check_lengths, check_record, check_sorted, check_targets
from .encoding.ragged import BLOCK
from .encoding.targets import Targets, encode_targets
from .errors import CacheError, ReadOnly, type_name
from .manifest import SPEC_KEY, read_spec, refuse_overlaps
from .shard_writer import Commit as Commit
from .shard_writer import ShardWriter
from .spec import CacheSpec, differences, integer
from .stores import Store, open_store
from .target_shards import TargetShards

Array = NDArray[Any]


@dataclass(frozen=True)
class ShardLayout:
    """The keyword arguments of `write_shard` beside inputs and targets.

    sequence_lengths: of consecutive sequences that make up the shard (default: one). document_lengths: of the documents
    in them, likewise. first_sequence: the number of the first sequence in the whole cache (default: 0).
    record: how the shard was made, for people and tools: JSON of up to 16 KiB, kept in its attributes, not covered by
    the hash of its contents.
    """

    sequence_lengths: Sequence[int] | Array | None = None
    document_lengths: Sequence[int] | Array | None = None
    first_sequence: int = 0
    record: Mapping[str, Any] | None = None


def create_cache(path_or_store: Any, spec: CacheSpec, *, threads: int = 1, queue: int = 2) -> "CacheWriter":
    """A writer for a cache of these settings: a new one, or an existing one of the same settings.

    path_or_store: a folder, a URL (s3://, gs://, az://, memory://), an obstore store, or a `Store`.
    threads: how many shards are encoded at a time. queue: how many more can be submitted before `submit_shard` waits.

    Raises CacheError for an existing cache of other settings (of another teacher, for example), naming what differs.
    """
    if not isinstance(spec, CacheSpec):
        raise CacheError(f"spec: got {type_name(spec)}; expected a CacheSpec.")
    threads, queue = integer("threads", threads, 1), integer("queue", queue, 0)
    store = open_store(path_or_store, create=True)
    if not store.create(SPEC_KEY, spec.to_json()):
        existing = read_spec(store)
        if existing.hash != spec.hash:
            raise CacheError(
                f"{store.describe()}: a cache of other settings exists ({'; '.join(differences(existing, spec))}). "
                "Write to another place, or with the settings it has."
            )
        spec = existing
    store.sweep()
    return CacheWriter(store, spec, threads=threads, queue=queue)


def open_writer(path_or_store: Any, *, threads: int = 1, queue: int = 2) -> "CacheWriter":
    """A writer for an existing cache, with its settings. Arguments as in `create_cache`.

    Raises CacheError if there is no cache, and ReadOnly if the store cannot be written.
    """
    store = open_store(path_or_store)
    spec = read_spec(store)
    if store.readonly:
        raise ReadOnly(f"{store.describe()}: this cache can only be read here. Write to it where it was created.")
    return create_cache(store, spec, threads=threads, queue=queue)


class CacheWriter(ShardWriter):
    """Writes the shards of a cache. Use as a context manager, or call `close`. Its methods may be called from several
    threads.

    A forked process must create another writer.

    sizes: bytes of each shard that this writer has committed, by its number.
    """

    def __init__(self, store: Store, spec: CacheSpec, *, threads: int, queue: int) -> None:
        super().__init__(store, TargetShards(spec), threads=threads, queue=queue)
        self.spec = spec

    def write_shard(
        self,
        index: int,
        inputs: Mapping[str, Array],
        ids: Array,
        logprobs: Array,
        tail: Array,
        draws: Array | None = None,
        outcomes: Array | int | None = None,
        **layout: Any,
    ) -> Commit:
        """Check, encode and commit a shard of n positions; returns when it is durable.

        index: the shard's number. inputs: the columns that the spec names, `[n]` each.
        ids, logprobs, tail, draws, outcomes: `[n, K]`, `[n, K]`, `[n, M]`, `[n, K]`, `[n]` or one for all, as in
            SparseTargets (NumPy arrays); a position that does not count has no entries (log-probability −inf and id 0
            throughout). outcomes defaults to all of the vocabulary outside the top-k entries.
        layout: sequence_lengths, document_lengths, first_sequence and record; see `ShardLayout`.

        Log-probabilities and tails are rounded to the steps of the spec's codec; entries that round to the same step
        may be reordered.

        Returns COMMITTED, or ALREADY_THERE for a shard that was committed before and stays as it is. Raises CacheError,
        before anything is written, for arrays that cannot be a teacher's.
        """
        self._check_open()
        index = integer("index", index, 0, 10**18 - 1)
        targets = check_targets(self.spec, ids, logprobs, tail, draws, outcomes)
        check_sorted(targets)
        n = len(targets.ids)
        given = ShardLayout(**layout)
        first = integer("first_sequence", given.first_sequence, 0, 10**18 - 1)
        columns = check_inputs(self.spec, inputs, n)
        sequences = [n] if given.sequence_lengths is None else given.sequence_lengths
        lengths = check_lengths("sequence_lengths", sequences, n)
        arrays: dict[str, Array] = {f"inputs/{name}": column for name, column in columns.items()}
        arrays["sequence_lengths"] = lengths
        if given.document_lengths is not None:
            arrays["document_lengths"] = check_lengths("document_lengths", given.document_lengths, n)
        mine: dict[str, Any] = {"first_sequence": first, "sequences": len(lengths), "positions": n}
        record = None if given.record is None else check_record(given.record)
        commit = Commit.ALREADY_THERE
        if self._attempt_of(index, mine) is None:
            self._check_unsealed(index)
            arrays |= encode_targets(self.spec, targets, arrays.get("inputs/tokens"))
            others = {
                "counted": int(((targets.head_counts + targets.draw_counts) > 0).sum()),
                "head_entries": int(targets.head_counts.sum()),
                "draw_entries": int(targets.draw_counts.sum()),
                "statistics": _statistics(targets, self.spec),
            }
            commit = self._commit(index, mine, others, arrays, self.spec.settings, record)
        self._failed.pop(index, None)
        return commit

    def _check_table(self, table: pa.Table) -> None:
        refuse_overlaps(self.store, table)


def _statistics(targets: Targets, spec: CacheSpec) -> dict[str, list[float | None]]:
    """Mean and quantiles over the counted positions: mass of the top-k entries, entropy (nats) with the tail as one."""
    head = np.arange(targets.ids.shape[1]) < targets.head_counts[:, None]
    mass, entropy = np.empty(len(head)), np.empty(len(head))
    tail = targets.tail[:, spec.temperatures.index(1.0)].astype(np.float64)
    for start in range(0, len(head), BLOCK):
        some = slice(start, start + BLOCK)
        x = np.where(head[some], targets.logprobs[some], -np.inf)
        p = np.exp(x)
        mass[some] = p.sum(1)
        entropy[some] = -np.einsum("nk,nk->n", p, np.where(head[some], x, 0))
    rest = np.exp(tail)
    entropy -= rest * np.where(rest > 0, tail, 0)
    counted = (targets.head_counts + targets.draw_counts) > 0
    if not counted.any():
        return {"mass": [None] * 4, "entropy": [None] * 4}
    found = {"mass": mass[counted], "entropy": entropy[counted]}
    return {name: [float(x.mean()), *np.quantile(x, (0.05, 0.5, 0.95)).tolist()] for name, x in found.items()}
