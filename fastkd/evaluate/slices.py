"""Slices: positions grouped by what their cached target says of them, so that measures can be told apart by group.

Three families, each of which divides all positions that count:

    teacher/right, wrong              the teacher's best top-k entry is the label (or one of several equal best ones is)
    entropy/low, middle, high         the teacher's entropy H at T = 1
    disagreement/low, middle, high    -log q(label), the teacher's disagreement with the label

The bounds are 1 and 3 bits, that is log 2 and log 8 nats. exp(H) is the number of equally likely tokens with the same
entropy: below 2, 2 to 8, and above 8. The label's probability is above 1/2, 1/2 to 1/8, and below 1/8. A label that is
not among the entries lies in the tail: its probability is unknown, and its disagreement is high. With draws, the
entropy is the estimate that they give; without, the lower bound with the tail as one outcome. Without top-k entries the
teacher's best token is unknown: there is no family "teacher".
"""

import math

import torch
from torch import Tensor

from .rows import Rows

BOUNDS = (math.log(2.0), math.log(8.0))
"""Nats: what is below the first is low, what is at or above the second is high."""
FAMILIES = {
    "teacher": ("right", "wrong"),
    "entropy": ("low", "middle", "high"),
    "disagreement": ("low", "middle", "high"),
}
SLICES = tuple(f"{family}/{part}" for family, parts in FAMILIES.items() for part in parts)
SAYS = {
    "teacher/right": "teacher right",
    "teacher/wrong": "teacher wrong",
    "entropy/low": "teacher's entropy below log 2",
    "entropy/middle": "teacher's entropy log 2 to log 8",
    "entropy/high": "teacher's entropy above log 8",
    "disagreement/low": "teacher's probability of the label above 1/2",
    "disagreement/middle": "teacher's probability of the label 1/8 to 1/2",
    "disagreement/high": "teacher's probability of the label below 1/8",
}
"""Each slice in words."""


def slice_numbers(teacher: Rows) -> list[Tensor]:
    """The slice of each position in each family that is known, as an index into SLICES, `[m]` int64.

    teacher: `teacher_rows(targets, labels)`; empty without a teacher.
    """
    if not teacher:
        return []
    known = teacher["label_known"] > 0
    disagreement = teacher["cross_entropy_at_least"].masked_fill(~known, math.inf)
    found = {"disagreement": _level(disagreement)}
    if (entropy := teacher.get("entropy_sampled", teacher.get("entropy_at_least"))) is not None:
        found["entropy"] = _level(entropy)
    if "accuracy" in teacher:
        found["teacher"] = (teacher["accuracy"] == 0).long()
    first = {family: SLICES.index(f"{family}/{parts[0]}") for family, parts in FAMILIES.items()}
    return [first[family] + found[family] for family in FAMILIES if family in found]


def _level(value: Tensor) -> Tensor:
    """0 below the first bound, 1 between them, 2 from the second on."""
    return torch.bucketize(value, value.new_tensor(BOUNDS), right=True)
