"""A shard that is open: its rows in memory, with what is needed to take parts of it into micro-batches."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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
class Inputs:
    """What belongs to the n rows of a shard beside their targets.

    tokens, labels, places `[n]`: the input, what comes after it in its piece (IGNORED: nothing, or it does not count),
        and its place in the piece.
    piece_begins `[pieces + 1]`: where pieces begin. first_piece `[sequences + 1]`: the first piece of each sequence.
    """

    tokens: Array
    labels: Array
    places: Array
    piece_begins: Ints
    first_piece: Ints

    def pieces_of(self, sequences: Ints) -> Ints:
        """The pieces of some sequences, one after another."""
        begins = self.first_piece[sequences]
        return ranges(begins, self.first_piece[sequences + 1] - begins)


@dataclass(frozen=True, eq=False)
class ExampleInputs:
    """What belongs to the n rows of a shard of examples beside their targets.

    example, seed `[n]` int64: the example's number in its data set, and what it was augmented by.
    counts `[n]`: whether the teacher said something. first_row `[sequences + 1]`: where sequences begin.
    """

    example: Array
    seed: Array
    counts: NDArray[np.bool_]
    first_row: Ints


AnyInputs = TypeVar("AnyInputs", Inputs, ExampleInputs)


@dataclass(frozen=True, eq=False)
class OpenShard(Generic[AnyInputs]):
    """A shard in memory. rows: its targets (ids, logprobs, tail, outcomes and maybe draws, `[n, ...]`). workspace: the
    memory that the rows are in, to be used again."""

    inputs: AnyInputs
    rows: dict[str, Array]
    workspace: Workspace


def ranges(begins: Ints, lengths: Ints) -> Ints:
    """begins[0], begins[0] + 1, ... lengths[0] of them, then those from begins[1] on, and so on."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def open_shard(cache: Cache, index: int, workspace: Workspace) -> OpenShard[Any]:
    """A shard read and decoded into memory that is kept."""
    arrays = cache.read_shard(index, into=workspace)
    # entries come first in a row: one that does not count has none in its first place
    counts = arrays["logprobs"][:, 0] > -np.inf
    rows = {field.name: arrays[field.name] for field in FIELDS if field.name in arrays}
    return OpenShard(_inputs(cache, arrays, counts), rows=rows, workspace=workspace)


def _inputs(cache: Cache, arrays: dict[str, Array], counts: NDArray[np.bool_]) -> Inputs | ExampleInputs:
    """From a shard's columns and lengths. counts `[n]`: which rows have targets; it is changed."""
    if "tokens" not in cache.spec.inputs:
        first_row = _begins(arrays["sequence_lengths"])
        # the columns lie in memory that is used again
        example, seed = (arrays[name].astype(np.int64) for name in EXAMPLE_COLUMNS)
        return ExampleInputs(example, seed, counts, first_row)
    tokens = arrays["tokens"]
    n = len(tokens)
    if "loss_mask" in cache.spec.inputs:
        counts &= arrays["loss_mask"].astype(bool, copy=False)
    begins = np.zeros(n + 1, bool)
    sequence_begins = _begins(arrays["sequence_lengths"])
    begins[sequence_begins] = True
    if "document_lengths" in arrays:
        # a document may go on in the next sequence, which does not see it
        begins[_begins(arrays["document_lengths"])] = True
    piece_begins = np.flatnonzero(begins)
    labels = np.empty(n, np.int32)
    labels[:-1] = tokens[1:]
    labels[piece_begins[1:] - 1] = IGNORED
    labels[~counts] = IGNORED
    places = np.arange(n, dtype=np.int32)
    places -= np.repeat(piece_begins[:-1].astype(np.int32), np.diff(piece_begins))
    return Inputs(tokens, labels, places, piece_begins, np.searchsorted(piece_begins, sequence_begins))


def _begins(lengths: Array) -> Ints:
    """Where stretches of these lengths begin, and where the last ends: `[stretches + 1]`."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
