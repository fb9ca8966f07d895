# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels of top-k that read the picked groups again: steps 3 and 4 of `triton_kernels.py`."""

import triton
import triton.language as tl
from triton.language import constexpr

from ..triton_math import INF, finite_or_zero
from .triton_math import LEAST, chain_step, column, ordered, transform, unordered, with_unused_bits

SIFTED = constexpr(8)  # tokens of a run in `_select` and `_sift`; a group is a multiple


@triton.jit
def _tokens(group, i, G: constexpr, RUN: constexpr, BLOCK: constexpr):
    """The ids [groups, tokens] of the tokens i of some groups."""
    GROUPS: constexpr = BLOCK // G
    within = (i // RUN) * (GROUPS * RUN) + i % RUN
    return ((group // GROUPS) * BLOCK + (group % GROUPS) * RUN)[:, None] + within[None, :]


@triton.jit
def _tile(
    row_ptr, stride_v, vocab, picked_ptr, start, picked,
    G: constexpr, RUN: constexpr, BLOCK: constexpr, TILE: constexpr, UNIT: constexpr,
):  # fmt: skip
    """Logits and ids [TILE, G] of the picked groups from number `start` on; −inf where there is none."""
    place = start + tl.arange(0, TILE)
    group = tl.load(picked_ptr + place, mask=place < picked, other=0)
    token = _tokens(group, tl.arange(0, G), G, RUN, BLOCK)
    at = row_ptr + column(token, stride_v, UNIT)
    there = (place < picked)[:, None]
    if tl.max(group, axis=0) < (vocab // BLOCK) * (BLOCK // G):  # the vocabulary ends behind them: vector loads
        raw = tl.load(at, mask=there, other=-INF)
    else:
        raw = tl.load(at, mask=there & (token < vocab), other=-INF)
    return raw.to(tl.float32), token


@triton.jit
def _add_sums(
    sums, old_top, top, x, left_out,  # left_out: of x's shape, or of 1 in its last dimensions
    number, log2e_over_t, log2e_over_t_ptr, scale, cap, inverse_cap, CHAIN: constexpr, M: constexpr,
):  # fmt: skip
    """`sums` [MP] relative to `old_top`, and the sums over x [A, B, C], without those left out, relative to `top`."""
    old = transform(old_top, scale, cap, inverse_cap, False)
    reference = finite_or_zero(transform(top, scale, cap, inverse_cap, False))
    sums *= tl.exp2((old - reference) * log2e_over_t)
    # a difference to +inf is −inf, whose exponential is 0
    d = transform(x, scale, cap, inverse_cap, False) - tl.where(left_out, INF, reference)
    e = d
    for m in tl.static_range(M):
        e = chain_step(e, d, log2e_over_t_ptr, (CHAIN >> (16 * m)) & 0xFFFF)
        sums += tl.where(number == ((CHAIN >> (16 * m)) & 0xFF), tl.sum(e), 0.0)
    return sums


@triton.jit
def _count(x):
    """How many are true."""
    return tl.sum(x.to(tl.int32))


@triton.jit
def _select(
    x_ptr, stride_n, stride_v, vocab,
    picked_ptr, stride_picked, picked_count_ptr, floor_ptr, log2e_over_t_ptr,  # as `_pick` has them
    runs_ptr,  # out [N, CANDIDATES] int32: the runs that have a token which reaches the floor
    runs_count_ptr,  # out [N] int32: how many; above CANDIDATES, some are missing
    rest_top_ptr,  # out [N] float32: raw maximum of the picked groups' other runs
    rest_sums_ptr,  # out [N, M] float32: their sums, relative to it
    scale, cap, inverse_cap,
    CHAIN: constexpr, M: constexpr, MP: constexpr,
    G: constexpr, RUN: constexpr, BLOCK: constexpr, CANDIDATES: constexpr,
    TILE: constexpr,  # groups at a time
    UNIT: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr, groups_ptr = x_ptr + row * stride_n, picked_ptr + row * stride_picked
    picked = tl.load(picked_count_ptr + row)
    low = tl.load(floor_ptr + row)
    number = tl.arange(0, MP)
    log2e_over_t = tl.load(log2e_over_t_ptr + number, mask=number < M, other=1.0)
    seen = tl.full([], 0, tl.int32)
    rest_top = tl.full([], -INF, tl.float32)
    sums = tl.zeros([MP], tl.float32)
    for start in range(0, picked, TILE):
        x, _ = _tile(row_ptr, stride_v, vocab, groups_ptr, start, picked, G, RUN, BLOCK, TILE, UNIT)
        x = tl.reshape(x, [TILE, G // SIFTED, SIFTED])
        top = tl.max(x, axis=2)
        reach = top >= low
        # in the order of the groups: `_sift` adds up in the order of this list
        places = tl.cumsum(tl.reshape(reach.to(tl.int32), [TILE * (G // SIFTED)]), axis=0)
        slot = seen + tl.reshape(places, [TILE, G // SIFTED]) - 1
        seen += _count(reach)
        place = start + tl.arange(0, TILE)
        group = tl.load(groups_ptr + place, mask=place < picked, other=0)
        run = _tokens(group, tl.arange(0, G // SIFTED) * SIFTED, G, RUN, BLOCK) // SIFTED
        tl.store(runs_ptr + row * CANDIDATES + slot, run, mask=reach & (slot < CANDIDATES))
        old_top = rest_top
        rest_top = tl.maximum(rest_top, tl.max(tl.where(reach, -INF, top)))
        sums = _add_sums(
            sums, old_top, rest_top, x, reach[:, :, None], number, log2e_over_t, log2e_over_t_ptr,
            scale, cap, inverse_cap, CHAIN, M,
        )  # fmt: skip
    tl.store(runs_count_ptr + row, seen)
    tl.store(rest_top_ptr + row, rest_top)
    tl.store(rest_sums_ptr + row * M + number, sums, mask=number < M)


@triton.jit
def _take(
    row_ptr, stride_v, vocab, picked_ptr, picked,
    low, limit,  # candidates: tokens above `low`, and those that equal it, with TIES those up to id `limit`
    counter_ptr, before,  # counts up from `before`
    best_ptr, rest_top_ptr, rest_sums_ptr,  # of this row
    log2e_over_t_ptr, scale, cap, inverse_cap,
    TIES: constexpr, CHAIN: constexpr, M: constexpr, MP: constexpr,
    G: constexpr, RUN: constexpr, BLOCK: constexpr, CANDIDATES: constexpr, TILE: constexpr, UNIT: constexpr,
):  # fmt: skip
    """Write the candidates of picked groups or runs, and the sums over the rest. Returns the number of candidates."""
    number = tl.arange(0, MP)
    log2e_over_t = tl.load(log2e_over_t_ptr + number, mask=number < M, other=1.0)
    seen = tl.full([], 0, tl.int32)
    rest_top = tl.full([], -INF, tl.float32)
    sums = tl.zeros([MP], tl.float32)
    for start in range(0, picked, TILE):
        x, token = _tile(row_ptr, stride_v, vocab, picked_ptr, start, picked, G, RUN, BLOCK, TILE, UNIT)
        reach = x >= low
        if TIES:
            reach = (x > low) | (reach & (token <= limit))
        seen += _count(reach)
        slot = tl.atomic_add(counter_ptr + tl.zeros([TILE, G], tl.int32), 1, mask=reach, sem="relaxed") - before
        entry = (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | token.to(tl.int64)
        tl.store(best_ptr + slot, entry, mask=reach & (slot < CANDIDATES))
        old_top = rest_top
        rest_top = tl.maximum(rest_top, tl.max(tl.where(reach, -INF, x)))
        sums = _add_sums(
            sums, old_top, rest_top, x[:, :, None], reach[:, :, None], number, log2e_over_t, log2e_over_t_ptr,
            scale, cap, inverse_cap, CHAIN, M,
        )  # fmt: skip
    tl.store(rest_top_ptr, rest_top)
    tl.store(rest_sums_ptr + number, sums, mask=number < M)
    return seen


@triton.jit
def _sift(
    x_ptr, stride_n, stride_v, vocab, floor_ptr, log2e_over_t_ptr,  # as `_pick` has them
    runs_ptr, runs_count_ptr,  # as `_select` has them
    counter_ptr,  # [N] int32, 0; out: the number of tokens written
    best_ptr,  # out [N, CANDIDATES] int64: (bits of the logit, id) in any order: the top-k entries, and maybe more
    count_ptr,  # out [N] int32: how many; above CANDIDATES, some are missing
    rest_top_ptr,  # out [N] float32: raw maximum of the runs' other tokens
    rest_sums_ptr,  # out [N, M] float32: their sums, relative to it
    scale, cap, inverse_cap,
    CHAIN: constexpr, M: constexpr, MP: constexpr, CANDIDATES: constexpr,
    TILE: constexpr,  # runs at a time
    UNIT: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    runs = tl.load(runs_count_ptr + row)
    if runs > CANDIDATES:
        tl.store(count_ptr + row, runs)
        return
    seen = _take(
        x_ptr + row * stride_n, stride_v, vocab, runs_ptr + row * CANDIDATES, runs, tl.load(floor_ptr + row), 0,
        counter_ptr + row, 0, best_ptr + row * CANDIDATES, rest_top_ptr + row, rest_sums_ptr + row * M,
        log2e_over_t_ptr, scale, cap, inverse_cap,
        False, CHAIN, M, MP, SIFTED, SIFTED, SIFTED, CANDIDATES, TILE, UNIT,
    )  # fmt: skip
    tl.store(count_ptr + row, seen)


@triton.jit
def _sift_ties(
    x_ptr, stride_n, stride_v, vocab, picked_ptr, stride_picked, picked_count_ptr, log2e_over_t_ptr,
    counter_ptr, best_ptr, count_ptr, rest_top_ptr, rest_sums_ptr,  # as `_sift` left them
    runs_top_ptr, runs_sums_ptr,  # [N], [N, M], as `_select` left them; out: of nothing
    entries, scale, cap, inverse_cap,
    UNUSED: constexpr, CHAIN: constexpr, M: constexpr, MP: constexpr,
    G: constexpr, RUN: constexpr, BLOCK: constexpr, CANDIDATES: constexpr, TILE: constexpr,
    ID_BITS: constexpr,  # of the vocabulary's last id
    UNIT: constexpr,
):  # fmt: skip
    """`_select` and `_sift` again for the rows with too many candidates: of what ties, the lower ids are taken."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(count_ptr + row) <= CANDIDATES:
        return
    before = tl.load(counter_ptr + row)
    row_ptr, groups_ptr = x_ptr + row * stride_n, picked_ptr + row * stride_picked
    picked = tl.load(picked_count_ptr + row)
    threshold = tl.full([], LEAST, tl.int32)
    for i in range(32 - UNUSED):
        candidate = threshold ^ (tl.full([], 1, tl.int32) << (31 - i))
        count = tl.full([], 0, tl.int32)
        for start in range(0, picked, TILE):
            x, token = _tile(row_ptr, stride_v, vocab, groups_ptr, start, picked, G, RUN, BLOCK, TILE, UNIT)
            count += _count(ordered(x) >= candidate)
        threshold = tl.where(count >= entries, candidate, threshold)
    low = unordered(with_unused_bits(threshold, UNUSED))
    # Of the tokens that equal it, those of the lowest ids: up to the largest `limit` before which too few lie.
    limit = tl.full([], 0, tl.int32)
    for i in range(ID_BITS):
        candidate = limit | (tl.full([], 1, tl.int32) << (ID_BITS - 1 - i))
        count = tl.full([], 0, tl.int32)
        for start in range(0, picked, TILE):
            x, token = _tile(row_ptr, stride_v, vocab, groups_ptr, start, picked, G, RUN, BLOCK, TILE, UNIT)
            count += _count((x > low) | ((x == low) & (token < candidate)))
        limit = tl.where(count < entries, candidate, limit)
    seen = _take(
        row_ptr, stride_v, vocab, groups_ptr, picked, low, limit, counter_ptr + row, before,
        best_ptr + row * CANDIDATES, rest_top_ptr + row, rest_sums_ptr + row * M, log2e_over_t_ptr,
        scale, cap, inverse_cap, True, CHAIN, M, MP, G, RUN, BLOCK, CANDIDATES, TILE, UNIT,
    )  # fmt: skip
    tl.store(count_ptr + row, seen)
    tl.store(runs_top_ptr + row, -INF)
    number = tl.arange(0, MP)
    tl.store(runs_sums_ptr + row * M + number, tl.zeros([MP], tl.float32), mask=number < M)
