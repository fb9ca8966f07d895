"""Hints: mean squared error between a projected feature map of the student and the teacher's.

`Σ_p ‖student_p − x_p‖² / C / num_items` over the pixels p of all examples (FitNets, Romero et al. 2015). The
projector, a 1x1 convolution, maps into the space of the teacher's coordinates, where the error is the same: x is
scale · z there, and is not rotated back. A student's map of another size is resized by average pooling.
"""

import torch
from torch import Tensor

from ...errors import KDError
from ..arithmetic import dot, per_item, wants_gradient, with_gradients
from ..maps import resized, scaled_coordinates, student_maps
from ..targets import HiddenTargets

INPUTS = "maps"
PROJECTOR = True
SEGMENTS = False


def loss(
    student: Tensor, teacher: HiddenTargets, num_items: float | Tensor | None = None, *, shape: tuple[int, ...]
) -> Tensor:
    """student `[B, C, H', W']`: maps in the space of the teacher's coordinates. shape: (C, H, W) of the teacher's maps.
    Returns a 0-d tensor; see `FeatureLoss`."""
    pixels = _pixels(student, teacher, shape)
    with torch.no_grad():
        x = scaled_coordinates(teacher, torch.promote_types(student.dtype, torch.float32))
        difference = x.sub_(pixels.detach())
        total = dot(difference, difference) / teacher.width
    if wants_gradient(pixels):
        total = with_gradients(total, [pixels], [difference.mul_(-2 / teacher.width)])
    return per_item(total, len(teacher), num_items)


def _pixels(student: Tensor, teacher: HiddenTargets, shape: tuple[int, ...]) -> Tensor:
    if len(shape) != 3:
        raise KDError(f"shape: got {tuple(shape)}; expected that of feature maps, (C, H, W).")
    maps = resized(student_maps(student, teacher, shape, channels=True), shape[1:])
    return maps.flatten(2).transpose(1, 2).flatten(0, 1)


def oracle(
    student: Tensor, teacher: HiddenTargets, num_items: float | Tensor | None = None, *, shape: tuple[int, ...]
) -> Tensor:
    """The same against the teacher's own channels: the student's are rotated there."""
    pixels = _pixels(student, teacher, shape) @ teacher.basis.to(student.dtype).T
    total = (pixels - teacher.states(dtype=student.dtype)).square().mean(1).sum()
    return total / (len(teacher) if num_items is None else num_items)
