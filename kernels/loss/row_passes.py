# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment,attr-defined"
"""Passes over rows of logits in Triton: reduce a row, write its gradient, and small kernels over whole tensors.

softcap, logit_scale: the LM head's, or None, which is known when a kernel is compiled.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from .. import triton_math as tm

LOG2_E = constexpr(math.log2(math.e))
# Cache hints: the second read of a row must come from L2, and columns that are done are evicted first.
KEEP, DONE = constexpr("evict_last"), constexpr("evict_first")


@triton.jit
def logits_of(raw, softcap, logit_scale):
    """Logits in float32 from raw ones, the LM head's matrix product: the scale, then the cap; −inf stays −inf."""
    x = raw.to(tl.float32)
    if logit_scale is not None:
        x = x * logit_scale
    if softcap is not None:
        capped = softcap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E / softcap)) + 1.0))
        x = tl.where(x == float("-inf"), x, capped)
    return x


@triton.jit
def through_cap(g, z, softcap, logit_scale):
    """The gradient in raw logits from the gradient g in the logits z."""
    if softcap is not None:
        y = z * (1.0 / softcap)
        g = tl.where(z == float("-inf"), 0.0, g * (1.0 - y * y))
    if logit_scale is not None:
        g = g * logit_scale
    return g


@triton.jit
def exponents_at(T):
    """rate, p_1 and p_t of a temperature: e^(z/T) = 2^(p_t u) and e^z = 2^(p_1 u) with u = rate z, for all logits z.

    Where T is 1, 1.5, 2, 3 or 4, both are small powers of one exponential.
    """
    p_t = tl.where(T == 1.5, 2.0, 1.0)
    return tl.full((), LOG2_E, tl.float32) / (T * p_t), T * p_t, p_t


@triton.jit
def _exp_pair(u, p_1, MODE: constexpr):
    """e^z and e^(z/T), of u = rate z. MODE: which powers of 2^u they are; 0: T is none of those, and there are two
    exponentials."""
    h = tl.exp2(u)
    if MODE == 0:
        return tl.exp2(p_1 * u), h
    elif MODE == 1:  # T = 1
        return h, h
    elif MODE == 2:  # T = 2
        return h * h, h
    elif MODE == 3:  # T = 3
        return h * h * h, h
    elif MODE == 4:  # T = 4
        square = h * h
        return square * square, h
    else:  # T = 1.5
        square = h * h
        return square * h, square


@triton.jit
def reduce_online(
    row_ptr,
    stride,
    V,
    rate,
    p_1,
    softcap,
    logit_scale,
    MODE: constexpr,
    BLOCK: constexpr,
    THREADS: constexpr,
    VEC: constexpr,
):
    """The reference r = rate max z of a row, and Σ e^z and Σ e^(z/T) relative to it, in one online pass.

    A tile is [repeat, thread, vector]: each thread keeps its own reference and sums, which are merged once, at the end;
    no barrier holds a warp back while another waits for its loads.
    """
    REPEATS: constexpr = BLOCK // (THREADS * VEC)
    cols = tl.arange(0, BLOCK)
    r = tl.full((THREADS,), float("-inf"), tl.float32)
    s_1 = tl.zeros((THREADS,), tl.float32)
    s_t = tl.zeros((THREADS,), tl.float32)
    for start in range(0, V, BLOCK):
        there = start + cols < V
        raw = tl.load(row_ptr + (start + cols) * stride, mask=there, other=float("-inf"), eviction_policy=KEEP)
        z = logits_of(tl.reshape(raw, (REPEATS, THREADS, VEC)), softcap, logit_scale)
        # tl.max drops a NaN; the sums below keep it
        new = tl.maximum(r, tl.max(tl.max(z, 2), 0) * rate)
        ref = tm.finite_or_zero(new)
        f_1, f_t = _exp_pair(r - ref, p_1, MODE)
        e_1, e_t = _exp_pair(tl.fma(z, rate, -ref[None, :, None]), p_1, MODE)
        s_t = s_t * f_t + tl.sum(tl.sum(e_t, 2), 0)
        if MODE != 1:
            s_1 = s_1 * f_1 + tl.sum(tl.sum(e_1, 2), 0)
        r = new
    top = tl.max(r)
    f_1, f_t = _exp_pair(r - tm.finite_or_zero(top), p_1, MODE)
    total_t = tl.sum(s_t * f_t)
    total_1 = total_t
    if MODE != 1:
        total_1 = tl.sum(s_1 * f_1)
    return top, total_1, total_t


