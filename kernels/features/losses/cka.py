"""One minus the linear CKA of the student's and the teacher's states (Kornblith et al. 2019).

`1 − ‖Zᵀ S‖² / (‖Sᵀ S‖ ‖Zᵀ Z‖)`, Frobenius norms, of columns without their mean over the N rows of a call. The rows of
both are states divided by their root mean square: a few huge ones (attention sinks) would decide otherwise. Widths
may differ, and there is no projector; it is the same in any orthonormal basis. It is a statistic of a batch and no
sum over rows: that of a call counts N / num_items. With fewer rows than components it is near 0 for any pair; use
large micro-batches.
"""

import torch
from torch import Tensor

from ...autocast import without_autocast
from ..arithmetic import accumulator, check_student, coordinates_of, per_item, wants_gradient, with_gradients
from ..basis import rms
from ..targets import HiddenTargets

INPUTS = "states"
PROJECTOR = False
SEGMENTS = False


def loss(student: Tensor, teacher: HiddenTargets | Tensor, num_items: float | Tensor | None = None) -> Tensor:
    """student `[N, D]`, of any D. teacher: N states, or their coordinates as a tensor. Returns a 0-d tensor; see
    `FeatureLoss`. Constant states have a loss of 1 and no gradient. Memory: float32 copies of both, the gradient, and
    matrices of components."""
    check_student(student, teacher, same_width=False)
    rows = len(student)
    if not rows:
        return student.sum()
    wanted, dtype = wants_gradient(student), accumulator(student)
    with torch.no_grad(), without_autocast(student.device):
        z, x = coordinates_of(teacher, dtype), student.detach().to(dtype)
        scale = rms(x)[:, None]
        scale = torch.where(scale > 0, scale, 1.0)
        unit = x / scale
        z, s = z - z.mean(0), unit - unit.mean(0)
        cross, own = z.T @ s, s.T @ s
        own_norm, z_norm = own.norm(), (z.T @ z).norm()
        norms = torch.where(own_norm * z_norm > 0, own_norm * z_norm, 1.0)
        value = cross.square().sum() / norms
        total = (1 - value) * rows
        if wanted:
            # d value = 2 z cross / norms - 2 value s own / ‖own‖², whose columns have no mean; then through the scale
            gradient = z @ cross.mul_(-2 * rows / norms)
            gradient.addmm_(s, own.mul_(2 * rows * value / torch.where(own_norm > 0, own_norm**2, 1.0)))
            gradient.addcmul_(unit, (gradient * unit).mean(1, keepdim=True), value=-1).div_(scale)
    if wanted:
        total = with_gradients(total, [student], [gradient])
    return per_item(total, rows, num_items)


def oracle(student: Tensor, teacher: HiddenTargets | Tensor, num_items: float | Tensor | None = None) -> Tensor:
    """The same by its definition, as the alignment of two centered kernels."""
    target = teacher.states(dtype=student.dtype) if isinstance(teacher, HiddenTargets) else teacher
    if isinstance(teacher, HiddenTargets):
        target = target / teacher.scales(dtype=student.dtype)[:, None]
    student, rows = student / student.square().mean(1, keepdim=True).sqrt(), len(student)
    centering = torch.eye(rows, dtype=student.dtype) - 1 / rows
    k, m = (centering @ (x @ x.T) @ centering for x in (student, target))
    value = (k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()
    return (1 - value) * rows / (rows if num_items is None else num_items)
