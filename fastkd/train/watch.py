"""`--stop-if-worse`: a student that is worse than an arm trained before it, beyond the interval, is not trained on.

The arms are trained first, with evaluations after the same steps. From its third evaluation on, and before the last,
the student is compared with them after the same step, by the measure of `--best`, paired over held-out windows. These
are several looks, any of which might stop a student that is no worse: a share of 5% / looks lies outside each interval
(Bonferroni over evaluations and arms), so that with a probability of 95% no student is stopped that is no worse. Looks
of one run depend on each other, so the true share is smaller.

A look depends on nothing but the evaluations that the run folders keep: a run that was killed stops at the same step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TrainError
from ..evaluate.measures import MEASURES
from ..utils.intervals import TAIL
from .evaluations import kept_steps, read
from .verdict import HURT, Verdict, judge

if TYPE_CHECKING:
    from ..evaluate.result import Evaluation

FIRST = 3
"""The number of the first evaluation after which a student may be stopped."""
_NOT_SUMMED = "ece"


@dataclass(frozen=True)
class Watch:
    """The arms that a student is compared with: their folders, by name. weights: of the caches. measure: that decides.
    Without arms, as for the control itself, nothing is compared."""

    arms: Mapping[str, Path]
    weights: Sequence[float]
    measure: str

    def looks(self, steps: int, every: int) -> list[int]:
        """The steps after which a run of `steps`, evaluated after every `every` steps, is compared. Raises TrainError
        if there are none."""
        found = kept_steps(steps, every)[FIRST - 1 : -1]
        if not found:
            raise TrainError(
                f"stop_if_worse: got {len(kept_steps(steps, every))} evaluations in {steps} steps; expected at least "
                f"{FIRST + 1}: the first {FIRST - 1} and the last stop nothing. Lower evaluate_every."
            )
        return found

    def look(self, step: int, ours: "Sequence[Evaluation]", looks: Sequence[int]) -> Verdict | None:
        """The verdict after a step if the student is worse than an arm; else None."""
        count = len(looks) * len(self.arms)
        for name, folder in self.arms.items() if step in looks else ():
            theirs = read(folder, step)
            found = judge(name, ours, theirs, self.weights, self.measure, step=step, looks=count, tail=TAIL / count)
            if found is not None and found.overall == HURT:
                return found
        return None


@dataclass(frozen=True)
class PeersWatch:
    """Students that learn from each other, in one training: it ends if, at one evaluation, each that learns from others
    is worse than its own arm, so that none would be served by going on. watches: of these, by name. students: the names
    of all, in the order of their evaluations."""

    watches: Mapping[str, Watch]
    students: Sequence[str]

    def looks(self, steps: int, every: int) -> list[int]:
        """As of a single student: for all of them to be worse by chance is less likely than for one."""
        return next(iter(self.watches.values())).looks(steps, every)

    def look(self, step: int, ours: "Sequence[Evaluation]", looks: Sequence[int]) -> Verdict | None:
        """The verdict after a step of the student that is least worse, if all are. ours: those of one student after the
        other."""
        each = len(ours) // len(self.students)
        parts = {name: ours[i * each : (i + 1) * each] for i, name in enumerate(self.students)}
        found = [watch.look(step, parts[name], looks) for name, watch in self.watches.items()]
        worse = [one for one in found if one is not None]
        if len(worse) < len(found):
            return None
        return min(worse, key=lambda one: abs(one.difference[one.measure].mean))


def check_watch(*, control: bool, by_window: bool, measure: str) -> None:
    """Raise TrainError if a student cannot be compared with its control. by_window: whether the evaluations are."""
    if not control:
        raise TrainError("stop_if_worse: got no control; expected --control, which the student is compared with.")
    if not by_window:
        raise TrainError(
            "stop_if_worse: got no evaluations of the held-out split; expected some, to be compared. Capture with data "
            "held out, and do not replace the evaluation."
        )
    if measure not in MEASURES or measure == _NOT_SUMMED:
        raise TrainError(
            f"best: got {measure!r}; with stop_if_worse expected a measure that is a mean over positions, such as "
            "cross_entropy, kl_bucket or accuracy."
        )