@triton.jit
def reduce_row(row_ptr, stride, V, T, softcap, logit_scale, BLOCK: constexpr, THREADS: constexpr, VEC: constexpr):
    """The statistics of a row: its reference r = rate max z, Σ 2^(p_1 u) and Σ 2^(p_t u), with u = rate z - r and the
    three numbers of `exponents_at`.

    The rounded r, and not the maximum, is what everything is relative to: u is one fused multiply-add, whose error is
    u's own however large the logits are.
    """
    rate, p_1, _ = exponents_at(T)
    if T == 1.0:
        r, s_1, s_t = reduce_online(row_ptr, stride, V, rate, p_1, softcap, logit_scale, 1, BLOCK, THREADS, VEC)
    elif T == 2.0:
        r, s_1, s_t = reduce_online(row_ptr, stride, V, rate, p_1, softcap, logit_scale, 2, BLOCK, THREADS, VEC)
    elif T == 3.0:
        r, s_1, s_t = reduce_online(row_ptr, stride, V, rate, p_1, softcap, logit_scale, 3, BLOCK, THREADS, VEC)
    elif T == 4.0:
        r, s_1, s_t = reduce_online(row_ptr, stride, V, rate, p_1, softcap, logit_scale, 4, BLOCK, THREADS, VEC)
    elif T == 1.5:
        r, s_1, s_t = reduce_online(row_ptr, stride, V, rate, p_1, softcap, logit_scale, 5, BLOCK, THREADS, VEC)
    else:
        r, s_1, s_t = reduce_online(row_ptr, stride, V, rate, p_1, softcap, logit_scale, 0, BLOCK, THREADS, VEC)
    return r, s_1, s_t


