"""The loss of a block of rows in pure PyTorch: one work buffer, gradients in the forward, no autograd graph."""

import torch
from torch import Tensor

from ..divergences import find_divergence
from ..targets import TargetsAt
from .call import Call
from .checks import check_student
from .outcomes import outcome_terms

_INF = float("inf")


def loss_rows_(
    x_CV: Tensor,
    call: Call,
    at: TargetsAt,
    scale: Tensor,
    scratch: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float | None = None,
    want_grad: bool = True,
    first_row: int = 0,
    what: str = "logits",
) -> tuple[Tensor, Tensor]:
    """Hard and soft loss of each row (`[C]`, before alpha and the divisor); x becomes the gradient of the total.

    x `[C, V]` float32 or float64: raw logits, a contiguous buffer of the caller's to overwrite. call: by row, C rows.
    at: the teacher of these rows at the call's temperature. scratch: any tensor of x's type, grown and kept for later.
    scale `[]`: what the gradient of each row's loss is multiplied by. Rows that do not count get 0 everywhere.
    """
    (alpha, t), config = call.numbers(), call.config
    counted = call.counted()
    row_weight = torch.ones_like(x_CV[:, 0]) if call.weights is None else call.weights.to(x_CV.dtype)
    row_weight = row_weight.masked_fill(~counted, 0.0)

    uncapped = None
    if logit_scale is not None:
        x_CV.mul_(logit_scale)
    if softcap is not None:
        masked = x_CV == -_INF
        capped = torch.tanh(x_CV / softcap)
        torch.mul(capped, softcap, out=x_CV).masked_fill_(masked, -_INF)
        uncapped = capped.square_().neg_().add_(1.0)  # d softcap(z) / dz
        del masked, capped

    in_support = at.log_q > -_INF
    # An unused place may hold anything. It points at the row's first entry of S, so that it marks nothing of its own.
    ids = call.ids.long().masked_fill(~in_support, 0)
    if ids.shape[1]:
        ids = torch.where(in_support, ids, ids.gather(1, in_support.int().argmax(1, keepdim=True)))
    z_CK = x_CV.gather(1, ids)
    label = None
    if call.labels is not None:
        label = call.labels.long().masked_fill(~counted, 0)[:, None]
        z_label = x_CV.gather(1, label)[:, 0]
    # With S taken out, the reduction gives the mass off S itself: 1 - Σ_S p has no digits where the student is certain.
    x_CV.scatter_(1, ids, torch.where(in_support.any(1, keepdim=True), -_INF, z_CK))

    z_CK = z_CK.masked_fill(~in_support, -_INF)
    m_off = x_CV.amax(1)
    m_ref = torch.where(m_off == -_INF, 0.0, m_off)
    m = torch.cat([m_off[:, None], z_CK], 1).amax(1)
    if t == 2.0:  # (z - m) / 2 in one pass, exact, since the halves are
        torch.add(-0.5 * m_ref[:, None], x_CV, alpha=0.5, out=x_CV)
    else:
        x_CV.sub_(m_ref[:, None])
    if t == 1.0:
        tempered = x_CV.exp_()
        s_off_t = s_off_1 = tempered.sum(1)
    elif t == 2.0:  # e^z is the square of e^(z/2)
        tempered = x_CV.exp_()
        s_off_t = tempered.sum(1)
        s_off_1 = torch.linalg.vector_norm(tempered, dim=1).square_()
    else:
        tempered = torch.div(x_CV, t, out=_like(scratch, x_CV)).exp_()
        s_off_t = tempered.sum(1)
        s_off_1 = x_CV.exp_().sum(1)

    shift = torch.where(m_off == -_INF, -_INF, m_off - m)  # −inf where S is the whole vocabulary
    e_CK = (z_CK - m[:, None]).exp()
    s_1 = s_off_1 * shift.exp() + e_CK.sum(1)
    s_t = s_off_t * (shift / t).exp() + ((z_CK - m[:, None]) / t).exp().sum(1)
    log_s_t = s_t.log()
    log_p_tail = s_off_t.log() + shift / t - log_s_t
    log_p = (z_CK - m[:, None]) / t - log_s_t[:, None]
    check_student(counted & ~(m + s_1.log()).isfinite(), what, first_row)

    divergence, on_support, off_support = outcome_terms(
        find_divergence(config.divergence), config.parameter, at, log_p, log_p_tail
    )
    soft = t * t * divergence * row_weight
    if call.labels is None:
        hard, alpha = torch.full_like(soft, torch.nan), 0.0
    else:
        hard = (s_1.log() - (z_label - m)) * row_weight
    hard, soft = hard.masked_fill_(~counted, 0.0), soft.masked_fill_(~counted, 0.0)
    if not want_grad:
        return hard, soft

    row_scale = row_weight * scale
    hard_scale = alpha * row_scale
    # a factor of exactly 0 means that the part is not wanted: 0 * inf must not make it NaN
    soft_scale = (1.0 - alpha) * t * row_scale
    a = hard_scale * shift.exp() / s_1
    b = torch.where((soft_scale == 0) | (s_off_t == 0), 0.0, soft_scale * off_support / s_off_t)
    if t == 1.0:
        x_CV.mul_((a + b)[:, None])
    elif t == 2.0:
        # two binary operations: addcmul does not vectorise over what is broadcast
        x_CV.mul_(torch.mul(tempered, a[:, None], out=_like(scratch, x_CV)).add_(b[:, None]))
    else:
        x_CV.mul_(a[:, None]).addcmul_(tempered, b[:, None])

    hard_CK = hard_scale[:, None] * (e_CK / s_1[:, None])
    soft_CK = torch.where(soft_scale[:, None] == 0, 0.0, soft_scale[:, None] * on_support)
    if label is not None:
        x_CV.scatter_add_(1, label, -hard_scale[:, None])
        hard_CK = hard_CK - hard_scale[:, None] * (ids == label)
    entries = torch.where(in_support, hard_CK + soft_CK, 0.0)
    if ids.shape[1]:
        # places outside S repeat the first entry of S, and so does what they write
        entries = torch.where(in_support, entries, entries.gather(1, in_support.int().argmax(1, keepdim=True)))
        supported = in_support.any(1, keepdim=True)
        x_CV.scatter_(1, ids, torch.where(supported, entries, x_CV.gather(1, ids)))
    if uncapped is not None:
        x_CV.mul_(uncapped)
    if logit_scale is not None:
        x_CV.mul_(logit_scale)
    if not bool(counted.all()):
        x_CV.masked_fill_(~counted[:, None], 0.0)
    return hard, soft


def _like(scratch: Tensor, x_CV: Tensor) -> Tensor:
    """Memory of x's shape out of `scratch`: a fresh buffer a block would cost a page fault for every 4 kB."""
    if scratch.numel() < x_CV.numel():
        scratch.resize_(x_CV.numel())
    return scratch[: x_CV.numel()].view(x_CV.shape)
