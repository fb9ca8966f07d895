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
def _exp_pair(z, m, rate, MODE: constexpr):
    """e^(z-m) and e^((z-m)/T), with rate = log2(e)/T. MODE 1 and 2: T is 1 or 2, and one exponential gives both."""
    if MODE == 1:
        e = tl.exp2((z - m) * LOG2_E)
        return e, e
    elif MODE == 2:
        e = tl.exp2((z - m) * (0.5 * LOG2_E))
        return e * e, e
    else:
        return tl.exp2((z - m) * LOG2_E), tl.exp2((z - m) * rate)


@triton.jit
def reduce_online(
    row_ptr,
    stride,
    V,
    rate,
    softcap,
    logit_scale,
    MODE: constexpr,
    BLOCK: constexpr,
    THREADS: constexpr,
    VEC: constexpr,
):
    """Maximum, Σ e^(z-m) and Σ e^((z-m)/T) of a row, in one online pass.

    A tile is [repeat, thread, vector]: each thread keeps its own maximum and sums, which are merged once, at the end;
    no barrier holds a warp back while another waits for its loads.
    """
    REPEATS: constexpr = BLOCK // (THREADS * VEC)
    cols = tl.arange(0, BLOCK)
    m = tl.full((THREADS,), float("-inf"), tl.float32)
    s_1 = tl.zeros((THREADS,), tl.float32)
    s_t = tl.zeros((THREADS,), tl.float32)
    for start in range(0, V, BLOCK):
        there = start + cols < V
        raw = tl.load(row_ptr + (start + cols) * stride, mask=there, other=float("-inf"), eviction_policy=KEEP)
        z = logits_of(tl.reshape(raw, (REPEATS, THREADS, VEC)), softcap, logit_scale)
        # tl.max drops a NaN; the sums below keep it
        new = tl.maximum(m, tl.max(tl.max(z, 2), 0))
        ref = tl.where(new == float("-inf"), 0.0, new)
        f_1, f_t = _exp_pair(m, ref, rate, MODE)
        e_1, e_t = _exp_pair(z, ref[None, :, None], rate, MODE)
        s_t = s_t * f_t + tl.sum(tl.sum(e_t, 2), 0)
        if MODE != 1:
            s_1 = s_1 * f_1 + tl.sum(tl.sum(e_1, 2), 0)
        m = new
    top = tl.max(m)
    f_1, f_t = _exp_pair(m, tl.where(top == float("-inf"), 0.0, top), rate, MODE)
    total_t = tl.sum(s_t * f_t)
    total_1 = total_t
    if MODE != 1:
        total_1 = tl.sum(s_1 * f_1)
    return top, total_1, total_t


@triton.jit
def reduce_row(row_ptr, stride, V, T, softcap, logit_scale, BLOCK: constexpr, THREADS: constexpr, VEC: constexpr):
    """Maximum, Σ e^(z-m) and Σ e^((z-m)/T) of a row; T = 1 and T = 2 are branches taken at run time."""
    rate = LOG2_E / T
    if T == 1.0:
        m, s_1, s_t = reduce_online(row_ptr, stride, V, rate, softcap, logit_scale, 1, BLOCK, THREADS, VEC)
    elif T == 2.0:
        m, s_1, s_t = reduce_online(row_ptr, stride, V, rate, softcap, logit_scale, 2, BLOCK, THREADS, VEC)
    else:
        m, s_1, s_t = reduce_online(row_ptr, stride, V, rate, softcap, logit_scale, 0, BLOCK, THREADS, VEC)
    return m, s_1, s_t


@triton.jit
def reduce_without(row_ptr, stride, V, T, ids, softcap, logit_scale, BLOCK: constexpr):
    """Maximum and Σ e^((z-m)/T) of a row without the columns in `ids`: slow, for rows that may not be written to."""
    rate = LOG2_E / T
    m = float("-inf")
    s_t = 0.0
    cols = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        hit = tl.max(((start + cols)[:, None] == ids[None, :]).to(tl.int32), 1)
        there = (start + cols < V) & (hit == 0)
        raw = tl.load(row_ptr + (start + cols) * stride, mask=there, other=float("-inf"))
        z = logits_of(raw, softcap, logit_scale)
        new = tl.maximum(m, tl.max(z))
        ref = tl.where(new == float("-inf"), 0.0, new)
        s_t = s_t * tl.exp2((m - ref) * rate) + tl.sum(tl.exp2((z - ref) * rate))
        m = new
    return m, s_t


@triton.jit
def _write(x_ptr, x_stride, g_ptr, g_stride, V, rate, m, a, b, softcap, logit_scale, MODE: constexpr, BLOCK: constexpr):
    """a e^(z-m) + b e^((z-m)/T), as a gradient in raw logits, to every column of the row."""
    cols = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        there = start + cols < V
        raw = tl.load(x_ptr + (start + cols) * x_stride, mask=there, eviction_policy=DONE)
        z = logits_of(raw, softcap, logit_scale)
        e_1, e_t = _exp_pair(z, m, rate, MODE)
        if MODE == 1:
            g = (a + b) * e_t
        elif MODE == 2:
            g = (a * e_t + b) * e_t
        else:
            g = a * e_1 + b * e_t
        g = through_cap(g, z, softcap, logit_scale)
        tl.store(g_ptr + (start + cols) * g_stride, g.to(g_ptr.dtype.element_ty), mask=there, eviction_policy=DONE)


@triton.jit
def write_row(x_ptr, x_stride, g_ptr, g_stride, V, T, m, a, b, softcap, logit_scale, BLOCK: constexpr):
    """a e^(z-m) + b e^((z-m)/T) to every column of the row; T = 1 and T = 2 are branches taken at run time."""
    rate = LOG2_E / T
    if T == 1.0:
        _write(x_ptr, x_stride, g_ptr, g_stride, V, rate, m, a, b, softcap, logit_scale, 1, BLOCK)
    elif T == 2.0:
        _write(x_ptr, x_stride, g_ptr, g_stride, V, rate, m, a, b, softcap, logit_scale, 2, BLOCK)
    else:
        _write(x_ptr, x_stride, g_ptr, g_stride, V, rate, m, a, b, softcap, logit_scale, 0, BLOCK)


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
