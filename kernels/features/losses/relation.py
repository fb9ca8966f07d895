"""KL divergence between relations of queries, of keys and of values, a teacher's and a student's, of one layer each.

MiniLMv2 (Wang et al. 2021): the concatenated heads A of each are divided into R relation heads of d_r components; with
`softmax(A_r A_rᵀ / √d_r)` of both, `Σ_i mean_r KL(teacher's row i || student's) / num_items`, and the mean over
queries, keys and values. Widths and numbers of attention heads may differ; R is the same on both sides. A row sees
all rows of its segment.
"""

from itertools import pairwise
from math import gcd

import torch
from torch import Tensor

from ...errors import KDError
from ..arithmetic import per_item
from ..attention import QueriesKeysValues, split_heads
from ..map_divergence import kl_of_maps, map_divergence, whole_maps
from ..segments import Segments, check_segments

INPUTS = "attention"
PROJECTOR = False
SEGMENTS = True
PARTS = ("queries", "keys", "values")


def loss(
    student: QueriesKeysValues,
    teacher: QueriesKeysValues,
    num_items: float | Tensor | None = None,
    *,
    segments: Segments | None = None,
    heads: int | None = None,
    causal: bool = False,
    block: int | None = None,
) -> Tensor:
    """student, teacher: queries, keys and maybe values at the same N positions; values are compared where both have
    them. heads: R; None: the most, up to the teacher's attention heads, that divide all widths. segments: None: all
    rows are in one. block: numbers in a block of relations; None: by device. Returns a 0-d tensor (`FeatureLoss`)."""
    parts = _parts(student, teacher)
    count = _relation_heads(parts, heads, teacher.heads)
    segments = check_segments(segments, len(student.queries))
    total = student.queries.new_zeros((), dtype=torch.float32)
    for pair in parts:
        a, b = (split_heads(x.flatten(1), count) for x in pair)
        of_student, of_teacher = (QueriesKeysValues(x, x) for x in (a, b))
        total = total + map_divergence(of_student, of_teacher, segments, causal=causal, block=block)
    return per_item(total / len(parts), len(segments), num_items)


def _parts(student: QueriesKeysValues, teacher: QueriesKeysValues) -> list[tuple[Tensor, Tensor]]:
    pairs = [(getattr(student, name), getattr(teacher, name)) for name in PARTS]
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _relation_heads(parts: list[tuple[Tensor, Tensor]], heads: int | None, most: int) -> int:
    widths = [x.shape[1] * x.shape[2] for pair in parts for x in pair]
    divisor = gcd(*widths)
    if heads is None:
        return max(r for r in range(1, most + 1) if divisor % r == 0)
    if heads < 1 or divisor % heads:
        raise KDError(f"heads: got {heads} relation heads for widths {widths}; expected a divisor of {divisor}.")
    return heads


def oracle(
    student: QueriesKeysValues,
    teacher: QueriesKeysValues,
    num_items: float | Tensor | None = None,
    *,
    segments: Segments | None = None,
    heads: int | None = None,
    causal: bool = False,
) -> Tensor:
    parts = _parts(student, teacher)
    count = _relation_heads(parts, heads, teacher.heads)
    total = student.queries.new_zeros(())
    for pair in parts:
        for a, b in pairwise(segments.bounds if segments else (0, len(student.queries))):
            p, q = (_relations(x[a:b].flatten(1), count, causal) for x in pair)
            total = total + kl_of_maps(q, p)
    return total / len(parts) / (len(student.queries) if num_items is None else num_items)


def _relations(a_NW: Tensor, heads: int, causal: bool) -> Tensor:
    a = split_heads(a_NW, heads).transpose(0, 1)
    return whole_maps(a @ a.transpose(1, 2) / a.shape[2] ** 0.5, causal)
