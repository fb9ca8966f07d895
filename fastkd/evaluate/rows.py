"""The measures of each position: of a student's logits, and of the teacher's cached row. See `measures.py`."""

import math

import torch
from torch import Tensor

from ..kernels import SparseTargets
from ..kernels.loss.reference import cross_entropy_rows, divergence_rows

Rows = dict[str, Tensor]
_CHUNK = 2**24  # numbers in a chunk of the logits


def student_rows(logits: Tensor, targets: SparseTargets, labels: Tensor) -> Rows:
    """The measures of each row, `[m]` float32, and `confidence`, the probability of the best token.

    logits `[m, V']` with V' >= the teacher's vocabulary, targets of the same m rows, labels `[m]`.
    """
    size = max(1, _CHUNK // logits.shape[1])
    parts = [
        _student_rows(logits[i : i + size].float(), targets[i : i + size], labels[i : i + size])
        for i in range(0, len(logits), size)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _student_rows(z_CV: Tensor, targets: SparseTargets, labels: Tensor) -> Rows:
    top, best = z_CV.max(1)
    found = {
        "cross_entropy": cross_entropy_rows(z_CV, labels),
        "accuracy": (best == labels).float(),
        "confidence": (top - z_CV.logsumexp(1)).exp(),
    }
    if _is_top_k(targets).any():
        best_entries, _ = _best(targets)
        found["agreement"] = (best_entries & (targets.ids == best[:, None])).any(1).float()
        found["kl_bucket"] = _kl(z_CV, targets, "bucket")
    if targets.draws is not None:
        found["kl_sampled"] = _kl(z_CV, targets, "sampled")
    return found


def teacher_rows(targets: SparseTargets, labels: Tensor) -> Rows:
    """What a cache knows of the teacher's measures, `[m]` float32 each; labels `[m]`. None without a teacher."""
    if not targets.width:
        return {}
    used, top_k = targets.logprobs > -math.inf, _is_top_k(targets)
    log_tail = targets.tail[:, targets.temperatures.index(1.0)].float()
    log_tail = log_tail.masked_fill(targets.outcomes == 0, -math.inf)
    at_label = (used & (targets.ids == labels[:, None])).float()
    known = at_label.any(1)
    least = targets.logprobs.float().masked_fill(~top_k, 0.0).amin(1) if used.shape[1] else log_tail
    exact = (at_label * targets.logprobs.float().masked_fill(~used, 0.0)).sum(1)
    found = {
        "label_known": known.float(),
        "cross_entropy_at_least": -torch.where(known, exact, torch.minimum(log_tail, least)),
        "tail_mass": log_tail.exp(),
    }
    if top_k.any():
        best, value = _best(targets)
        found["accuracy"] = (best & (targets.ids == labels[:, None])).float().sum(1) / best.sum(1)
        found["confidence"] = value.float().exp()
        q = targets.logprobs.float().masked_fill(~top_k, -math.inf)
        of_top_k, of_tail = -_plogp(q).sum(1), -_plogp(log_tail)
        spread = targets.outcomes.clamp(min=1).float().log()
        found["entropy_at_least"] = of_top_k + of_tail
        found["entropy_at_most"] = of_top_k + of_tail + log_tail.exp() * spread
    if targets.draws is not None:
        at = targets.at(1.0, "sampled")
        drawn = -(at.weights * at.log_q.masked_fill(at.weights == 0, 0.0)).sum(1)
        found["entropy_sampled"] = drawn - _plogp(at.log_q_tail)
    return found


def _kl(z_CV: Tensor, targets: SparseTargets, treatment: str) -> Tensor:
    return divergence_rows(z_CV, targets.ids, targets.at(1.0, treatment), "forward_kl", 0.0)


def _is_top_k(targets: SparseTargets) -> Tensor:
    """Which of the entries are top-k entries, `[m, K]` bool. In a cache all rows have some, or none has."""
    used = targets.logprobs > -math.inf
    return used if targets.draws is None else used & (targets.draws == 0)


def _best(targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """Which of the entries are the teacher's best, `[m, K]` bool, and their log-probability `[m]`."""
    exact = targets.logprobs.masked_fill(~_is_top_k(targets), -math.inf)
    value = exact.amax(1)
    return exact == value[:, None], value


def _plogp(log_q: Tensor) -> Tensor:
    return log_q.exp() * log_q.masked_fill(log_q == -math.inf, 0.0)
