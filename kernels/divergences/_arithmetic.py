"""Arithmetic on tensors that the divergences share: products and differences of probabilities and their logarithms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `tl` and `tm` are there where a divergence's triton_terms are compiled
    import triton.language as tl
    from torch import Tensor

    from .. import triton_math as tm

    __all__ = ["Tensor", "tl", "tm"]

_INF = math.inf


def times(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, and 0 where the weight is 0, whatever x is."""
    return (weight * x).where(weight != 0, 0.0)


def log_mix(log_q: Tensor, log_p: Tensor, share: float) -> Tensor:
    """log(share * q + (1 - share) * p)."""
    return (log_q + math.log(share)).logaddexp(log_p + math.log(1 - share))


def differentiable_times(weight: Tensor, x: Tensor) -> Tensor:
    """`times`, whose gradient is 0, and not NaN, where the weight is 0."""
    zero = weight == 0
    return weight.masked_fill(zero, 0.0) * x.masked_fill(zero, 0.0)


def differentiable_difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b, where −inf − (−inf) is 0: such terms have weight 0."""
    both = (a == -_INF) & (b == -_INF)
    return a.masked_fill(both, 0.0) - b.masked_fill(both, 0.0)


def differentiable_log_mix(log_q: Tensor, log_p: Tensor, share: float) -> Tensor:
    """`log_mix`, whose gradient is 0, and not NaN, where both are −inf."""
    both = (log_q == -_INF) & (log_p == -_INF)
    return log_mix(log_q.masked_fill(both, 0.0), log_p.masked_fill(both, 0.0), share).masked_fill(both, -_INF)
