"""What answers micro-batches inside a student's forward: `InForward`, the protocol of `Student.live`.

A teacher that is made of the student (its average, its peers) has to run where the student's parameters are complete:
inside its forward, between that of its model and its objective.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from ..models.protocol import Output
from ..stream.batch import AnyBatch


class InForward(Protocol):
    """A teacher inside a student's forward.

    If it is a torch module it becomes a part of the student: it goes to its device, into its checkpoints, DDP and
    FSDP2, and is not exported with it. Its parameters must not require gradients, or they are trained. Under FSDP2 it
    is sharded as a group of its own, by its list of layers: what uses its parameters is its `forward`, or its `logits`.
    """

    def answer(self, batch: AnyBatch, output: Output | None, student: Any) -> AnyBatch:
        """The micro-batch with targets, which then have no gradients.

        output: what the student's model returned for the micro-batch, with gradients; None in an evaluation, which
        does not run the student for this. student: the `Student`, whose autocast is active.
        """

    def after_step(self, student: Any, step: int) -> None:
        """Called after each step of the optimizer. step: the number of steps that were made, with this one."""

    def describe(self) -> Mapping[str, Any]:
        """The settings, in values that JSON can hold. A run is resumed only with the same."""
