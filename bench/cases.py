"""Inputs for the benchmarks: an exactly known teacher, logits of students, and the loss in eager PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import SparseTargets

GRID = (1.0, 1.5, 2.0, 4.0)


def known_targets(
    n: int, v: int, k: int, draws: int, device: str, *, head_mass: float = 0.6, seed: int = 0
) -> SparseTargets:
    """Targets of k top-k entries over a uniform tail, whose log-partitions have a closed form."""
    g = torch.Generator(device=device).manual_seed(seed)
    entries = k + draws
    width = v // entries
    order = torch.rand(n, entries, generator=g, device=device).argsort(1)
    ids = order * width + torch.randint(width, (n, entries), generator=g, device=device)
    head = torch.randn(n, k, generator=g, device=device).mul_(2).sort(1, descending=True).values
    log_each = math.log((1 - head_mass) / (v - k))
    logprobs = torch.full((n, entries), log_each, device=device)
    logprobs[:, :k] = head.log_softmax(1) + math.log(head_mass)
    tail = torch.tensor([math.log(v - k) + log_each / t for t in GRID], device=device).expand(n, -1).contiguous()
    counts = torch.zeros(n, entries, dtype=torch.int32, device=device)
    counts[:, k:] = 1
    return SparseTargets(
        ids=ids.int(),
        logprobs=logprobs,
        tail=tail,
        outcomes=torch.full((n,), v - k, dtype=torch.int32, device=device),
        vocab_size=v,
        draws=counts if draws else None,
        temperatures=GRID,
    )


def student_logits(
    n: int, v: int, targets: SparseTargets | None, device: str, dtype: torch.dtype, *, certain: bool = False
) -> Tensor:
    """Logits `[n, v]` of an untrained student. certain: of one that puts most of its mass on the targets' entries."""
    g = torch.Generator(device=device).manual_seed(1)
    logits = torch.empty(n, v, device=device, dtype=dtype)
    for rows in torch.arange(n).split(1024):
        logits[rows[0] : rows[-1] + 1] = (torch.randn(len(rows), v, generator=g, device=device) * 2).to(dtype)
    if certain and targets is not None:
        logits.scatter_(1, targets.ids.long(), (targets.logprobs + 22.0).to(dtype))
    return logits


def eager_kd_loss(
    logits: Tensor, ids: Tensor, log_q: Tensor, log_q_tail: Tensor, labels: Tensor, alpha: float, t: float
) -> Tensor:
    """The same loss (forward KL, bucket) in plain PyTorch, in float32."""
    z = logits.float()
    hard = F.cross_entropy(z, labels)
    log_p = F.log_softmax(z / t, dim=-1)
    on = log_p.gather(1, ids)
    log_p_tail = torch.log1p(-on.exp().sum(1).clamp(max=1 - 1e-6))
    q, q_tail = log_q.exp(), log_q_tail.exp()
    soft = ((q * (log_q - on)).sum(1) + q_tail * (log_q_tail - log_p_tail)).mean() * t * t
    return alpha * hard + (1 - alpha) * soft
