"""`BatchSource`: what the trainer needs of whatever supplies its optimizer steps."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from .batch import Step


@runtime_checkable
class BatchSource(Protocol):
    """Optimizer steps (`Step`) in an order that can be left at any step and resumed exactly.

    A source has no base class: an object with these members is one. `CachedSource` is the one that reads a cache.
    The order of the steps may depend on what `fingerprint` names, on the epoch and on the number of the step, and on
    nothing else: not on the number of ranks, nor on how often the source was stopped.
    """

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """All that decides which steps the source yields, by name, in values that JSON can hold."""

    def __len__(self) -> int:
        """Optimizer steps per epoch."""

    def steps(self) -> Iterator[Step]:
        """The steps from the current position on, epoch after epoch without end.

        The position advances as steps are handed out. Only one iterator is active: a new one ends the one before.
        """

    def state_dict(self) -> dict[str, Any]:
        """The position, after the step handed out last, in values that JSON can hold. The same on every rank."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a state. Raises StreamError if it belongs to a source with another fingerprint."""

    def seek(self, epoch: int, step: int) -> None:
        """Go to the position before a step of an epoch, both counted from 0.

        The steps that follow, and the state, are the same as if the source had been iterated to that position.
        step = the number of steps in the epoch is its end. Raises StreamError beyond that.
        """

    def close(self) -> None:
        """End the active iterator, and the threads and files behind it. `steps()` may be called again."""
