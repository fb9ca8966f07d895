"""One minus the cosine between a projected state of the student and a teacher's state.

`Σ_i (1 − cos(student_i, z_i)) / num_items` (as DistilBERT, Sanh et al. 2019). z are the coordinates of the states: the
cosine is the same in any orthonormal basis.
"""

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ...autocast import without_autocast
from ..arithmetic import check_student, coordinates_of, per_item, wants_gradient, with_gradients
from ..targets import HiddenTargets

INPUTS = "states"
PROJECTOR = True
SEGMENTS = False
SMALLEST = 1e-12
"""A norm below it counts as this much: the cosine of a zero vector is 0."""


def loss(student: Tensor, teacher: HiddenTargets | Tensor, num_items: float | Tensor | None = None) -> Tensor:
    """student `[N, W]`: vectors in the space of the teacher's coordinates. teacher: N states, or their coordinates as a
    tensor. Returns a 0-d tensor; see `FeatureLoss`. Memory: one float32 `[N, W]`, the gradient."""
    check_student(student, teacher, same_width=True)
    with torch.no_grad(), without_autocast(student.device):
        z = coordinates_of(teacher, torch.promote_types(student.dtype, torch.float32))
        s = student.detach().to(z.dtype)
        z.div_(z.norm(dim=1, keepdim=True).clamp_(min=SMALLEST))
        norm = s.norm(dim=1, keepdim=True).clamp_(min=SMALLEST)
        cosine = torch.linalg.vecdot(s, z)[:, None] / norm
        total = (1 - cosine).sum()
    if wants_gradient(student):
        # -(z - cos · s / ‖s‖) / ‖s‖, in the buffer of z
        total = with_gradients(total, [student], [z.neg_().addcmul_(s, cosine / norm).div_(norm)])
    return per_item(total, len(student), num_items)


def oracle(student: Tensor, teacher: HiddenTargets | Tensor, num_items: float | Tensor | None = None) -> Tensor:
    """The same against the states in the teacher's own components: the student's vectors are rotated there."""
    if isinstance(teacher, HiddenTargets):
        target = teacher.states(dtype=student.dtype)
        student = student @ teacher.basis.to(student.dtype).T
    else:
        target = teacher
    cosine = (student * target).sum(1) / (vector_norm(student, dim=1) * vector_norm(target, dim=1))
    total: Tensor = (1 - cosine).sum()
    return total / (len(student) if num_items is None else num_items)
