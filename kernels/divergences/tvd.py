"""Total variation distance: ½ Σ |q - p|. Where q = p, the derivative is taken as 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._arithmetic import Tensor, tl

PARAMETER = None
TREATMENTS = ("bucket",)


def torch_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    q, p = log_q.exp(), log_p.exp()
    return 0.5 * (q - p).abs(), p * (q - p).sign() * -0.5


def triton_terms(weight, log_q, log_p, parameter):  # type: ignore[no-untyped-def]
    q, p = tl.exp(log_q), tl.exp(log_p)
    return 0.5 * tl.abs(q - p), p * tl.where(q > p, -0.5, tl.where(q < p, 0.5, 0.0))


def oracle_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, parameter: float) -> Tensor:
    return 0.5 * (log_q.exp() - log_p.exp()).abs()
