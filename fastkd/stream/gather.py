"""From shards to micro-batches: a rank's sequences of a step, divided, and their rows copied together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.reader import Cache
from ..cache.spec import CacheSpec
from ..cache.workspace import Workspace
from ..data.examples import EXAMPLE_COLUMNS, Examples
from ..kernels import SparseTargets
from ..kernels.targets import FIELDS
from .batch import AnyBatch, ExampleBatch, MicroBatch
from .buckets import bucket_of
from .division import at_most, packed_micro_batches, padded_micro_batches
from .signals import Signal

Array = NDArray[Any]
Ints = NDArray[np.int64]
IGNORED = -100


@dataclass(frozen=True, eq=False)
class TextInputs:
    """The inputs of the n rows of a shard of text.

    A segment is the part of a document that lies in one sequence (window); without documents, a whole sequence.

    tokens, labels `[n]`: the input, and the next token of its segment (IGNORED: none, or the row does not count).
    segments `[segments + 1]`: the first row of each. first_segment `[sequences + 1]`: the first segment of each
        sequence.
    numbers `[n]` int64: of the rows, in their dataset; None if the source does not know them, as a cache.
    """

    tokens: Array
    labels: Array
    segments: Ints
    first_segment: Ints
    numbers: Ints | None = None

    @property
    def counted(self) -> NDArray[np.bool_]:
        """The rows that count, `[n]`: those with a label."""
        counted: NDArray[np.bool_] = self.labels != IGNORED
        return counted


@dataclass(frozen=True, eq=False)
class ExampleInputs:
    """The inputs of the n rows of a shard of examples.

    example, seed `[n]` int64: the example's number in its data set, and its augmentation seed.
    counts `[n]`: whether the row has a target. first_row `[sequences + 1]`: the first row of each sequence.
    numbers `[n]` int64: as of `TextInputs`.
    """

    example: Ints
    seed: Ints
    counts: NDArray[np.bool_]
    first_row: Ints
    numbers: Ints | None = None

    @property
    def counted(self) -> NDArray[np.bool_]:
        """The rows that count, `[n]`: those with a target."""
        return self.counts


@dataclass(frozen=True, eq=False)
class OpenShard:
    """A decoded shard.

    inputs: `TextInputs` or `ExampleInputs`. targets: the arrays of its n rows, by the names of `SparseTargets`.
    signals: what `Signal.open` returned, for each signal of the loader. workspaces: the memory that all this lies in,
    to be used again: of the targets, and of each signal.
    """

    inputs: Any
    targets: dict[str, Array]
    signals: tuple[Any, ...]
    workspaces: list[Workspace]


def ranges(begins: Ints, lengths: Ints) -> Ints:
    """The numbers from begins[i] to below begins[i] + lengths[i], for each i in turn."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def open_shard(
    cache: Cache, index: int, workspaces: list[Workspace], signals: Sequence[Signal] = (), source: int = 0
) -> OpenShard:
    """A shard of a cache, decoded, with its signals. workspaces: one for the targets, and one for each signal. source:
    the number of the cache in a mixture."""
    arrays = cache.read_shard(index, into=workspaces[0])
    # a row that does not count has no entries, not even a first one
    counts = arrays["logprobs"][:, 0] > -np.inf
    return shard_of(arrays, counts, index, workspaces, signals, source)


def shard_of(
    arrays: dict[str, Array],
    counts: NDArray[np.bool_],
    index: int,
    workspaces: list[Workspace],
    signals: Sequence[Signal] = (),
    source: int = 0,
) -> OpenShard:
    """A shard from its arrays, under the names of `Cache.read_shard` (with `row_numbers` if they are known; without
    targets if there are none yet), with its signals. counts `[n]`: whether each row has a target."""
    inputs = _text_inputs(arrays, counts) if "tokens" in arrays else _example_inputs(arrays, counts)
    opened = [signal.open(source, index, own, inputs) for signal, own in zip(signals, workspaces[1:], strict=True)]
    targets = {f.name: arrays[f.name] for f in FIELDS if f.name in arrays}
    return OpenShard(inputs, targets, tuple(opened), workspaces)


