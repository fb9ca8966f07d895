"""A shard in memory, with what is needed to take some of its sequences into micro-batches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.reader import Cache
from ..cache.workspace import Workspace
from ..data.examples import EXAMPLE_COLUMNS
from ..kernels.targets import FIELDS

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
    """

    tokens: Array
    labels: Array
    segments: Ints
    first_segment: Ints


@dataclass(frozen=True, eq=False)
class ExampleInputs:
    """The inputs of the n rows of a shard of examples.

    example, seed `[n]` int64: the example's number in its data set, and its augmentation seed.
    counts `[n]`: whether the row has a target. first_row `[sequences + 1]`: the first row of each sequence.
    """

    example: Ints
    seed: Ints
    counts: NDArray[np.bool_]
    first_row: Ints


@dataclass(frozen=True, eq=False)
class OpenShard:
    """A decoded shard.

    inputs: `TextInputs` or `ExampleInputs`. targets: the arrays of its n rows, by the names of `SparseTargets`.
    workspace: the memory that they lie in, to be used again.
    """

    inputs: Any
    targets: dict[str, Array]
    workspace: Workspace


def ranges(begins: Ints, lengths: Ints) -> Ints:
    """The numbers from begins[i] to below begins[i] + lengths[i], for each i in turn."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def open_shard(cache: Cache, index: int, workspace: Workspace) -> OpenShard:
    """Read and decode a shard into the workspace."""
    arrays = cache.read_shard(index, into=workspace)
    # a row that does not count has no entries, not even a first one
    counts = arrays["logprobs"][:, 0] > -np.inf
    inputs = _text_inputs(arrays, counts) if "tokens" in cache.spec.inputs else _example_inputs(arrays, counts)
    return OpenShard(inputs, {f.name: arrays[f.name] for f in FIELDS if f.name in arrays}, workspace)


def _example_inputs(arrays: dict[str, Array], counts: NDArray[np.bool_]) -> ExampleInputs:
    # copies: the columns lie in the workspace
    example, seed = (arrays[name].astype(np.int64) for name in EXAMPLE_COLUMNS)
    return ExampleInputs(example, seed, counts, _bounds(arrays["sequence_lengths"]))


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
    return TextInputs(tokens, labels, segments, np.searchsorted(segments, sequences))


def _bounds(lengths: Array) -> Ints:
    """The first row of each of these lengths, and the end of the last: `[m + 1]`."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
