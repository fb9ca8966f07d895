"""Generalised Jensen-Shannon divergence, M = beta q + (1 - beta) p: beta KL(q ‖ M) + (1 - beta) KL(p ‖ M).

Agarwal et al., On-Policy Distillation of Language Models, 2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Parameter
from ._arithmetic import differentiable_difference, differentiable_log_mix, differentiable_times, log_mix, times

if TYPE_CHECKING:
    from ._arithmetic import Tensor, tl, tm

PARAMETER = Parameter("beta", default=0.5, low=0.0, high=1.0)
TREATMENTS = ("bucket",)


def torch_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m = log_mix(log_q, log_p, beta)
    of_p = times(log_p.exp(), log_p - log_m)
    return beta * times(log_q.exp(), log_q - log_m) + (1 - beta) * of_p, (1 - beta) * of_p


def triton_terms(weight, log_q, log_p, beta):  # type: ignore[no-untyped-def]
    log_m = tm.log_add(log_q + tl.log(beta), log_p + tl.log(1.0 - beta))
    of_p = tm.times(tl.exp(log_p), log_p - log_m)
    return beta * tm.times(tl.exp(log_q), log_q - log_m) + (1.0 - beta) * of_p, (1.0 - beta) * of_p


def oracle_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    log_m = differentiable_log_mix(log_q, log_p, beta)
    of_q, of_p = (differentiable_times(x.exp(), differentiable_difference(x, log_m)) for x in (log_q, log_p))
    return beta * of_q + (1 - beta) * of_p