def _example_inputs(arrays: dict[str, Array], counts: NDArray[np.bool_]) -> ExampleInputs:
    # copies: the columns lie in the workspace
    example, seed = (arrays[name].astype(np.int64) for name in EXAMPLE_COLUMNS)
    return ExampleInputs(example, seed, counts, _bounds(arrays["sequence_lengths"]), arrays.get("row_numbers"))


def _text_inputs(arrays: dict[str, Array], counts: NDArray[np.bool_]) -> TextInputs:
    tokens = arrays["tokens"]
    if "loss_mask" in arrays:
        counts = counts & arrays["loss_mask"].astype(bool, copy=False)
    begins = np.zeros(len(tokens) + 1, bool)
    sequences = _bounds(arrays["sequence_lengths"])
    begins[sequences] = True
    if "document_lengths" in arrays:
        # a document may continue in the next sequence, as another segment
        begins[_bounds(arrays["document_lengths"])] = True
    segments = np.flatnonzero(begins)
    labels = np.empty(len(tokens), np.int32)
    labels[:-1] = tokens[1:]
    labels[segments[1:] - 1] = IGNORED
    labels[~counts] = IGNORED
    return TextInputs(tokens, labels, segments, np.searchsorted(segments, sequences), arrays.get("row_numbers"))


def _bounds(lengths: Array) -> Ints:
    """The first row of each of these lengths, and the end of the last: `[m + 1]`."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


ShardRows = Sequence[tuple[OpenShard, Ints]]
"""Shards, and the numbers of rows (or of sequences) of each."""


@dataclass(frozen=True, eq=False)
class BatchFormat:
    """How micro-batches are made.

    layout: see `MicroBatch`. tokens: maximum positions, pads included (a longer row is alone). rows: maximum rows, or
    windows of "packed". None: no limit. micro_batches: their number in a step, instead of the limits; None: what these
    make.
    spec: of any of the caches. width: entries per row of the targets, and draws: whether there are any, of all caches.
    device: of the student; host memory is page-locked if it is a GPU. data: of a cache of examples. signals: of the
    loader. buckets: lengths that micro-batches of text are padded to; see `buckets.py`.
    """

    layout: str
    tokens: int | None
    rows: int | None
    spec: CacheSpec
    width: int
    draws: bool
    device: torch.device
    data: Examples | None
    signals: tuple[Signal, ...] = ()
    micro_batches: int | None = None
    buckets: tuple[int, ...] | None = None

    @property
    def _most(self) -> int | None:
        """Positions of a micro-batch, at most."""
        return self.tokens if self.micro_batches is None else None

    def divide(self, lengths: Ints) -> list[Ints]:
        """The indices of the rows of these lengths (of sequences, for packed windows and examples) in each
        micro-batch."""
        cut = packed_micro_batches
        if self.layout == "padded" and self.data is None:
            cut, lengths = padded_micro_batches, bucket_of(lengths, self.buckets, self._most)
        if self.micro_batches is not None:
            return at_most(self.micro_batches, cut, lengths)
        return cut(lengths, self.tokens, self.rows)

    def places(self, segments: Ints, sequence: Ints) -> "Places":
        """Where the rows of segments of these lengths, `[s]`, are in a micro-batch of their own, with its pads."""
        count, n, longest = len(segments), int(segments.sum()), int(segments.max())
        padded = self.layout == "padded"
        length = int(bucket_of(np.array([longest if padded else n]), self.buckets, self._most)[0])
        if padded:
            position_ids = np.broadcast_to(np.arange(length), (count, length)).copy()
            return Places(ranges(np.arange(count) * length, segments), position_ids, segments, sequence)
        # segments of pads that are no longer than the others
        pads = np.diff(np.append(np.arange(n, length, longest), length)) if length > n else np.zeros(0, np.int64)
        lengths, sequence = np.append(segments, pads), np.append(sequence, np.full(len(pads), -1))
        return Places(np.arange(n), ranges(np.zeros(len(lengths), np.int64), lengths)[None], lengths, sequence)

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """An array as a tensor on the host; unless page-locked, it shares the memory."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def targets(self, rows: ShardRows, index: Ints) -> SparseTargets:
        """The targets of these rows, on the host. index `[m]`: the position of each row in its micro-batch."""
        found = SparseTargets.empty(
            len(index),
            self.width,
            vocab_size=self.spec.vocab_size,
            temperatures=self.spec.temperatures,
            draws=self.draws,
            draw_temperature=self.spec.draw_temperature,
            device="cpu",
            pin_memory=self.device.type == "cuda",
            fill=False,
        )
        done = 0
        for shard, numbers in rows:
            for field in FIELDS:
                if (tensor := getattr(found, field.name)) is None:
                    continue
                target, source = tensor.numpy()[done : done + len(numbers)], shard.targets.get(field.name)
                if source is not None and source.shape[1:] == target.shape[1:]:
                    # mode: "raise" would need a copy
                    np.take(source, numbers, axis=0, out=target, mode="clip")
                    continue
                # from a cache with fewer entries per row, or without draws
                target.fill(field.fill)
                if source is not None:
                    target[:, : source.shape[1]] = source[numbers]
            done += len(numbers)
        return replace(found, index=self.tensor(index))

    def gather_signals(self, parts: Sequence[tuple[OpenShard, Ints, Ints]]) -> dict[str, Any]:
        """The signals of a micro-batch, on the host. parts: shards, rows of each, and their flattened positions."""
        return {
            signal.name: signal.gather([(shard.signals[i], here, there) for shard, here, there in parts])
            for i, signal in enumerate(self.signals)
        }

    def with_inputs(self, batch: AnyBatch) -> AnyBatch:
        """A micro-batch whose inputs are read; see `ExampleBatch.unread`."""
        if not isinstance(batch, ExampleBatch) or batch.unread is None:
            return batch
        assert self.data is not None
        return replace(batch, inputs=self.data.read(*batch.unread).to(self.device), unread=None)

    def empty(self) -> AnyBatch:
        """A micro-batch of one position that does not count, on the device."""
        targets = self.targets([], np.zeros(0, np.int64))
        common: dict[str, Any] = {"targets": targets, "positions": 0, "signals": self.gather_signals([])}
        if self.data is not None:
            inputs, label = torch.zeros_like(self.data.first()), torch.tensor([IGNORED])
            sequences = torch.zeros(1, dtype=torch.int32)
            return ExampleBatch(inputs=inputs, labels=label, sequences=sequences, **common).to(self.device)
        places = self.places(np.ones(1, np.int64), np.zeros(1, np.int64))
        return MicroBatch(
            input_ids=torch.from_numpy(np.zeros_like(places.position_ids)),
            labels=torch.from_numpy(np.full_like(places.position_ids, IGNORED)),
            position_ids=torch.from_numpy(places.position_ids),
            cu_seqlens=torch.from_numpy(places.bounds),
            sequences=torch.from_numpy(places.sequence.astype(np.int32)),
            max_seqlen=1,
            layout=self.layout,
            **common,
        ).to(self.device)


