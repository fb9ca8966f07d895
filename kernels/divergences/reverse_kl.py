"""Reverse KL divergence: Σ p log(p / q)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._arithmetic import differentiable_difference, differentiable_times, times

if TYPE_CHECKING:
    from ._arithmetic import Tensor, tl, tm

PARAMETER = None
TREATMENTS = ("bucket",)


def torch_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    term = times(log_p.exp(), log_p - log_q)
    return term, term


def triton_terms(weight, log_q, log_p, parameter):  # type: ignore[no-untyped-def]
    term = tm.times(tl.exp(log_p), log_p - log_q)
    return term, term


def oracle_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, parameter: float) -> Tensor:
    return differentiable_times(log_p.exp(), differentiable_difference(log_p, log_q))
