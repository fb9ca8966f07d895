"""Feature maps: which examples have targets, and the student's map in the size of the teacher's."""

from math import prod

import torch
from torch import Tensor

from ..arguments import describe
from ..errors import KDError
from ..fields import FLOATS
from .targets import HiddenTargets


def examples_of(targets: HiddenTargets, shape: tuple[int, ...]) -> tuple[int, Tensor | None]:
    """Vectors an example (H · W for maps `(C, H, W)`, 1 for attention-transfer maps `(H, W)`), and the examples that
    have targets, `[b]` int64; None: all. KDError if the targets are not of such maps."""
    if len(shape) not in (2, 3) or targets.width != (shape[0] if len(shape) == 3 else prod(shape)):
        raise KDError(
            f"shape: got {tuple(shape)} for targets of {targets.width} components; expected (C, H, W) with C of them, "
            "or (H, W) with H * W."
        )
    vectors = prod(shape[1:]) if len(shape) == 3 else 1
    if len(targets) % vectors:
        raise KDError(f"targets: got {len(targets)} rows; expected {vectors} for each example of maps {tuple(shape)}.")
    index = targets.index
    return vectors, None if index is None else torch.div(index[::vectors], vectors, rounding_mode="floor")


def student_maps(student: Tensor, targets: HiddenTargets, shape: tuple[int, ...], *, channels: bool) -> Tensor:
    """The student's maps `[b, C, H, W]` of the examples that have targets. channels: whether C must be as the
    teacher's."""
    if not isinstance(student, Tensor) or student.ndim != 4 or student.dtype not in FLOATS:
        raise KDError(f"student: got {describe(student)}; expected maps (examples, channels, height, width).")
    vectors, examples = examples_of(targets, shape)
    if channels and student.shape[1] != shape[0]:
        raise KDError(
            f"student: got maps of {student.shape[1]} channels, and the teacher's have {shape[0]}; expected a "
            "projector (a 1x1 convolution) between them."
        )
    if examples is None and len(student) * vectors != len(targets):
        raise KDError(
            f"student: got {len(student)} examples; expected {len(targets) // vectors}, those of the targets."
        )
    return student if examples is None else student[examples]


def resized(maps_bCHW: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps of another height and width, by average pooling of what lies in each pixel."""
    if tuple(maps_bCHW.shape[2:]) == tuple(size):
        return maps_bCHW
    return torch.nn.functional.adaptive_avg_pool2d(maps_bCHW, (size[0], size[1]))


def scaled_coordinates(targets: HiddenTargets, dtype: torch.dtype) -> Tensor:
    """The states in the orthonormal basis of their coordinates `[N, W]`, with their scale."""
    return targets.coordinates(dtype=dtype).mul_(targets.scales(dtype=dtype)[:, None])