class Places(NamedTuple):
    """Where rows are in a micro-batch. at `[n]`: their flattened positions. position_ids `[B, L]`. lengths, sequence
    `[S]`: of the segments; if packed, with those of pads, which are of the sequence −1."""

    at: Ints
    position_ids: Ints
    lengths: Ints
    sequence: Ints

    @property
    def bounds(self) -> NDArray[np.int32]:
        """`[S + 1]`, see `MicroBatch.cu_seqlens`."""
        return np.append(0, np.cumsum(self.lengths)).astype(np.int32)


class Segments(NamedTuple):
    """Segments of text, `[s]` each, those of one shard together: the numbers of their shard and sequence, their first
    row in the shard, and their length."""

    shard: Ints
    sequence: Ints
    begin: Ints
    length: Ints


def gather(sequences: ShardRows, form: BatchFormat) -> list[MicroBatch]:
    """The micro-batches of sequences of text, on the host."""
    parts, segments_of_sequence, done = [], [], 0
    for number, (shard, some) in enumerate(sequences):
        inputs = shard.inputs
        first = inputs.first_segment[some]
        counts = inputs.first_segment[some + 1] - first
        which = ranges(first, counts)
        begin = inputs.segments[which]
        sequence = done + np.repeat(np.arange(len(some)), counts)
        parts.append(Segments(np.full(len(which), number), sequence, begin, inputs.segments[which + 1] - begin))
        segments_of_sequence.append(counts)
        done += len(some)
    segments = Segments(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    if form.layout == "padded":
        micro_batches = form.divide(segments.length)
    else:  # windows stay whole
        counts = np.concatenate(segments_of_sequence)
        begins = np.cumsum(counts) - counts
        lengths = np.add.reduceat(segments.length, begins)
        micro_batches = [ranges(begins[some], counts[some]) for some in form.divide(lengths)]
    shards = [shard for shard, _ in sequences]
    return [_micro_batch(shards, Segments(*(column[some] for column in segments)), form) for some in micro_batches]


def _micro_batch(shards: list[OpenShard], segments: Segments, form: BatchFormat) -> MicroBatch:
    ends = np.cumsum(segments.length)
    rows, places = ranges(segments.begin, segments.length), form.places(segments.length, segments.sequence)
    shape, at = places.position_ids.shape, places.at
    tokens, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED)
    index, kept, parts = [], [], []
    # stretches of rows of one shard
    stops = [*(np.flatnonzero(np.diff(segments.shard)) + 1).tolist(), len(ends)]
    bounds = [0, *ends[np.array(stops) - 1].tolist()]
    for stop, (a, b) in zip(stops, pairwise(bounds), strict=True):
        shard, here, there = shards[segments.shard[stop - 1]], rows[a:b], at[a:b]
        label = shard.inputs.labels[here]
        tokens.reshape(-1)[there] = shard.inputs.tokens[here]
        labels.reshape(-1)[there] = label
        counted = label != IGNORED
        index.append(there[counted])
        kept.append((shard, here[counted]))
        parts.append((shard, here, there))
    return MicroBatch(
        input_ids=form.tensor(tokens),
        labels=form.tensor(labels),
        position_ids=form.tensor(places.position_ids),
        cu_seqlens=form.tensor(places.bounds),
        sequences=form.tensor(places.sequence.astype(np.int32)),
        targets=form.targets(kept, np.concatenate(index)),
        signals=form.gather_signals(parts),
        max_seqlen=int(segments.length.max()),
        positions=int(ends[-1]),
        layout=form.layout,
    )


