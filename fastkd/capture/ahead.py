"""Batches that a teacher has begun to answer before their turn, so that a server has enough to do at a time."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import TeacherError
from ..teachers.protocol import Answer, Begun, Submits

Ints = NDArray[np.int64]
POLL_SECONDS = 0.5  # between two looks at a stop request


class Asked(NamedTuple):
    """A batch that was submitted: its number, what answers it, and the positions that were sent, without padding."""

    number: int
    begun: Begun
    positions: int


class BatchesAhead:
    """The batches of a shard, submitted in order, up to `teacher.in_flight` positions at a time (and at least one).

    inputs: the token ids `[B, L]` of a batch, and the lengths of its rows; None for a batch that needs no answer.
    waiting: called every half second while an answer is waited for; what it raises ends the wait.
    """

    def __init__(
        self,
        teacher: Submits,
        batches: Sequence[Ints],
        inputs: Callable[[Ints], tuple[Tensor, Ints] | None],
        waiting: Callable[[], None],
    ) -> None:
        self._teacher, self._inputs, self._waiting = teacher, inputs, waiting
        self._left = deque(enumerate(batches))
        self._asked: deque[Asked] = deque()
        self._positions = 0

    def take(self, number: int) -> Answer:
        """The answer to a batch that needs one; they are taken in order."""
        self._submit()
        asked = self._asked.popleft()
        assert asked.number == number, "batches are taken in order"
        try:
            while True:
                try:
                    answer = asked.begun.result(POLL_SECONDS)
                    break
                except TimeoutError:
                    self._waiting()
        except BaseException:
            asked.begun.cancel()
            raise
        self._positions -= asked.positions
        self._submit()
        return answer

    def _submit(self) -> None:
        while self._left and (not self._asked or self._positions < self._teacher.in_flight):
            number, segments = self._left.popleft()
            if (found := self._inputs(segments)) is None:
                continue
            tokens, lengths = found
            begun = self._teacher.submit(tokens, lengths.tolist())
            self._asked.append(Asked(number, begun, int(lengths.sum())))
            self._positions += self._asked[-1].positions

    def cancel(self) -> None:
        """Give up what was submitted and not taken."""
        while self._asked:
            self._asked.popleft().begun.cancel()
        self._left.clear()


def row_of(error: TeacherError) -> int | None:
    """The row of the batch that an error is about, if it says so."""
    row = getattr(error, "row", None)
    return row if isinstance(row, int) else None
