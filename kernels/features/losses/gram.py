# mypy: allow-untyped-decorators
"""Squared difference between the cosines of all pairs of states in a segment, the student's and the teacher's.

`Σ_i mean_j (cos(s_i, s_j) − cos(x_i, x_j))² / num_items`, j over the n rows of the segment of i: ‖Ŝ Ŝᵀ − X̂ X̂ᵀ‖² / n of
rows divided by their norms (relations as in similarity-preserving distillation, Tung & Mori 2019, and Gram anchoring,
Siméoni et al. 2025). Widths may differ, and there is no projector. Cosines are the same in any orthonormal basis.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ...autocast import without_autocast
from ..arithmetic import (
    accumulator,
    check_student,
    coordinates_of,
    dot,
    per_item,
    wants_gradient,
    with_gradients,
)
from ..attention import mask_of
from ..segments import Segments, check_segments
from ..targets import HiddenTargets

INPUTS = "states"
PROJECTOR = False
SEGMENTS = True
SMALLEST = 1e-12


@torch.compiler.disable
def loss(
    student: Tensor,
    teacher: HiddenTargets | Tensor,
    num_items: float | Tensor | None = None,
    *,
    segments: Segments | None = None,
    block: int | None = None,
) -> Tensor:
    """student `[N, D]`, of any D. teacher: N states, or their coordinates as a tensor. segments: None: all rows are in
    one. block: numbers in a block of cosines; None: by device. Returns a 0-d tensor; see `FeatureLoss`. Memory: float32
    copies of both, the gradient, and blocks of cosines."""
    check_student(student, teacher, same_width=False)
    segments = check_segments(segments, len(student))
    wanted, dtype = wants_gradient(student), accumulator(student)
    with torch.no_grad(), without_autocast(student.device):
        z = torch.nn.functional.normalize(coordinates_of(teacher, dtype), dim=1, eps=SMALLEST)
        s = student.detach().to(dtype)
        norm = s.norm(dim=1, keepdim=True).clamp_(min=SMALLEST)
        s = s / norm
        visible = segments.visible(False, s.device)
        share = 1 / (visible[1] - visible[0]).to(dtype)[:, None]
        total = torch.zeros((), dtype=dtype, device=s.device)
        gradient = torch.empty_like(s) if wanted else s
        for b in segments.blocks(1, False, s.device, block):
            difference = s[b.start : b.stop] @ s[b.first : b.last].T
            difference.addmm_(z[b.start : b.stop], z[b.first : b.last].T, alpha=-1)
            if (mask := mask_of(b, visible)) is not None:
                difference.masked_fill_(mask, 0)
            total += dot(difference * share[b.start : b.stop], difference)
            if wanted:
                torch.mm(difference, s[b.first : b.last], out=gradient[b.start : b.stop])
        if wanted:  # each pair is counted in the row of either; then through the norm
            gradient.mul_(4 * share)
            gradient.addcmul_(s, torch.linalg.vecdot(gradient, s)[:, None], value=-1).div_(norm)
    if wanted:
        total = with_gradients(total, [student], [gradient])
    return per_item(total, len(student), num_items)


def oracle(
    student: Tensor,
    teacher: HiddenTargets | Tensor,
    num_items: float | Tensor | None = None,
    *,
    segments: Segments | None = None,
) -> Tensor:
    target = teacher.states(dtype=student.dtype) if isinstance(teacher, HiddenTargets) else teacher
    total = student.new_zeros(())
    for a, b in pairwise(segments.bounds if segments else (0, len(student))):
        s, x = (v[a:b] / v[a:b].norm(dim=1, keepdim=True) for v in (student, target))
        total = total + (s @ s.T - x @ x.T).square().mean(1).sum()
    return total / (len(student) if num_items is None else num_items)