def gather_examples(sequences: ShardRows, form: BatchFormat) -> list[ExampleBatch]:
    """The micro-batches of examples, on the host. A sequence, the copies of an example, is never divided."""
    data = form.data
    assert data is not None
    first = np.concatenate([shard.inputs.first_row[some] for shard, some in sequences])
    lengths = np.concatenate([shard.inputs.first_row[some + 1] for shard, some in sequences]) - first
    shard_of = np.repeat(np.arange(len(sequences)), [len(some) for _, some in sequences])
    found = []
    for some in form.divide(lengths):
        bounds = np.searchsorted(shard_of[some], np.arange(len(sequences) + 1))
        rows = [
            (shard, ranges(first[some[a:b]], lengths[some[a:b]]))
            for (shard, _), (a, b) in zip(sequences, pairwise(bounds.tolist()), strict=True)
            if b > a
        ]
        columns = [(s.inputs.example[here], s.inputs.seed[here], s.inputs.counts[here]) for s, here in rows]
        example, seed, counts = (np.concatenate(column) for column in zip(*columns, strict=True))
        inputs = torch.empty(0) if data.draws else data.read(example, seed)
        ends = np.cumsum([len(here) for _, here in rows])
        there = np.split(np.arange(len(example)), ends[:-1])
        found.append(
            ExampleBatch(
                inputs=inputs.pin_memory() if form.device.type == "cuda" else inputs,
                unread=(example, seed) if data.draws else None,
                labels=form.tensor(np.where(counts, data.labels(example), IGNORED)),
                sequences=form.tensor(np.repeat(some, lengths[some]).astype(np.int32)),
                targets=form.targets([(s, here[s.inputs.counts[here]]) for s, here in rows], np.flatnonzero(counts)),
                signals=form.gather_signals([(s, here, at) for (s, here), at in zip(rows, there, strict=True)]),
                positions=len(example),
            )
        )
    return found
