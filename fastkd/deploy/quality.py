"""Quality: an exported student on the held-out split of a cache, in its own runtime, beside the student in PyTorch.

Both see the same documents, one at a time, so differences are paired by window.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import Cache
from ..data.examples import Examples
from ..errors import ExportError, StreamError
from ..evaluate.api import Evaluation, compare, evaluate
from ..settings import DeploySettings
from ..utils.atomic import read_sealed, write_json
from ..utils.intervals import Interval
from .formats.safetensors import TorchRuntime
from .model import Deployable
from .runtime import Runtime, logits_of

FILE = "evaluation.json"
AGREEMENT = "student_agreement"
BATCH_TOKENS = 1024
"""Positions of a micro-batch, whose logits are in memory at a time."""


class Quality(NamedTuple):
    """The evaluations of a student in PyTorch, and of its export, on the same windows."""

    student: Evaluation
    exported: Evaluation

    @property
    def measure(self) -> str:
        """The KL divergence to the teacher that `cost` is of: by the top-k entries, with the tail as one outcome, or
        where a cache has none of them by its draws."""
        return kl_of(self.student)

    @property
    def differences(self) -> dict[str, Interval]:
        """The export's measures minus the student's, paired by window."""
        return compare(self.exported, self.student)

    @property
    def cost(self) -> Interval:
        """Nats by which the export's KL divergence to the teacher is higher than the student's."""
        return self.differences[self.measure]

    def above(self, at_most: float | None) -> bool:
        """Whether it costs more than that."""
        return at_most is not None and self.cost.mean > at_most


class BestTokens:
    """The student's most likely tokens, by position in the order of the evaluation; four bytes each."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._next = 0

    def keep(self, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        """Keep those of a micro-batch, in the order of an evaluation; no measure."""
        self._kept.append(logits.argmax(1).int())
        return {}

    def start(self) -> None:
        """Before an evaluation of the same windows."""
        self._next = 0

    def compare(self, batch: Any, logits: Tensor) -> dict[str, Tensor]:
        """Whether those of the same micro-batch are the same."""
        kept = self._kept[self._next]
        self._next += 1
        return {AGREEMENT: (logits.argmax(1).int() == kept).float()}


class Judge:
    """Evaluates the student once, and then any number of exports of it.

    cache: opened. data: the examples of a cache of them. The student's logits are not kept, but its best tokens are.
    """

    def __init__(
        self, model: Deployable, cache: Cache, data: Examples | None, settings: DeploySettings, *, progress: bool
    ) -> None:
        self._cache, self._longest = cache, model.max_positions
        self._more: dict[str, Any] = {
            "data": data, "max_positions": settings.positions, "batch_tokens": BATCH_TOKENS, "progress": progress,
        }  # fmt: skip
        self._best = BestTokens()
        threads = settings.threads or torch.get_num_threads()
        with restored_threads():
            self.student = self._evaluate(TorchRuntime(model.model, threads), self._best.keep)

    def quality(self, runtime: Runtime) -> Quality:
        """Evaluate an export. Raises StreamError if its logits are not finite, or of a wrong width."""
        self._best.start()
        with restored_threads():
            return Quality(self.student, self._evaluate(runtime, self._best.compare))

    def _evaluate(self, runtime: Runtime, further: Any) -> Evaluation:
        logits = logits_of(runtime, longest=self._longest)
        return evaluate(logits, self._cache, further=further, **self._more)


def kl_of(found: Evaluation) -> str:
    """The name of the KL divergence to the teacher that an evaluation has."""
    return "kl_bucket" if "kl_bucket" in found.student.sums else "kl_sampled"


@contextmanager
def restored_threads() -> Iterator[None]:
    """PyTorch's number of threads afterwards as before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def save_quality(folder: Path, found: Quality) -> None:
    """Write evaluation.json into an exported folder."""
    write_json(folder / FILE, {"student": found.student.to_json(), "exported": found.exported.to_json()}, indent=None)


def load_quality(folder: Path) -> Quality | None:
    """What `save_quality` wrote; None if there is no such file. Raises ExportError if it is damaged."""
    try:
        found = read_sealed(folder / FILE)
        return Quality(Evaluation.from_json(found["student"]), Evaluation.from_json(found["exported"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, StreamError) as error:
        raise ExportError(f"{folder / FILE}: damaged ({error}). Delete it, and evaluate again with a cache.") from error
