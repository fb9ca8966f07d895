"""Value and gradient of every divergence over a support and a tail outcome, in PyTorch.

Every divergence has the form `Σ_S f_k(p_k) + f_t(p_t)`. With b = f' and b̄ = Σ_S p_k b_k + p_t b_t the gradient in
u = z/T is `p_k (b_k - b̄)` on S, and off S the student's share of the tail, `p_j / p_t`, times `p_t (b_t - b̄)`. So a
divergence is settled by its K + 1 outcomes; what is left is one sweep over the vocabulary.
"""

import math

import torch
from torch import Tensor

from .targets import TargetsAt

_INF = float("inf")


def outcome_terms(
    divergence: str, mix: float, at: TargetsAt, log_p_CK: Tensor, log_p_tail_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence `[C]`, gradient in u on the support `[C, K]`, and the tail outcome's `p_t (b_t - b̄)` `[C]`.

    log_p `[C, K]` and log_p_tail `[C]` are the student's. `mix` is β of the generalised Jensen-Shannon divergence
    (M = βq + (1-β)p) or λ of the skewed KL divergence (M = λq + (1-λ)p). Places outside S get 0, and so does a whole
    row without support.
    """
    in_support = at.log_q > -_INF
    has_support = in_support.any(1)
    log_q = torch.cat([at.log_q, at.log_q_tail[:, None]], 1)
    log_p = torch.cat([log_p_CK.masked_fill(~in_support, -_INF), log_p_tail_C[:, None]], 1)
    p = log_p.exp()
    q = log_q.exp()
    if divergence == "forward_kl":
        w = torch.cat([at.weights, q[:, -1:]], 1)
        value = _times(w, log_q - log_p).sum(1)
        slope = -w
    elif divergence == "reverse_kl":
        slope = _times(p, log_p - log_q)
        value = slope.sum(1)
    elif divergence == "tvd":
        value = 0.5 * (q - p).abs().sum(1)
        slope = p * torch.sign(q - p) * -0.5
    else:
        log_m = torch.logaddexp(log_q + math.log(mix), log_p + math.log(1 - mix))
        if divergence == "skew_kl":
            value = _times(q, log_q - log_m).sum(1)
            slope = -(1 - mix) * _times(q, (log_p - log_m).exp())
        else:
            p_over_m = _times(p, log_p - log_m)
            value = (mix * _times(q, log_q - log_m) + (1 - mix) * p_over_m).sum(1)
            slope = (1 - mix) * p_over_m
    mean_slope = slope.sum(1)
    gradient = slope - p * mean_slope[:, None]
    value = torch.where(has_support, value, 0.0)
    gradient = torch.where(has_support[:, None], gradient, 0.0)
    refused = at.log_q_tail.isnan()
    return value.masked_fill(refused, torch.nan), gradient[:, :-1] * in_support, gradient[:, -1]


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x where 0 * ±inf, and 0 * NaN, is 0."""
    return torch.where(weight == 0, 0.0, weight * x)
