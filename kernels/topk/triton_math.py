# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Functions on logits that the Triton kernels of top-k and draws share, in part equal to `draws.py` bit for bit."""

import triton
import triton.language as tl
from triton.language import constexpr

from ..triton_math import INF
from . import draws as dr

MINUS_2_LOG2E = constexpr(dr.MINUS_2_LOG2E)
C1, C2, C3 = constexpr(dr.C1), constexpr(dr.C2), constexpr(dr.C3)
C4, C5, C6 = constexpr(dr.C4), constexpr(dr.C5), constexpr(dr.C6)
LOWEST = constexpr(dr.LOWEST)
LOW31 = constexpr(2**31 - 1)
LEAST = constexpr(-(2**31))  # below every ordered logit


@triton.jit
def ordered(x):
    """float32 as an int32 that compares the same way; -0.0 is 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & LOW31)


@triton.jit
def unordered(key):
    """The float32 of an `ordered` int32."""
    return (key ^ ((key >> 31) & LOW31)).to(tl.float32, bitcast=True)


@triton.jit
def exp2_exact(y, SHIFT: constexpr):
    """`draws._exp2_`, operation by operation. Needs a launch without fused multiply-adds."""
    y = tl.where(y >= LOWEST, y, LOWEST)
    y = tl.where(y > 0.0, 0.0, y)
    whole = tl.floor(y + 0.5)
    f = y - whole
    p = f * C6
    p = (p + C5) * f
    p = (p + C4) * f
    p = (p + C3) * f
    p = (p + C2) * f
    p = (p + C1) * f
    p = p + 1.0
    power = ((whole.to(tl.int32) + (127 + SHIFT)) << 23).to(tl.float32, bitcast=True)
    return p * power


@triton.jit
def transform(x, scale, cap, inverse_cap, EXACT: constexpr):
    """Scale, then softcap, where they are not None; infinities and NaN stay. EXACT: to the bits of
    `draws.exact_transform`."""
    if scale is not None:
        x = x * scale
    if cap is not None:
        y = tl.abs(x * inverse_cap) * MINUS_2_LOG2E
        if EXACT:
            t = exp2_exact(y, 0)
        else:
            t = tl.exp2(y)
        tanh = tl.div_rn(1.0 - t, 1.0 + t)
        capped = tl.where(x < 0.0, -tanh, tanh) * cap
        x = tl.where(tl.abs(x) < INF, capped, x)
    return x


@triton.jit
def chain_step(e, d, log2e_over_t_ptr, STEP: constexpr):
    """e^(d/T) at a step of `TopKCall.chains`: the power of the last step's e (0: from d) << 8, and T's number."""
    if (STEP & 0xFF00) == 0x0000:
        e = tl.exp2(d * tl.load(log2e_over_t_ptr + (STEP & 0xFF)))
    elif (STEP & 0xFF00) == 0x0200:
        e = e * e
    else:
        e = e * e
        e = e * e
    return e


@triton.jit
def with_unused_bits(key, UNUSED: constexpr):
    """An `ordered` int32 of which UNUSED low bits were left 0: with those of the float that has none there."""
    return key | ((key >> 31) & ((1 << UNUSED) - 1))


@triton.jit
def sort_descending(x, count, SIZE: constexpr, STAGES: constexpr):
    """A bitonic sort of SIZE = 2^STAGES distinct integers, of which all but the first `count` are the least of all.

    (tl.sort does the same, but takes seconds a row when interpreted.) The loop over the stages is one at run time: its
    body, one exchange for each distance, is compiled once.
    """
    place = tl.arange(0, SIZE)
    stage = tl.full([], 1, tl.int32)
    while (tl.full([], 1, tl.int32) << (stage - 1)) < count:
        descends = ((place >> stage) & 1) == 0
        for i in tl.static_range(STAGES):
            if STAGES - 1 - i < stage:
                pairs = tl.reshape(x, [1 << i, 2, 1 << (STAGES - 1 - i)])
                other = tl.reshape(tl.sum(pairs, axis=1)[:, None, :] - pairs, [SIZE])
                is_left = ((place >> (STAGES - 1 - i)) & 1) == 0
                x = tl.where((x > other) == (is_left == descends), x, other)
        stage += 1
    return x


@triton.jit
def column(token, stride_v, UNIT: constexpr):
    """Offset of a token within its row."""
    if UNIT:
        return token
    else:
        return token.to(tl.int64) * stride_v
