# mypy: allow-untyped-decorators
"""KL divergence of attention maps, in blocks of query rows: maps of a whole batch are never held.

The forward computes the gradients too, so that nothing of a block is kept for the backward.
"""

from math import gcd

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..errors import KDError
from .arithmetic import accumulator, with_gradients
from .attention import KeyHeads, QueriesKeysValues, mask_of
from .segments import Segments


@torch.compiler.disable
def map_divergence(
    student: QueriesKeysValues,
    teacher: QueriesKeysValues,
    segments: Segments,
    *,
    causal: bool,
    block: int | None = None,
) -> Tensor:
    """`Σ_i mean_h KL(teacher's map of query i || student's)`, 0-d, differentiable in the student's queries and keys.

    Where the layers have other numbers of heads, C = gcd of both: heads are averaged in C groups of consecutive heads,
    and the means are compared. block: numbers `[heads, queries, keys]` in a block of maps; None: by device.
    """
    for name, layer in (("student", student), ("teacher", teacher)):
        layer.check(name)
        if len(layer.queries) != len(segments):
            got = f"{len(layer.queries)} rows of the {name} and segments of {len(segments)} rows"
            raise KDError(f"attention: got {got}; expected the same positions in both.")
    queries, keys, device = student.queries, student.keys, student.queries.device
    dtype = accumulator(queries)
    wanted = torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)
    groups = gcd(student.heads, teacher.heads)
    with torch.no_grad(), without_autocast(device):
        of_student, of_teacher = KeyHeads(student, dtype), KeyHeads(teacher, dtype)
        visible = segments.visible(causal, device)
        total = torch.zeros((), dtype=dtype, device=device)
        grad_q = torch.empty(queries.shape if wanted else 0, dtype=dtype, device=device)
        grad_k = torch.zeros_like(of_student.keys_GNd) if wanted else grad_q
        for b in segments.blocks(max(student.heads, teacher.heads), causal, device, block):
            mask = mask_of(b, visible)
            log_q = _mean_of_groups(of_teacher.log_maps(of_teacher.queries_of(b), b, mask)[0], groups)
            scaled = of_student.queries_of(b)
            log_heads, slope = of_student.log_maps(scaled, b, mask)
            log_p = _mean_of_groups(log_heads, groups)
            q = log_q.exp()
            total += torch.dot(q.flatten(), log_q.sub_(log_p).flatten())
            if not wanted:
                continue
            if log_p is log_heads:
                gradient = log_p.exp_().sub_(q)
            else:  # KL depends on the mean of some heads: its derivative in the mean is -q / p
                by_group = -(q / log_p.exp())
                p = log_heads.exp_().view(groups, -1, *q.shape[1:])
                gradient = by_group[:, None] - (p * by_group[:, None]).sum(-1, keepdim=True)
                gradient = gradient.mul_(p).div_(p.shape[1]).flatten(0, 1)
            if slope is not None:
                gradient.mul_(slope)
            gradient = gradient.div_(groups).view(*scaled.shape[:2], -1)
            heads = (gradient @ of_student.keys_GNd[:, b.first : b.last]).mul_(of_student.scale)
            heads = heads.view(of_student.groups, -1, b.stop - b.start, heads.shape[-1])
            grad_q[b.start : b.stop] = heads.permute(2, 0, 1, 3).flatten(1, 2)
            grad_k[:, b.first : b.last] += gradient.transpose(1, 2) @ scaled
        total /= groups
    if not wanted:
        return total
    if queries is keys:  # one gradient is kept
        return with_gradients(total, [queries], [grad_q.add_(grad_k.transpose(0, 1))])
    return with_gradients(total, [queries, keys], [grad_q, grad_k.transpose(0, 1)])


def _mean_of_groups(log_maps_HQK: Tensor, groups: int) -> Tensor:
    """The logarithm of maps averaged over groups of heads `[C, Q, K]`; the same tensor where each head is a group."""
    if len(log_maps_HQK) == groups:
        return log_maps_HQK
    maps = log_maps_HQK.exp().view(groups, -1, *log_maps_HQK.shape[1:]).mean(1)
    return maps.clamp_(min=torch.finfo(maps.dtype).tiny).log_()


def whole_maps(logits_HQK: Tensor, causal: bool) -> Tensor:
    """The softmax of a segment's logits over the keys that each query sees, for the oracles."""
    if causal:
        hidden = torch.ones_like(logits_HQK[0], dtype=torch.bool).triu(1)
        logits_HQK = logits_HQK.masked_fill(hidden, -torch.inf)
    return logits_HQK.softmax(-1)


def kl_of_maps(q_HQK: Tensor, p_HQK: Tensor) -> Tensor:
    """`Σ_i mean_h KL(q || p)` of whole maps, for the oracles: 0 for keys that a query does not see."""
    tiny = torch.finfo(p_HQK.dtype).tiny
    return (q_HQK * (q_HQK.clamp(min=tiny).log() - p_HQK.clamp(min=tiny).log())).sum((1, 2)).mean()
