"""Smooth L1 between a projected state of the student and a teacher's state divided by its scale.

`Σ_i mean_w h(student_iw − r_iw) / num_items` with r = x / scale, and h(d) = d² / 2β where |d| < β, else |d| − β / 2
(Huber 1964, divided by β; Girshick 2015). It depends on the basis: the teacher's own components are compared, which
takes one rotation of the targets.
"""

import torch
from torch import Tensor

from ...errors import KDError
from ..arithmetic import check_student, coordinates_of, dot, per_item, wants_gradient, with_gradients
from ..targets import HiddenTargets

INPUTS = "states"
PROJECTOR = True
SEGMENTS = False
DENSE = True


def loss(
    student: Tensor, teacher: HiddenTargets | Tensor, num_items: float | Tensor | None = None, *, beta: float = 1.0
) -> Tensor:
    """student `[N, W]`: vectors in the space of the teacher's own components. teacher: N states, or states divided by
    their scale as a tensor. Returns a 0-d tensor; see `FeatureLoss`. Memory: two float32 `[N, W]`; one, the gradient,
    is kept."""
    check_student(student, teacher, same_width=True)
    width = student.shape[1]
    if not beta > 0:
        raise KDError(f"beta: got {beta!r}; expected a positive number.")
    with torch.no_grad():
        r = coordinates_of(teacher, torch.promote_types(student.dtype, torch.float32), dense=True)
        difference = r.neg_().add_(student.detach())
        gradient = (difference / beta).clamp_(-1, 1)
        total = (dot(gradient, difference) - beta / 2 * dot(gradient, gradient)) / width
        del difference, r
    if wants_gradient(student):
        total = with_gradients(total, [student], [gradient.div_(width)])
    return per_item(total, len(student), num_items)


def oracle(
    student: Tensor, teacher: HiddenTargets | Tensor, num_items: float | Tensor | None = None, *, beta: float = 1.0
) -> Tensor:
    if isinstance(teacher, HiddenTargets):
        target = teacher.states(dtype=student.dtype) / teacher.scales(dtype=student.dtype)[:, None]
    else:
        target = teacher
    d = (student - target).abs()
    h = torch.where(d < beta, d**2 / (2 * beta), d - beta / 2)
    return h.mean(1).sum() / (len(student) if num_items is None else num_items)
