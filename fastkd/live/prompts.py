"""Which sequences a student continues, and from where: pure functions of seed, epoch and sequence."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..stream.gather import IGNORED, TextInputs
from ..stream.mixture import MixedSequences
from ..utils.splitmix import mixed

Ints = NDArray[np.int64]
_CHOOSE, _CUT = range(2)  # what the numbers are for


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prefix of a segment, to be continued. tokens: int64 `[n]`, at least one. document: of its data set, −1 if it is
    not known."""

    tokens: Ints
    document: int = -1


@dataclass(frozen=True)
class PromptRule:
    """Where prompts end.

    conversations: whether the data are conversations of which the assistant's positions count. A prompt then ends where
        one of the assistant's turns begins, each equally likely; a segment without such a turn has no prompt.
    tokens: the length of the prompts of other data (all of a segment but its last token, if it is shorter); None: each
        length from 1 to that of the segment less 1 equally likely.
    limit: the most positions of a prompt and its continuation together, None for no limit. new_tokens: of a
        continuation, at most: for them room is left where that is possible.
    """

    seed: int
    conversations: bool
    tokens: int | None
    limit: int | None
    new_tokens: int

    def prompts(self, inputs: TextInputs, sequence: int, epoch: int, key: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """For each segment of a sequence of a shard that has a prompt: its first row, and the row after the prompt.

        key: identifies the shard.
        """
        for segment in range(*inputs.first_segment[sequence : sequence + 2].tolist()):
            begin, end = inputs.segments[segment : segment + 2].tolist()
            number = int(random_numbers(self.seed, _CUT, epoch, *key, np.array([segment]))[0])
            length = self._length(inputs, begin, end, number)
            if length is not None and (self.limit is None or length < self.limit):
                yield begin, begin + length

    def _length(self, inputs: TextInputs, begin: int, end: int, number: int) -> int | None:
        if self.conversations:
            counts = inputs.labels[begin:end] != IGNORED
            # where the next token is the first one of the assistant's
            turns = np.flatnonzero(counts & ~np.concatenate([[False], counts[:-1]])) + 1
            turns = turns if self.limit is None else turns[turns < self.limit]
            return int(turns[number % len(turns)]) if len(turns) else None
        most = max(1, end - begin - 1)
        if self.limit is not None:
            most = min(most, max(1, self.limit - self.new_tokens))
        return 1 + number % most if self.tokens is None else min(self.tokens, most)


def chosen(seed: int, fraction: float, epoch: int, sequences: MixedSequences) -> NDArray[np.bool_]:
    """Which sequences are continued, `[m]`: each with this probability, by its own number."""
    numbers = random_numbers(seed, _CHOOSE, epoch, sequences.source, sequences.shard, sequences.sequence)
    below: NDArray[np.bool_] = (numbers >> np.uint64(11)) * 2.0**-53 < fraction
    return below


def random_numbers(*numbers: int | Ints) -> NDArray[np.uint64]:
    """A number from 0 to 2^64 − 1 for each row of `numbers` (integers, or arrays `[m]` of one length)."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mixed(key ^ np.atleast_1d(number).astype(np.uint64))
    return key
