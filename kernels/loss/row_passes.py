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
from ..triton_math import on_device

LOG2_E = constexpr(math.log2(math.e))
# Cache hints: the second read of a row must come from L2, and columns that are done are evicted first.
KEEP, DONE = constexpr("evict_last"), constexpr("evict_first")


@triton.jit
def _scaled(raw, logit_scale):
    """The LM head's matrix product times its scale, in float32."""
    if raw.dtype == tl.bfloat16:
        # the compiler's own conversion takes three instructions for two
        x = (raw.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = raw.to(tl.float32)
    if logit_scale is not None:
        x = x * logit_scale
    return x


@triton.jit
def _fall(x, softcap, MASKED: constexpr):
    """1 / (1 + e^(2 x / softcap)) of scaled logits x: softcap tanh(x / softcap) is softcap minus 2 softcap times that.

    The reciprocal is the square of an inverse square root, which is one instruction, where a division takes eight. Its
    error of 4e-7 relative makes one of up to 8e-7 softcap in a negative logit, and of less than 4e-7 softcap in a
    positive one. MASKED: it is infinite for −inf, and not 1.
    """
    root = tl.rsqrt(tl.exp2(x * (2.0 * LOG2_E / softcap)) + 1.0)
    fall = root * root
    if MASKED:
        # changes nothing that is above -10^30; a comparison would take twice the instructions
        fall = tl.maximum(fall, x * -(2.0**-100))
    return fall


@triton.jit
def logits_of(raw, softcap, logit_scale):
    """Logits from raw ones, the LM head's matrix product; −inf stays −inf. With a softcap -1 / (1 + e^(2 x / softcap)),
    from -1 to 0: what is added to all logits does not change the loss, and `exponents_at` has the factor."""
    x = _scaled(raw, logit_scale)
    if softcap is not None:
        x = -_fall(x, softcap, True)
    return x


@triton.jit
def _exponents(x, rate, r, softcap):
    """u = rate z - r of scaled logits x."""
    if softcap is not None:
        return tl.fma(_fall(x, softcap, True), -rate, -r)
    else:
        return tl.fma(x, rate, -r)


@triton.jit
def through_cap(g, z, softcap):
    """The gradient in raw logits, but for the factor `slope_of_head`, from the gradient g in the logits z."""
    if softcap is not None:
        # 1 - tanh^2 = -4 (z + z^2)
        g = g * (z + z * z)
    return g


@triton.jit
def slope_of_head(softcap, logit_scale):
    """The factor of all gradients in raw logits that `through_cap` leaves out."""
    slope = 1.0
    if softcap is not None:
        slope = -4.0
    if logit_scale is not None:
        slope = slope * logit_scale
    return slope


@triton.jit
def exponents_at(T, softcap):
    """rate, p_1 and p_t of a temperature: e^(z/T) = 2^(p_t u) and e^z = 2^(p_1 u) with u = rate z, for all logits z.

    Where T is 1, 1.5, 2, 3 or 4, both are small powers of one exponential.
    """
    p_t = tl.where(T == 1.5, 2.0, 1.0)
    rate = tl.full((), LOG2_E, tl.float32) / (T * p_t)
    if softcap is not None:
        rate = rate * (2.0 * softcap)
    return rate, T * p_t, p_t


@triton.jit
def mode_at(T):
    """Which powers of one exponential e^z and e^(z/T) are, as a number for `_exp_pair`."""
    mode = tl.where(T == 1.0, 1, tl.where(T == 2.0, 2, 0))
    mode = tl.where(T == 3.0, 3, tl.where(T == 4.0, 4, mode))
    return tl.where(T == 1.5, 5, mode)


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
def vectors_of(row_ptr, stride, V, VEC: constexpr, EDGES: constexpr):
    """The first column and the number of columns of the part of a row that is read and written VEC columns at a time.

    EDGES: whether there may be others, at most VEC - 1 in front of it and behind it. Where the columns lie side by side
    the part starts at a 16-byte boundary.
    """
    head = 0
    if EDGES:
        size: constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
        behind = ((row_ptr.to(tl.int64) & 15) // size).to(tl.int32)
        head = tl.minimum(tl.where(stride == 1, (VEC - behind) % VEC, 0), V)
    return head, tl.multiple_of((V - head) // VEC * VEC, VEC)


@triton.jit
def _edges(V, head, length, THREADS: constexpr):
    """The columns in front of a row's vectors and behind them, one for a thread, and which threads have one."""
    number = tl.arange(0, THREADS)
    return tl.where(number < head, number, number + length), number < V - length


@triton.jit
def _start_of(row_ptr, head, stride, ALIGNED: constexpr):
    """The address of a row's vectors. ALIGNED: they lie at 16-byte boundaries."""
    start_ptr = row_ptr + head * stride
    if ALIGNED:
        start_ptr = tl.multiple_of(start_ptr, 16)
    return start_ptr


@triton.jit
def _load_tile(start_ptr, stride, start, length, BLOCK: constexpr, VEC: constexpr, POLICY: constexpr):
    """Raw logits of a tile of a row's vectors, `[BLOCK / VEC, VEC]`, and which of these are there, `[BLOCK / VEC]`.

    The first vector stands for those behind the end: a load without a mask needs no registers to be set before.
    """
    first = start + tl.arange(0, BLOCK // VEC) * VEC
    there = first < length
    first = tl.multiple_of(tl.where(there, first, 0), VEC)
    columns = first[:, None] + tl.arange(0, VEC)[None, :]
    return tl.load(start_ptr + columns * stride, eviction_policy=POLICY), there


@triton.jit
def _reduce(
    row_ptr, stride, V, rate, p_1, r, s_1, s_t, softcap, logit_scale,
    MODE: constexpr, BLOCK: constexpr, THREADS: constexpr, VEC: constexpr, EDGES: constexpr, ALIGNED: constexpr,
):  # fmt: skip
    """The statistics of a row in one online pass over its vectors. r, s_1, s_t: those of its edges, `[THREADS]`.

    A tile is [repeat, thread, vector]: each thread keeps its own reference and sums, which are merged once, at the end;
    no barrier holds a warp back while another waits for its loads.
    """
    REPEATS: constexpr = BLOCK // (THREADS * VEC)
    head, length = vectors_of(row_ptr, stride, V, VEC, EDGES)
    start_ptr = _start_of(row_ptr, head, stride, ALIGNED)
    for start in range(0, length, BLOCK):
        raw, there = _load_tile(start_ptr, stride, start, length, BLOCK, VEC, KEEP)
        x = _scaled(tl.reshape(raw, (REPEATS, THREADS, VEC)), logit_scale)
        # the largest x is the largest logit, too; tl.max drops a NaN, and the sums below keep it
        top = tl.max(tl.max(x, 2), 0)
        if softcap is not None:
            top = -_fall(top, softcap, True)
        new = tl.maximum(r, top * rate)
        ref = tm.finite_or_zero(new)
        refs = tl.where(tl.reshape(there, (REPEATS, THREADS)), ref[None, :], float("inf"))
        f_1, f_t = _exp_pair(r - ref, p_1, MODE)
        e_1, e_t = _exp_pair(_exponents(x, rate, refs[:, :, None], softcap), p_1, MODE)
        s_t = s_t * f_t + tl.sum(tl.sum(e_t, 2), 0)
        if MODE != 1:
            s_1 = s_1 * f_1 + tl.sum(tl.sum(e_1, 2), 0)
        r = new
    highest = tl.max(r)
    f_1, f_t = _exp_pair(r - tm.finite_or_zero(highest), p_1, MODE)
    total_t = tl.sum(s_t * f_t)
    total_1 = total_t
    if MODE != 1:
        total_1 = tl.sum(s_1 * f_1)
    return highest, total_1, total_t


@triton.jit
def reduce_row(
    row_ptr, stride, V, T, softcap, logit_scale,
    BLOCK: constexpr, THREADS: constexpr, VEC: constexpr, EDGES: constexpr, ALIGNED: constexpr,
):  # fmt: skip
    """The statistics of a row: its reference r = rate max z, Σ 2^(p_1 u) and Σ 2^(p_t u), with u = rate z - r and the
    three numbers of `exponents_at`.

    The rounded r, and not the maximum, is what everything is relative to: u is one fused multiply-add, whose error is
    u's own however large the logits are.
    """
    rate, p_1, p_t = exponents_at(T, softcap)
    r = tl.full((THREADS,), float("-inf"), tl.float32)
    s_1 = tl.zeros((THREADS,), tl.float32)
    s_t = tl.zeros((THREADS,), tl.float32)
    if EDGES:
        head, length = vectors_of(row_ptr, stride, V, VEC, EDGES)
        columns, there = _edges(V, head, length, THREADS)
        z = logits_of(tl.load(row_ptr + columns * stride, mask=there, other=float("-inf")), softcap, logit_scale)
        r = z * rate
        u = tl.fma(z, rate, -tm.finite_or_zero(r))
        s_1, s_t = tl.exp2(p_1 * u), tl.exp2(p_t * u)
    reference, total_1, total_t = 0.0, 0.0, 0.0
    mode = mode_at(T)
    for MODE in tl.static_range(6):
        if mode == MODE:
            reference, total_1, total_t = _reduce(
                row_ptr, stride, V, rate, p_1, r, s_1, s_t, softcap, logit_scale,
                MODE, BLOCK, THREADS, VEC, EDGES, ALIGNED,
            )  # fmt: skip
    return reference, total_1, total_t


@triton.jit
def reduce_off_topk(
    row_ptr, stride, V, T, ids_ptr, logprobs_ptr, draws_ptr, K, first_column, softcap, logit_scale,
    BLOCK: constexpr, THREADS: constexpr, VEC: constexpr, EDGES: constexpr, ALIGNED: constexpr,
):  # fmt: skip
    """The reference and Σ e^(z/T), as `reduce_row` returns them, of a row without its top-k entries.

    ids_ptr, logprobs_ptr, draws_ptr: the row's K stored entries; those of logprob −inf and the drawn ones stay in.
    first_column: the id of the row's first logit.
    The pass costs a comparison for each stored entry in each tile beyond `reduce_row`'s work, and writes nothing.
    """
    REPEATS: constexpr = min(32, BLOCK // THREADS) // VEC
    TILE: constexpr = REPEATS * THREADS * VEC
    rate, _, p_t = exponents_at(T, softcap)
    head, length = vectors_of(row_ptr, stride, V, VEC, EDGES)
    start_ptr = _start_of(row_ptr, head, stride, ALIGNED)
    thread = tl.arange(0, THREADS)
    # of a thread's logits in a tile, the number that each has as a bit
    bits = (tl.arange(0, REPEATS) * VEC)[:, None, None] + tl.arange(0, VEC)[None, None, :]
    r = tl.full((THREADS,), float("-inf"), tl.float32)
    s_t = tl.zeros((THREADS,), tl.float32)
    if EDGES:
        columns, wanted = _edges(V, head, length, THREADS)
        for j in range(K):
            column = tl.where(_in_topk(logprobs_ptr, draws_ptr, j), tl.load(ids_ptr + j).to(tl.int32), -1)
            wanted = wanted & (columns + first_column != column)
        edges = logits_of(tl.load(row_ptr + columns * stride, mask=wanted, other=float("-inf")), softcap, logit_scale)
        r = edges * rate
        s_t = tl.exp2(p_t * tl.fma(edges, rate, -tm.finite_or_zero(r)))
    for start in range(0, length, TILE):
        taken = tl.zeros((THREADS,), tl.int32)
        for j in range(K):
            at = tl.load(ids_ptr + j).to(tl.int32) - first_column - head - start
            if (at >= 0) & (at < TILE):
                group = at // VEC
                bit = tl.where(_in_topk(logprobs_ptr, draws_ptr, j), 1 << ((group // THREADS) * VEC + at % VEC), 0)
                taken |= tl.where(group % THREADS == thread, bit, 0)
        raw, there = _load_tile(start_ptr, stride, start, length, TILE, VEC, KEEP)
        z = logits_of(tl.reshape(raw, (REPEATS, THREADS, VEC)), softcap, logit_scale)
        counts = tl.reshape(there, (REPEATS, THREADS))[:, :, None] & (((taken[None, :, None] >> bits) & 1) == 0)
        z = tl.where(counts, z, float("-inf"))
        new = tl.maximum(r, tl.max(tl.max(z, 2), 0) * rate)
        ref = tm.finite_or_zero(new)
        e_t = tl.exp2(p_t * tl.fma(z, rate, -ref[None, :, None]))
        s_t = s_t * tl.exp2(p_t * (r - ref)) + tl.sum(tl.sum(e_t, 2), 0)
        r = new
    top = tl.max(r)
    return top, tl.sum(s_t * tl.exp2(p_t * (r - tm.finite_or_zero(top))))


@triton.jit
def _in_topk(logprobs_ptr, draws_ptr, j):
    """Whether the j-th stored entry of a row is one of its top-k."""
    topk = tl.load(logprobs_ptr + j).to(tl.float32) > float("-inf")
    if draws_ptr is not None:
        topk = topk & (tl.load(draws_ptr + j) <= 0)
    return topk


@triton.jit
def _gradient(x, rate, r, p_1, p_t, a, b, softcap, MODE: constexpr):
    """a e^z + b e^(z/T), both relative to r, as `through_cap` gives it, at the scaled logits x. MODE: as in
    `_exp_pair`; −1: any T."""
    if softcap is not None:
        fall = _fall(x, softcap, False)  # where x is −inf, the cap's slope is 0
        u = tl.fma(fall, -rate, -r)
    else:
        u = tl.fma(x, rate, -r)
    if MODE == -1:
        g = a * tl.exp2(p_1 * u) + b * tl.exp2(p_t * u)
    else:
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
    if softcap is not None:
        g = g * (fall * fall - fall)
    return g


@triton.jit
def _write(
    x_ptr, x_stride, g_ptr, g_stride, head, length, rate, p_1, p_t, r, a, b, softcap, logit_scale,
    MODE: constexpr, BLOCK: constexpr, VEC: constexpr, X_ALIGNED: constexpr, G_ALIGNED: constexpr,
):  # fmt: skip
    """The gradient of a row's vectors, from the last tile to the first: what was read last is still in the cache."""
    x_start_ptr = _start_of(x_ptr, head, x_stride, X_ALIGNED)
    g_start_ptr = _start_of(g_ptr, head, g_stride, G_ALIGNED)
    tiles = tl.cdiv(length, BLOCK)
    for i in range(tiles):
        start = (tiles - 1 - i) * BLOCK
        raw, there = _load_tile(x_start_ptr, x_stride, start, length, BLOCK, VEC, DONE)
        g = _gradient(_scaled(raw, logit_scale), rate, r, p_1, p_t, a, b, softcap, MODE)
        columns = (start + tl.arange(0, BLOCK // VEC) * VEC)[:, None] + tl.arange(0, VEC)[None, :]
        element = g_ptr.dtype.element_ty
        tl.store(g_start_ptr + columns * g_stride, g.to(element), mask=there[:, None], eviction_policy=DONE)


@triton.jit
def write_row(
    x_ptr, x_stride, g_ptr, g_stride, V, T, r, a, b, softcap, logit_scale,
    BLOCK: constexpr, THREADS: constexpr, VEC: constexpr, EDGES: constexpr, X_ALIGNED: constexpr, G_ALIGNED: constexpr,
):  # fmt: skip
    """a 2^(p_1 u) + b 2^(p_t u), with u = rate z - r and `exponents_at`, to every column of the row."""
    rate, p_1, p_t = exponents_at(T, softcap)
    head, length = vectors_of(x_ptr, x_stride, V, VEC, EDGES)
    if EDGES:
        columns, there = _edges(V, head, length, THREADS)
        x = _scaled(tl.load(x_ptr + columns * x_stride, mask=there, other=0.0), logit_scale)
        g = _gradient(x, rate, r, p_1, p_t, a, b, softcap, -1)
        tl.store(g_ptr + columns * g_stride, g.to(g_ptr.dtype.element_ty), mask=there)
    mode = mode_at(T)
    for MODE in tl.static_range(6):
        if mode == MODE:
            _write(
                x_ptr, x_stride, g_ptr, g_stride, head, length, rate, p_1, p_t, r, a, b, softcap, logit_scale,
                MODE, BLOCK, VEC, X_ALIGNED, G_ALIGNED,
            )  # fmt: skip


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
        with on_device(x):
            scale_kernel[(programs,)](x, factor, x.numel(), triton.cdiv(blocks, programs), BLOCK=block, num_warps=8)


def sweep_settings(width: int, itemsize: int, backend: str = "cuda", lanes: int = 32) -> dict[str, Any]:
    """Tile, warps and registers of the passes over a row. lanes: threads of a warp.

    The second read of a row must come from L2: few rows in flight, each wide. A multiprocessor holds 16 warps of 128
    registers: one long row, or two short ones that hide each other's waits. What a row costs beside its logits, every
    warp pays: half the warps with twice the registers halve it.
    """
    vec = 16 // itemsize
    tile = triton.next_power_of_2(width)
    threads = max(128, min(512 if width * itemsize > 131072 else 256, tile // 16))
    # 32 logits a thread at a time
    repeats = max(1, min((32 if itemsize == 2 else 16) // vec, tile // (threads * vec)))
    settings = {
        "BLOCK": repeats * threads * vec,
        "THREADS": threads,
        "VEC": vec,
        "EDGES": width % vec != 0,
        "num_warps": threads // lanes,
    }
    # an option that the other back ends do not have
    return settings | {"maxnreg": 128} if backend == "cuda" else settings
