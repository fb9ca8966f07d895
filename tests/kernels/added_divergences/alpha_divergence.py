"""Alpha divergence: Σ (a q + (1 - a) p - q^a p^(1-a)) / (a (1 - a)). A file as it would lie in kernels/divergences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Parameter

if TYPE_CHECKING:
    import triton.language as tl
    from torch import Tensor

PARAMETER = Parameter("alpha", default=0.5, low=0.0, high=1.0)
TREATMENTS = ("bucket",)


def torch_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, a: float) -> tuple[Tensor, Tensor]:
    q, p, between = log_q.exp(), log_p.exp(), (a * log_q + (1 - a) * log_p).exp()
    return (a * q + (1 - a) * p - between) / (a * (1 - a)), (p - between) / a


def triton_terms(weight, log_q, log_p, a):  # type: ignore[no-untyped-def]
    q, p, between = tl.exp(log_q), tl.exp(log_p), tl.exp(a * log_q + (1.0 - a) * log_p)
    return (a * q + (1.0 - a) * p - between) / (a * (1.0 - a)), (p - between) / a


def oracle_terms(weight: Tensor, log_q: Tensor, log_p: Tensor, a: float) -> Tensor:
    return torch_terms(weight, log_q, log_p, a)[0]