@triton.jit
def reduce_off_topk(
    row_ptr,
    stride,
    V,
    T,
    ids_ptr,
    logprobs_ptr,
    draws_ptr,
    K,
    softcap,
    logit_scale,
    BLOCK: constexpr,
    THREADS: constexpr,
    VEC: constexpr,
):
    """The reference and Σ e^(z/T), as `reduce_row` returns them, of a row without its top-k entries.

    ids_ptr, logprobs_ptr, draws_ptr: the row's K stored entries; those of logprob −inf and the drawn ones stay in.
    The pass costs a comparison for each stored entry in each tile beyond `reduce_row`'s work, and writes nothing.
    """
    REPEATS: constexpr = BLOCK // (THREADS * VEC)
    tl.static_assert(REPEATS * VEC <= 32)
    rate, _, p_t = exponents_at(T)
    cols = tl.arange(0, BLOCK)
    thread = tl.arange(0, THREADS)
    # of a thread's logits in a tile, the number that each has as a bit
    bits = (tl.arange(0, REPEATS) * VEC)[:, None, None] + tl.arange(0, VEC)[None, None, :]
    r = tl.full((THREADS,), float("-inf"), tl.float32)
    s_t = tl.zeros((THREADS,), tl.float32)
    for start in range(0, V, BLOCK):
        taken = tl.zeros((THREADS,), tl.int32)
        for j in range(K):
            at = tl.load(ids_ptr + j).to(tl.int32) - start
            if (at >= 0) & (at < BLOCK):
                topk = tl.load(logprobs_ptr + j).to(tl.float32) > float("-inf")
                if draws_ptr is not None:
                    topk = topk & (tl.load(draws_ptr + j) <= 0)
                group = at // VEC
                bit = tl.where(topk, 1 << ((group // THREADS) * VEC + at % VEC), 0)
                taken |= tl.where(group % THREADS == thread, bit, 0)
        there = start + cols < V
        raw = tl.load(row_ptr + (start + cols) * stride, mask=there, other=float("-inf"), eviction_policy=KEEP)
        z = logits_of(tl.reshape(raw, (REPEATS, THREADS, VEC)), softcap, logit_scale)
        z = tl.where(((taken[None, :, None] >> bits) & 1) != 0, float("-inf"), z)
        new = tl.maximum(r, tl.max(tl.max(z, 2), 0) * rate)
        ref = tm.finite_or_zero(new)
        e_t = tl.exp2(p_t * tl.fma(z, rate, -ref[None, :, None]))
        s_t = s_t * tl.exp2(p_t * (r - ref)) + tl.sum(tl.sum(e_t, 2), 0)
        r = new
    top = tl.max(r)
    return top, tl.sum(s_t * tl.exp2(p_t * (r - tm.finite_or_zero(top))))


@triton.jit
def _write(
    x_ptr, x_stride, g_ptr, g_stride, V, rate, p_1, r, a, b, softcap, logit_scale, MODE: constexpr, BLOCK: constexpr
):
    """a e^z + b e^(z/T), both relative to r, as a gradient in raw logits, to every column of the row."""
    cols = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        there = start + cols < V
        raw = tl.load(x_ptr + (start + cols) * x_stride, mask=there, eviction_policy=DONE)
        z = logits_of(raw, softcap, logit_scale)
        u = tl.fma(z, rate, -r)
        h = tl.exp2(u)
        if MODE == 0:
            g = a * tl.exp2(p_1 * u) + b * h
        elif MODE == 1:
            g = (a + b) * h
        elif MODE == 2:
            g = (a * h + b) * h
        elif MODE == 3:
            g = (a * h * h + b) * h
        elif MODE == 4:
            g = ((a * h) * (h * h) + b) * h
        else:
            g = (a * h + b) * (h * h)
        g = through_cap(g, z, softcap, logit_scale)
        tl.store(g_ptr + (start + cols) * g_stride, g.to(g_ptr.dtype.element_ty), mask=there, eviction_policy=DONE)


@triton.jit
def write_row(x_ptr, x_stride, g_ptr, g_stride, V, T, r, a, b, softcap, logit_scale, BLOCK: constexpr):
    """a 2^(p_1 u) + b 2^(p_t u), with u = rate z - r and `exponents_at`, to every column of the row."""
    rate, p_1, _ = exponents_at(T)
    if T == 1.0:
        _write(x_ptr, x_stride, g_ptr, g_stride, V, rate, p_1, r, a, b, softcap, logit_scale, 1, BLOCK)
    elif T == 2.0:
        _write(x_ptr, x_stride, g_ptr, g_stride, V, rate, p_1, r, a, b, softcap, logit_scale, 2, BLOCK)
    elif T == 3.0:
        _write(x_ptr, x_stride, g_ptr, g_stride, V, rate, p_1, r, a, b, softcap, logit_scale, 3, BLOCK)
    elif T == 4.0:
        _write(x_ptr, x_stride, g_ptr, g_stride, V, rate, p_1, r, a, b, softcap, logit_scale, 4, BLOCK)
    elif T == 1.5:
        _write(x_ptr, x_stride, g_ptr, g_stride, V, rate, p_1, r, a, b, softcap, logit_scale, 5, BLOCK)
    else:
        _write(x_ptr, x_stride, g_ptr, g_stride, V, rate, p_1, r, a, b, softcap, logit_scale, 0, BLOCK)


@triton.jit
def zero_row(g_ptr, stride, V, BLOCK: constexpr):
    """Zeros in a row."""
    cols = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        tl.store(g_ptr + (start + cols) * stride, tl.zeros((BLOCK,), g_ptr.dtype.element_ty), mask=start + cols < V)


@triton.jit
def zero_uncovered_kernel(g_ptr, covered_ptr, outer, inner_stride, stride, inner, V, BLOCK: constexpr):
    """Zeros in the rows of the gradient that have no target row."""
    position = tl.program_id(0).to(tl.int64)
    if tl.load(covered_ptr + position) == 0:
        zero_row(g_ptr + (position // inner) * outer + (position % inner) * inner_stride, stride, V, BLOCK)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, numel, rounds, BLOCK: constexpr):
    """x *= factor. A factor of 1 costs nothing, and checking it does not synchronize."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    for i in range(rounds):
        block = tl.program_id(0).to(tl.int64) + i * tl.num_programs(0)
        cols = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < numel)
        tl.store(x_ptr + cols, (x.to(tl.float32) * factor).to(x_ptr.dtype.element_ty), mask=cols < numel)


def scale_triton_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, in place, for a contiguous x."""
    block = 4096
    if x.numel():
        # no more programs than a GPU holds at once: a quarter of a million that only read the factor would take a tenth
        # of the loss's time
        blocks = triton.cdiv(x.numel(), block)
        programs = min(blocks, 1056)
        scale_kernel[(programs,)](x, factor, x.numel(), triton.cdiv(blocks, programs), BLOCK=block, num_warps=8)


def sweep_settings(width: int, itemsize: int) -> dict[str, Any]:
    """Tile, warps and registers of the passes over a row.

    The second read of a row must come from L2: few rows in flight, each wide. A multiprocessor holds 32 warps of 64
    registers: one long row, or two short ones that hide each other's waits.
    """
    # triton specialises on whether 16 divides the length: if not, it loads single elements
    vec = 16 // itemsize if width % 16 == 0 else 1
    tile = triton.next_power_of_2(width)
    warps = max(4, min(32 if width * itemsize > 131072 else 16, tile // 512))
    repeats = max(1, min(32 // vec if itemsize == 2 else 16 // vec, tile // (32 * warps * vec)))
    return {
        "BLOCK": repeats * 32 * warps * vec,
        "THREADS": 32 * warps,
        "VEC": vec,
        "num_warps": warps,
        "maxnreg": 64,
    }
