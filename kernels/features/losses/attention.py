"""KL divergence of a teacher's attention maps to a student's, of one layer each.

`Σ_i mean_h KL(A^T_{h,i} || A^S_{h,i}) / num_items` over query positions i (MiniLM, Wang et al. 2020). Both are computed
from queries and keys, in blocks of query rows. A query sees the rows of its own segment, up to itself if `causal`.

The layers may have different numbers of heads, H_S and H_T: with C = gcd(H_S, H_T), heads are averaged in C groups of
consecutive ones on each side, and the mean maps are compared. (A student's 4 heads are compared with the means of pairs
of a teacher's 8; of 3 and 4 heads only the means over all are.)
"""

from itertools import pairwise
from math import gcd

import torch
from torch import Tensor

from ..arithmetic import per_item
from ..attention import QueriesKeysValues
from ..map_divergence import kl_of_maps, map_divergence, whole_maps
from ..segments import Segments, check_segments

INPUTS = "attention"
PROJECTOR = False
SEGMENTS = True


def loss(
    student: QueriesKeysValues,
    teacher: QueriesKeysValues,
    num_items: float | Tensor | None = None,
    *,
    segments: Segments | None = None,
    causal: bool = True,
    block: int | None = None,
) -> Tensor:
    """student, teacher: queries and keys at the same N positions. segments: None: all rows are one. block: numbers in a
    block of maps `[heads, queries, keys]`; None: by device. Returns a 0-d tensor; see `FeatureLoss`. Where some
    positions of a segment have no row, both maps are over those that have one."""
    segments = check_segments(segments, len(student.queries))
    total = map_divergence(student, teacher, segments, causal=causal, block=block)
    return per_item(total, len(segments), num_items)


def oracle(
    student: QueriesKeysValues,
    teacher: QueriesKeysValues,
    num_items: float | Tensor | None = None,
    *,
    segments: Segments | None = None,
    causal: bool = True,
) -> Tensor:
    groups = gcd(student.heads, teacher.heads)
    total = student.queries.new_zeros(())
    for a, b in pairwise(segments.bounds if segments else (0, len(student.queries))):
        p, q = (_maps(layer, slice(a, b), causal, groups) for layer in (student, teacher))
        total = total + kl_of_maps(q, p)
    return total / (len(student.queries) if num_items is None else num_items)


def _maps(layer: QueriesKeysValues, rows: slice, causal: bool, groups: int) -> Tensor:
    """The maps of a segment, averaged over each group of heads `[C, n, n]`."""
    keys = layer.keys.repeat_interleave(layer.heads // layer.keys.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", layer.queries[rows], keys[rows]) * layer.logit_scale
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    return whole_maps(logits, causal).reshape(groups, -1, *logits.shape[1:]).mean(1)
