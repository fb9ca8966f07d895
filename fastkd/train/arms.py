"""What is trained beside a student to tell what its training was good for, and whether its features were.

RUN/control/           the same student on hard labels alone
RUN/without_features/  the same student with the same settings, without the features that it matches
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from ..settings import TrainSettings
from .objective import Objective, WeightedSum

CONTROL, WITHOUT_FEATURES = "control", "without_features"


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
    hard_labels = replace(plain, alpha=1.0, alpha_end=None, exits=(), export_exit=None, export_teacher=False)
    hard_labels = replace(hard_labels, lora_merge=False)
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
