"""How a student continues prompts, by name: `--rollout-generator loop` is generators/loop.py.

Belongs here: one module for each way, named after it, with a class `Generator` (see `Generator` in this file). Does
not: which prompts there are, where they come from, and what becomes of the continuations.
"""

import pkgutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import StreamError
from ...utils.similar import did_you_mean

Ints = NDArray[np.int64]


class SamplingStudent(Protocol):
    """What a generator needs of a student; `fastkd.train.student.Student` has it."""

    name: str
    model: Any
    max_positions: int | None

    def sampling(self) -> AbstractContextManager[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Context manager: the model in evaluation mode, without gradients, in the precision of the training. Yields a
        function from token ids `[B, L]` (padded at the end) and flattened positions `[m]` to logits `[m, V]`."""


@dataclass(frozen=True, eq=False)
class Sampling:
    """How tokens are sampled.

    tokens: at most that many per prompt. temperature: 0 for the most likely token. vocab_size: ids from here on are
    never sampled (a student's vocabulary may be padded). eos: ids that end a continuation, which has them.
    """

    tokens: int
    temperature: float
    vocab_size: int
    eos: tuple[int, ...] = ()

    def cut(self, tokens: Ints) -> Ints:
        """A continuation up to its first id that ends it."""
        ends = np.flatnonzero(np.isin(tokens, self.eos))
        return tokens[: ends[0] + 1] if len(ends) else tokens


class Generator(Protocol):
    """What a module of this folder defines: a class of this name. It is made with the student, and raises StreamError
    if the student cannot be continued this way."""

    def __init__(self, student: SamplingStudent) -> None: ...

    def __call__(self, prompts: Sequence[Ints], keys: NDArray[np.uint64], sampling: Sampling) -> list[Ints]:
        """The continuation of each prompt, of one token at least and `sampling.tokens` at most.

        prompts: token ids of one batch. keys `[B]`: seed the tokens of each: with the same weights, the same keys give
        the same tokens (see `sampling.py`).
        """

    def close(self) -> None:
        """After the last batch of a round: give back memory."""


def names() -> list[str]:
    """The generators, by the names that settings take."""
    found = pkgutil.iter_modules(__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


def find(name: str, student: SamplingStudent) -> Generator:
    """The generator of this name for a student. auto: `transformers` for a model that has `generate`, else `loop`.
    Raises StreamError if there is none, or if it does not take this student."""
    if name == "auto":
        can_generate = getattr(student.model, "can_generate", None)
        name = "transformers" if can_generate is not None and can_generate() else "loop"
    if name not in names():
        raise StreamError(
            f"rollout_generator: got {name!r}; expected one of auto, {', '.join(names())}.{did_you_mean(name, names())}"
        )
    generator: Generator = import_module(f".{name}", __name__).Generator(student)
    return generator
