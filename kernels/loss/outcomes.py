"""Value and gradient of a divergence over the outcomes of a position, in PyTorch: the top-k entries, and the tail.

A divergence is a sum `Σ_S f(q_k, p_k) + f(q_tail, p_tail)`. With slope_k = p_k df/dp_k and their sum s, its gradient in
u = z/T is `slope_k - p_k s` on S; off S it is the student's share of the tail, `p_j / p_tail`, times
`slope_tail - p_tail s`. So the K + 1 outcomes determine everything, and one sweep over the vocabulary writes it.
"""

import torch
from torch import Tensor

from ..divergences import Divergence
from ..targets import TargetsAt

_INF = float("inf")


def outcome_terms(
    divergence: Divergence, parameter: float, at: TargetsAt, log_p_CK: Tensor, log_p_tail_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence `[C]`, gradient in u on the support `[C, K]`, and the tail's `slope - p s` `[C]`.

    log_p `[C, K]` and log_p_tail `[C]` are the student's. Entries outside the support S get 0, and so does a whole row
    without support. A row that the treatment cannot take has NaN.
    """
    in_support = at.log_q > -_INF
    has_support = in_support.any(1)
    log_q = torch.cat([at.log_q, at.log_q_tail[:, None]], 1)
    log_p = torch.cat([log_p_CK.masked_fill(~in_support, -_INF), log_p_tail_C[:, None]], 1)
    weight = torch.cat([at.weights, at.log_q_tail.exp()[:, None]], 1)
    term, slope = divergence.torch_terms(weight, log_q, log_p, parameter)
    gradient = slope - log_p.exp() * slope.sum(1)[:, None]
    value = torch.where(has_support, term.sum(1), 0.0)
    gradient = torch.where(has_support[:, None], gradient, 0.0)
    return value.masked_fill(at.log_q_tail.isnan(), torch.nan), gradient[:, :-1] * in_support, gradient[:, -1]
