"""What the losses share: normalisation by the global count, checks of rows, and gradients computed in the forward."""

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments import describe, is_number, refuse_dtensor
from ..errors import KDError
from ..fields import FLOATS
from .targets import HiddenTargets


def accumulator(x: Tensor) -> torch.dtype:
    """The type that a loss of such a tensor is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_item(total: Tensor, rows: int, num_items: float | Tensor | None) -> Tensor:
    """A sum over rows divided by num_items; by the rows themselves where it is None. 0 items are as 1: a step without
    any has a loss of 0."""
    items: Any = rows if num_items is None else num_items
    if not is_number("num_items", items):
        return total / torch.where(items > 0, items, 1)
    if not 0 <= items < inf:
        raise KDError(f"num_items: got {items}; expected a count.")
    return total / (items or 1)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *inputs_and_gradients: Tensor) -> Tensor:
        half = len(inputs_and_gradients) // 2
        ctx.types = [x.dtype for x in inputs_and_gradients[:half]]
        ctx.save_for_backward(*inputs_and_gradients[half:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        # multiplied in the gradients' type and rounded once, without a copy in between
        scaled = [
            torch.mul(g, upstream) if g.dtype == dtype else torch.mul(g, upstream, out=torch.empty_like(g, dtype=dtype))
            for g, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        ]
        return None, *scaled, *[None] * len(scaled)


def with_gradients(loss: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """A loss with known gradients in its inputs, which only the backward scales. It has no second derivatives."""
    pairs = [(x, g) for x, g in zip(inputs, gradients, strict=True) if x.requires_grad]
    attached: Tensor = _WithGradients.apply(  # type: ignore[no-untyped-call]
        loss, *(x for x, _ in pairs), *(g for _, g in pairs)
    )
    return attached


def wants_gradient(student: Tensor) -> bool:
    return torch.is_grad_enabled() and student.requires_grad


def check_student(student: Any, teacher: Any, *, same_width: bool) -> None:
    """Raise KDError unless the teacher is HiddenTargets or a tensor, and the student has a vector for each row, of the
    same width if that is needed."""
    if not isinstance(teacher, HiddenTargets) and (not isinstance(teacher, Tensor) or teacher.ndim != 2):
        raise KDError(f"teacher: got {describe(teacher)}; expected HiddenTargets or a tensor (rows, components).")
    if not isinstance(student, Tensor) or student.ndim != 2 or student.dtype not in FLOATS:
        raise KDError(f"student: got {describe(student)}; expected a floating-point tensor (rows, components).")
    refuse_dtensor("student", student)
    rows, width = len(teacher), teacher.width if isinstance(teacher, HiddenTargets) else teacher.shape[1]
    if student.shape[0] != rows:
        raise KDError(f"student: got {student.shape[0]} rows for {rows} rows of the teacher; expected one for each.")
    if same_width and student.shape[1] != width:
        raise KDError(
            f"student: got vectors of {student.shape[1]} components, and the teacher's have {width}; expected a "
            "projector between them."
        )


def coordinates_of(teacher: HiddenTargets | Tensor, dtype: torch.dtype, *, dense: bool = False) -> Tensor:
    """The coordinates of hidden targets `[N, W]`, or their states divided by their scale if `dense`; a tensor's own
    values. A tensor that may be written into."""
    if isinstance(teacher, HiddenTargets):
        return teacher.units(dtype=dtype) if dense else teacher.coordinates(dtype=dtype)
    return teacher.detach().to(dtype, copy=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of all elements."""
    return torch.dot(a.flatten(), b.flatten())
