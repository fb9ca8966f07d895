"""Attention transfer: where in an image the activations are large (Zagoruyko & Komodakis 2017).

With Q the mean of squares over channels of each pixel, flattened, `Σ_e ‖Q^S_e / ‖Q^S_e‖ − Q^T_e / ‖Q^T_e‖‖²` over the
examples e, divided by their number in the whole step (num_items / vectors of an example). Channels may differ, and
there is no projector. A student's Q of another size is resized by average pooling. The teacher's is stored (maps `(H,
W)`), or follows from the scale and coordinates of its pixels.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..arithmetic import accumulator, per_item
from ..maps import examples_of, resized, student_maps
from ..targets import HiddenTargets

INPUTS = "maps"
PROJECTOR = False
SEGMENTS = False


def loss(
    student: Tensor, teacher: HiddenTargets, num_items: float | Tensor | None = None, *, shape: tuple[int, ...]
) -> Tensor:
    """student `[B, C', H', W']`. shape: of the teacher's value, (C, H, W) or (H, W). Returns a 0-d tensor; see
    `FeatureLoss`."""
    dtype, (vectors, _) = accumulator(student), examples_of(teacher, shape)
    maps = student_maps(student, teacher, shape, channels=False)
    ours = resized(maps.to(dtype).square().mean(1, keepdim=True), shape[-2:]).flatten(1)
    with torch.no_grad():
        if len(shape) == 2:
            theirs = teacher.units(dtype=dtype)
        else:
            energy = teacher.coordinates(dtype=dtype).square().mean(1) * teacher.scales(dtype=dtype).square()
            theirs = energy.view(-1, vectors)
        theirs = normalize(theirs, dim=1)
    return per_item((normalize(ours, dim=1) - theirs).square().sum() * vectors, len(teacher), num_items)


def oracle(
    student: Tensor, teacher: HiddenTargets, num_items: float | Tensor | None = None, *, shape: tuple[int, ...]
) -> Tensor:
    x = teacher.states(dtype=student.dtype)
    vectors, examples = examples_of(teacher, shape)
    chosen = range(len(student)) if examples is None else examples.tolist()
    total = student.new_zeros(())
    for e, which in enumerate(chosen):
        own = resized(student[which][None].square().mean(1, keepdim=True), shape[-2:]).flatten()
        theirs = x[e] if len(shape) == 2 else x[e * vectors : (e + 1) * vectors].square().mean(1)
        total = total + (own / own.norm() - theirs / theirs.norm()).square().sum()
    return total * vectors / (len(teacher) if num_items is None else num_items)
