"""The default evaluation of a training: `fastkd.evaluate` on the held-out split of each of its inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .beside import measured_beside
from .student import Student

if TYPE_CHECKING:
    from ..evaluate.api import Evaluation

EVALUATION, EVALUATIONS = "evaluation.json", "evaluations.json"  # of one cache; a list, of a mixture


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Evaluates a student, and what is measured beside it, on the held-out split of each input; returns the means over
    them, by their weights.

    measures: of each. evaluations: the last ones, one for each, of the whole student. sequences, positions: that each
    evaluation reads, of all inputs; None if that is not known before.
    """

    measures: "Sequence[Callable[[Any], Evaluation]]"
    weights: Sequence[float]
    evaluations: "list[Evaluation]" = field(default_factory=list)
    sequences: int | None = None
    positions: int | None = None

    def __call__(self, student: Student) -> dict[str, float]:
        self.evaluations[:] = [measure(student) for measure in self.measures]
        found = means(self.evaluations, self.weights)
        for name, part in measured_beside(student).items():
            theirs = means([measure(part) for measure in self.measures], self.weights)
            found |= {f"{name}/{measure}": value for measure, value in theirs.items()}
        return found


def means(evaluations: "Sequence[Evaluation]", weights: Sequence[float]) -> dict[str, float]:
    """The mean of each measure over inputs, by their weights."""
    total: dict[str, float] = {}
    for one, weight in zip(evaluations, weights, strict=True):
        for name, value in one.summary().items():
            if (mean := value["mean"]) is not None:
                total[name] = total.get(name, 0.0) + mean * weight / sum(weights)
    return total
