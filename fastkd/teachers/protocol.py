"""The protocol `Teacher`: what a capture needs of a teacher, and how it answers."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..kernels import LMHead
from ..models.protocol import Hidden, Logits, Output, TopK

__all__ = ["Answer", "Begun", "Hidden", "LMHead", "Logits", "Teacher", "TopK", "for_targets"]

Answer = Output | TopK
"""What a teacher returns for a batch: `Hidden`, `Logits` or `TopK`."""


class Teacher(Protocol):
    """A model in evaluation mode, here or behind a server. It is called under `torch.inference_mode`.

    For text it must be causal: tokens after a position, padding included, must not change its answer there.

    A teacher that answers with `TopK` may also have two attributes, which a capture checks before it writes anything:
    `max_k`, the most entries a position that it returns, and `tail_temperatures`, the temperatures of its tails.

    One outside this process may have more, each of them optional:

    - `for_targets(settings)`: the teacher that answers with what a `TargetSettings` keeps of it: a server is asked for
      no more entries.
    - `submit(inputs, lengths)`: begin to answer a batch of text, whose rows have that many tokens without padding, and
      return a `Begun`. A capture begins batches before it waits for earlier ones, up to `in_flight` positions.
    - `tokenizer(template=...)`: the tokenizer of its model. `check_tokenizer(tokenizer)`: TeacherError if another one
      is given, and gives other ids than its own.
    - `probe()`: what it says on a fixed input, as JSON; `compare_probe(value)`: in a sentence, what makes such a value
      one of another model; "" for nothing. A cache keeps it, and is continued only with the same.
    - `figures()`: its state by name, each a number and its text, for progress bars. `summary()`: what it did, in a
      line.
    """

    @property
    def vocab_size(self) -> int:
        """V, the width of its logits (which may exceed the size of its tokenizer), or its number of classes."""
        ...

    @property
    def fingerprint(self) -> str:
        """Everything that decides its answers, as one line of text: architecture, sha256 of the weights, dtype,
        attention; not its path or device. Read once a capture, so it may take as long as hashing the weights does."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of its inputs and outputs."""
        ...

    @property
    def max_positions(self) -> int | None:
        """The longest input that it takes, in tokens; None: no limit, or unknown."""
        ...

    def __call__(self, inputs: Tensor) -> Answer:
        """inputs: on its device; token ids, int64 `[B, L]`, padded at the end, or examples `[B, ...]`."""
        ...


class Begun(Protocol):
    """A batch that a teacher has begun to answer."""

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the answer. TimeoutError after that many seconds without one, of which nothing is lost: it may be
        called again. A TeacherError may have an attribute `row`, of the batch."""
        ...

    def cancel(self) -> None:
        """Give the batch up."""
        ...


class Submits(Protocol):
    """A teacher that answers several batches at a time; see `Teacher`."""

    in_flight: int

    def submit(self, inputs: Tensor, lengths: Sequence[int]) -> Begun:
        """Begin to answer a batch."""
        ...


Some = TypeVar("Some", bound=Teacher)


def for_targets(teacher: Some, settings: Any) -> Some:
    """The teacher that answers with what a `TargetSettings` (or an object with its fields) keeps."""
    method: Any = getattr(teacher, "for_targets", None)
    return teacher if method is None else method(settings)
