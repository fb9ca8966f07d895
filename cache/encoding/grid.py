"""Log-probabilities as small integers: a grid that is fine for large probabilities and coarse for small ones.

The step at a log-probability of −x nats is min(step·e^(growth·x), cap). Rounding changes an entry by at most half the
local step, which costs a divergence of about Σ p·step(x)²/24: a fine step matters where p is large.
"""

import math

import numpy as np
from numpy.typing import NDArray

LOWEST = -32768.0  # nats; lower log-probabilities are refused, so that the table of a grid stays small

_FLAT = 1e-4  # below it 1 − exp is too inexact in float32 (expm1 is slower)


def _bend(step: float, growth: float, cap: float) -> tuple[float, float]:
    """Where the step reaches the cap: in nats, and as a code."""
    if growth == 0 or step >= cap:
        return 0.0, 0.0
    x = math.log(cap / step) / growth
    return x, (1 - math.exp(-growth * x)) / (growth * step)


def codes_of(logprobs: NDArray[np.float32], step: float, growth: float, cap: float) -> NDArray[np.uint32]:
    """The code of each log-probability (nats, from LOWEST to 0), of the same shape. Non-increasing in the argument."""
    x = np.negative(logprobs, dtype=np.float32)
    np.maximum(x, 0, out=x)
    bend, _ = _bend(step, growth, cap)
    if bend == 0:
        x *= np.float32(1 / (cap if growth else step))
    else:
        beyond = np.subtract(x, np.float32(bend))
        np.maximum(beyond, 0, out=beyond)
        beyond *= np.float32(1 / cap)
        np.minimum(x, np.float32(bend), out=x)
        x *= np.float32(-growth)
        if growth * step < _FLAT:
            np.expm1(x, out=x)
            np.negative(x, out=x)
        else:
            np.exp(x, out=x)
            np.subtract(np.float32(1), x, out=x)
        x *= np.float32(1 / (growth * step))
        x += beyond
    return np.rint(x, out=x).astype(np.uint32)


def values_of(count: int, step: float, growth: float, cap: float) -> NDArray[np.float32]:
    """The log-probability of each code below `count`, float32 `[count]`."""
    code = np.arange(count, dtype=np.float64)
    bend, code_at_bend = _bend(step, growth, cap)
    if bend == 0:
        return (0 - code * (cap if growth else step)).astype(np.float32)
    near = np.minimum(code, code_at_bend)
    x = -np.log1p(-growth * step * near) / growth + np.maximum(code - code_at_bend, 0) * cap
    return (0 - x).astype(np.float32)


def steps_at(logprobs: NDArray[np.float64], step: float, growth: float, cap: float) -> NDArray[np.float64]:
    """The local step, in nats, at each log-probability, of the same shape: twice the largest rounding error."""
    if growth == 0:
        return np.full(np.shape(logprobs), step)
    return step * np.exp(np.clip(-growth * logprobs, 0, math.log(cap / step)))
