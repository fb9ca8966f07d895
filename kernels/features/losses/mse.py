"""Mean squared error between a projected state of the student and a teacher's state divided by its scale.

`Σ_i ‖student_i − z_i‖² / W / num_items` (as FitNets, Romero et al. 2015, for states). z are the coordinates of the
states: the error is the same in any orthonormal basis.
"""

import torch
from torch import Tensor

from ..arithmetic import check_student, coordinates_of, dot, per_item, wants_gradient, with_gradients
from ..targets import HiddenTargets

INPUTS = "states"
PROJECTOR = True
SEGMENTS = False


def loss(student: Tensor, teacher: HiddenTargets | Tensor, num_items: float | Tensor | None = None) -> Tensor:
    """student `[N, W]`: vectors in the space of the teacher's coordinates. teacher: N states, or their coordinates as a
    tensor. Returns a 0-d tensor; see `FeatureLoss`. Memory: one float32 `[N, W]`, the gradient."""
    check_student(student, teacher, same_width=True)
    width = student.shape[1]
    with torch.no_grad():
        z = coordinates_of(teacher, torch.promote_types(student.dtype, torch.float32))
        difference = z.sub_(student.detach())
        total = dot(difference, difference) / width
    if wants_gradient(student):
        total = with_gradients(total, [student], [difference.mul_(-2 / width)])
    return per_item(total, len(student), num_items)


def oracle(student: Tensor, teacher: HiddenTargets | Tensor, num_items: float | Tensor | None = None) -> Tensor:
    """The same against the states in the teacher's own components: the student's vectors are rotated there."""
    if isinstance(teacher, HiddenTargets):
        target = teacher.states(dtype=student.dtype) / teacher.scales(dtype=student.dtype)[:, None]
        student = student @ teacher.basis.to(student.dtype).T
    else:
        target = teacher
    return (student - target).square().mean(1).sum() / (len(student) if num_items is None else num_items)
