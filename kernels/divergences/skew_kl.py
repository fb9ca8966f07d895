"""Skewed KL divergence: KL(q ‖ skew q + (1 - skew) p).

Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models, 2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Parameter
from ._arithmetic import differentiable_difference, differentiable_log_mix, differentiable_times, log_mix, times

if TYPE_CHECKING:
    from ._arithmetic import Tensor, tl, tm

PARAMETER = Parameter("skew", default=0.1, low=0.0, high=1.0)
TREATMENTS = ("bucket",)


def torch_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    log_m, q = log_mix(log_q, log_p, skew), log_q.exp()
    return times(q, log_q - log_m), -(1 - skew) * times(q, (log_p - log_m).exp())


def triton_terms(weight, log_q, log_p, skew):  # type: ignore[no-untyped-def]
    log_m = tm.log_add(log_q + tl.log(skew), log_p + tl.log(1.0 - skew))
    q = tl.exp(log_q)
    return tm.times(q, log_q - log_m), -(1.0 - skew) * tm.times(q, tl.exp(log_p - log_m))


def oracle_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, skew: float) -> Tensor:
    log_m = differentiable_log_mix(log_q, log_p, skew)
    return differentiable_times(log_q.exp(), differentiable_difference(log_q, log_m))
