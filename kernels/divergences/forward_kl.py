"""Forward KL divergence: Σ q log(q / p)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._arithmetic import differentiable_difference, differentiable_times, times

if TYPE_CHECKING:
    from ._arithmetic import Tensor, tm

PARAMETER = None
TREATMENTS = ("bucket", "sampled", "renormalize")


def torch_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    return times(weight, log_q - log_p), -weight


def triton_terms(weight, log_q, log_p, parameter):  # type: ignore[no-untyped-def]
    return tm.times(weight, log_q - log_p), -weight


def oracle_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, parameter: float) -> Tensor:
    return differentiable_times(weight, differentiable_difference(log_q, log_p))
