"""Similarity-preserving distillation: which examples of a batch are alike (Tung & Mori 2019).

With G = A Aᵀ of the flattened maps A `[b, C · H · W]` of a call, rows divided by their norm,
`Σ_e mean_f (G^S_ef − G^T_ef)²` over its b examples, divided by their number in the whole step (num_items / vectors of
an example): ‖G^S − G^T‖² / b² for a step of one call. Channels and sizes may differ, and there is no projector.
Products are the same in any orthonormal basis.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...autocast import without_autocast
from ..arithmetic import accumulator, per_item
from ..maps import examples_of, scaled_coordinates, student_maps
from ..targets import HiddenTargets

INPUTS = "maps"
PROJECTOR = False
SEGMENTS = False


def loss(
    student: Tensor, teacher: HiddenTargets, num_items: float | Tensor | None = None, *, shape: tuple[int, ...]
) -> Tensor:
    """student `[B, C', H', W']`. shape: of the teacher's value, (C, H, W) or (H, W). Returns a 0-d tensor; see
    `FeatureLoss`."""
    dtype = accumulator(student)
    ours = student_maps(student, teacher, shape, channels=False).to(dtype).flatten(1)
    if not len(ours):
        return ours.sum()
    vectors = examples_of(teacher, shape)[0]
    with without_autocast(student.device):
        with torch.no_grad():
            theirs = scaled_coordinates(teacher, dtype).view(len(ours), -1)
            theirs = normalize(theirs @ theirs.T, dim=1)
        difference = normalize(ours @ ours.T, dim=1) - theirs
    return per_item(difference.square().mean(1).sum() * vectors, len(teacher), num_items)


def oracle(
    student: Tensor, teacher: HiddenTargets, num_items: float | Tensor | None = None, *, shape: tuple[int, ...]
) -> Tensor:
    vectors, examples = examples_of(teacher, shape)
    ours = (student if examples is None else student[examples]).flatten(1)
    theirs = teacher.states(dtype=student.dtype).reshape(len(ours), -1)
    s, t = (g / g.norm(dim=1, keepdim=True) for g in (x @ x.T for x in (ours, theirs)))
    total: Tensor = (s - t).square().sum() / len(ours)
    return total * vectors / (len(teacher) if num_items is None else num_items)
