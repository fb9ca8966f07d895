"""What is trained beside a student to tell what its training was good for, and whether its features were.

RUN/control/           the same student on hard labels alone
RUN/without_features/  the same student with the same settings, without the features that it matches
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..evaluate.measures import sign_of
from ..settings import TrainSettings
from ..utils.intervals import Interval, to_json
from .objective import Objective, WeightedSum

if TYPE_CHECKING:
    from ..evaluate.api import Evaluation

CONTROL, WITHOUT_FEATURES = "control", "without_features"
HELPED, HURT, EVEN = "helped", "hurt", "within noise"


@dataclass(frozen=True)
class Arm:
    """A training beside a student's. folder: within the run's; also the field of its report. says: what it is."""

    folder: str
    says: str
    settings: TrainSettings
    objective: Objective | None = None


def control_arms(settings: TrainSettings, objective: Objective | None) -> list[Arm]:
    """What `control` adds to a training with these settings and objective (None: that of the settings)."""
    plain = replace(settings, match=())
    hard_labels = replace(plain, alpha=1.0, alpha_end=None)
    found = [Arm(CONTROL, "on hard labels alone", hard_labels)]
    without = None if objective is None else without_features(objective)
    if plain != settings or without is not None:
        found.insert(0, Arm(WITHOUT_FEATURES, "without the features that it matches", plain, without or objective))
    return found


def without_features(objective: Objective) -> Objective | None:
    """An objective less its terms that read features; None if it has no such terms, or no others.

    A term that is a module is copied: training one arm must not change the parameters of the other.
    """
    if not isinstance(objective, WeightedSum):
        return None
    kept = {name: term for name, term in objective.terms.items() if not reads_features(term)}
    if not kept or len(kept) == len(objective.terms):
        return None
    return WeightedSum(deepcopy(kept), {name: objective.weights[name] for name in kept})


def reads_features(objective: Any) -> bool:
    """Whether an objective reads cached features."""
    return any(name.partition("/")[0] == "features" for name in objective.signals)


@dataclass(frozen=True)
class FeatureHelp:
    """A student minus the same without features, on the same held-out windows.

    measure: the one that decides. difference: of each measure, with 95% intervals paired over windows. windows: their
    number. It is one training each: another seed may change it by more than the interval.
    """

    measure: str
    difference: Mapping[str, Interval]
    windows: int

    @property
    def verdict(self) -> str:
        """By the measure that decides: "helped", "hurt" or "within noise"."""
        return verdict(self.measure, self.difference[self.measure])

    @property
    def text(self) -> str:
        """The verdict as a sentence."""
        mean, half = self.difference[self.measure]
        figure = f"{self.measure} {mean:+.4f} ± {half:.4f}, paired over {self.windows} held-out windows; one seed"
        says = {HELPED: "The features helped", HURT: "The features did harm", EVEN: "Whether the features helped is "
                "within noise"}  # fmt: skip
        return f"{says[self.verdict]} ({figure})."

    def to_json(self) -> dict[str, Any]:
        difference = {
            name: to_json(value) | {"verdict": verdict(name, value)} for name, value in self.difference.items()
        }
        return {"measure": self.measure, "verdict": self.verdict, "windows": self.windows, "difference": difference}


def feature_help(
    ours: "Sequence[Evaluation]", theirs: "Sequence[Evaluation]", weights: Sequence[float], measure: str
) -> FeatureHelp | None:
    """From evaluations of both, one for each cache: means over caches by their weights. None without evaluations of
    both, and if they lack the measure."""
    from ..evaluate.api import compare

    if not ours or len(ours) != len(theirs):
        return None
    parts = [compare(one, other) for one, other in zip(ours, theirs, strict=True)]
    shares = [weight / sum(weights) for weight in weights]
    difference = {
        name: Interval(
            sum(share * part[name].mean for share, part in zip(shares, parts, strict=True)),
            # windows of several caches are independent
            sum((share * part[name].half) ** 2 for share, part in zip(shares, parts, strict=True)) ** 0.5,
        )
        for name in parts[0]
        if all(name in part for part in parts)
    }
    return FeatureHelp(measure, difference, sum(one.windows for one in ours)) if measure in difference else None


def verdict(measure: str, difference: Interval) -> str:
    """Whether a difference of a measure, with its interval, is for the better, for the worse, or neither."""
    if not abs(difference.mean) > difference.half:
        return EVEN
    return HELPED if difference.mean * sign_of(measure) < 0 else HURT
