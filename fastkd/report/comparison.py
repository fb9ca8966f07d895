"""The runs of a report side by side: what every section is built from."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import StreamError
from ..evaluate.api import Evaluation, compare
from ..utils.intervals import Interval
from .page import Series
from .runs import Run


@dataclass(frozen=True, eq=False)
class Comparison:
    """runs: in the order of the page. command: the one that makes this report; empty if unknown."""

    runs: Sequence[Run]
    command: str = ""

    @property
    def students(self) -> list[tuple[Run, Series]]:
        """Each run, followed by its control, with the line that stands for it."""
        found: list[tuple[Run, Series]] = []
        for run in self.runs:
            found.append((run, Series(run.name, len(found))))
            if run.control is not None:
                found.append((run.control, Series(run.control.name, len(found), dashed=True)))
        return found

    @property
    def evaluation(self) -> Evaluation | None:
        """The first evaluation of any student."""
        return next((run.evaluation for run, _ in self.students if run.evaluation is not None), None)


def paired_differences(ours: Run, theirs: Run | None) -> dict[str, Interval]:
    """Differences by measure, paired over windows; empty unless both were evaluated on the same windows."""
    if theirs is None or ours.evaluation is None or theirs.evaluation is None:
        return {}
    try:
        return compare(ours.evaluation, theirs.evaluation)
    except StreamError:
        return {}
