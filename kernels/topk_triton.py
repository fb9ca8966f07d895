# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Top-k, tails and draws in Triton: one read of the logits, then work on what that read singled out.

1. `_scan` reads the logits once. Every group of G neighbouring tokens leaves its maximum and `Σ e^((z - max)/T)` for
   every temperature; every program the number of its finite logits.
2. `_pick`, a program a row, finds the row's k best groups by bisection on the bits of their maxima, and adds up the
   sums of all the others.
3. `_select`, a program a row, reads the k groups again, keeps the tokens that reach the worst of the k maxima (the k
   best and seldom many more; where too many do, exactly the k best), and adds up the rest.
4. `_finish` sorts these tokens, cuts the head at `mass` and writes log-probabilities and tails.

No sum is the difference of two others, and what lies in the head is never in the tail's sums, so nothing cancels. With
draws, `_weigh` reads the logits a second time for the integer weights of `draws.py`, a sum a group, and `_invert` finds
the token of each draw by looking inside one group.

Sums run in a fixed order without atomics: results are the same bits on every run. Nothing waits for the device.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import draws as dr
from .interpreter import is_interpreted
from .topk_torch import Plan, Rows, merge_drawn, refuse

LOG2E = tl.constexpr(dr.LOG2E)
MINUS_2_LOG2E = tl.constexpr(dr.MINUS_2_LOG2E)
C1, C2, C3 = tl.constexpr(dr.C1), tl.constexpr(dr.C2), tl.constexpr(dr.C3)
C4, C5, C6 = tl.constexpr(dr.C4), tl.constexpr(dr.C5), tl.constexpr(dr.C6)
LOWEST = tl.constexpr(dr.LOWEST)
INF = tl.constexpr(float("inf"))
LEAST = tl.constexpr(-(2**31))  # below every ordered logit
# Two counts in one int32: of tokens above a threshold (up to 4·MAX_K), and over them of tokens equal to it.
COUNT_BITS = tl.constexpr(13)
COUNT_MASK = tl.constexpr(2**13 - 1)
LEAST64 = tl.constexpr(-(2**63))
LOW31 = tl.constexpr(2**31 - 1)

MAX_K = 1024
# float32 bits that a logit of the type never uses: the bisection need not look at them
UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


class Tuning:
    """Sizes that only speed depends on: tokens a group, tokens and warps a program."""

    group = 128  # halved for k > 128
    scan_block = 4096
    scan_warps = 4
    pick_warps = 4
    select_tokens = 1024  # a warp
    select_tile = 2048  # tokens at a time
    weigh_group = 1024
    weigh_block = 4096
    weigh_warps = 4


@triton.jit
def _ordered(x):
    """float32 as an int32 that compares the same way; -0.0 is 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & LOW31)


@triton.jit
def _unordered(key):
    """The float32 of an `_ordered` int32."""
    return (key ^ ((key >> 31) & LOW31)).to(tl.float32, bitcast=True)


@triton.jit
def _exp2_exact(y, SHIFT: tl.constexpr):
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
def _transform(x, scale, cap, inverse_cap, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr, EXACT: tl.constexpr):
    """Scale, then softcap; infinities and NaN stay. EXACT: to the bits of `draws.exact_transform`."""
    if HAS_SCALE:
        x = x * scale
    if HAS_CAP:
        y = tl.abs(x * inverse_cap) * MINUS_2_LOG2E
        if EXACT:
            t = _exp2_exact(y, 0)
        else:
            t = tl.exp2(y)
        tanh = tl.div_rn(1.0 - t, 1.0 + t)
        capped = tl.where(x < 0.0, -tanh, tanh) * cap
        x = tl.where(tl.abs(x) < INF, capped, x)
    return x


@triton.jit
def _finite_or_zero(x):
    """A reference to subtract: −inf (nothing there) as 0, so that e^(−inf - reference) is 0 and not NaN."""
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def _log(x):
    """Natural logarithm, −inf of 0 (said aloud: the interpreter warns of it)."""
    return tl.where(x == 0.0, -INF, tl.log(tl.where(x == 0.0, 1.0, x)))


@triton.jit
def _sort_descending(x, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """A bitonic sort of SIZE = 2^STAGES integers. (tl.sort does the same, but takes seconds a row when interpreted.)"""
    place = tl.arange(0, SIZE)
    for stage in tl.static_range(1, STAGES + 1):
        for step in tl.static_range(stage):
            pairs = tl.reshape(x, [SIZE >> (stage - step), 2, 1 << (stage - 1 - step)])
            other = tl.reshape(tl.sum(pairs, axis=1)[:, None, :] - pairs, [SIZE])
            is_left = ((place >> (stage - 1 - step)) & 1) == 0
            descends = ((place >> stage) & 1) == 0
            x = tl.where(is_left == descends, tl.maximum(x, other), tl.minimum(x, other))
    return x


@triton.jit
def _column(token, stride_v, UNIT: tl.constexpr):
    """Offset of a token within its row."""
    if UNIT:
        return token
    else:
        return token.to(tl.int64) * stride_v


@triton.jit
def _scan(
    x_ptr,  # [N, V] any strides
    stride_n,
    stride_v,
    vocab,
    groups,  # NG = ceil(V / G)
    parts,  # programs a row
    log2e_over_t_ptr,  # [M] float32
    top_ptr,  # out [N, NG] float32: raw maxima
    sums_ptr,  # out [N, M, NG] float32
    finite_ptr,  # out [N, parts] int32
    scale,
    cap,
    inverse_cap,
    CHAIN: tl.constexpr,  # 16 bits a step: power of the exponential before (0: afresh), the temperature's number
    M: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    group = part * (BLOCK // G) + tl.arange(0, BLOCK // G)
    token = group[:, None] * G + tl.arange(0, G)[None, :]
    x = tl.load(x_ptr + row * stride_n + _column(token, stride_v, UNIT), mask=token < vocab, other=-INF)
    x = x.to(tl.float32)
    top = tl.max(x, axis=1)
    there = group < groups
    tl.store(top_ptr + row * groups + group, top, mask=there)
    finite = tl.minimum(vocab - part * BLOCK, BLOCK)
    # Counting costs three instructions a token, the minimum one.
    if tl.min(tl.min(x, axis=1), axis=0) == -INF:
        finite = tl.sum(tl.sum((x > -INF).to(tl.int32), axis=1), axis=0)
    tl.store(finite_ptr + row * parts + part, finite)
    reference = _finite_or_zero(_transform(top, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, False))
    d = _transform(x, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, False) - reference[:, None]
    for m in tl.static_range(M):
        if ((CHAIN >> (16 * m)) & 0xFF00) == 0x0000:
            e = tl.exp2(d * tl.load(log2e_over_t_ptr + ((CHAIN >> (16 * m)) & 0xFF)))
        elif ((CHAIN >> (16 * m)) & 0xFF00) == 0x0200:
            e = e * e
        else:
            e = e * e
            e = e * e
        at = row * (M * groups) + ((CHAIN >> (16 * m)) & 0xFF) * groups + group
        tl.store(sums_ptr + at, tl.sum(e, axis=1), mask=there)


@triton.jit
def _pick(
    top_ptr,  # [N, NG]
    sums_ptr,  # [N, M, NG]
    log2e_over_t_ptr,
    picked_ptr,  # out [N, KP] int32: numbers of the best groups, ascending
    rest_top_ptr,  # out [N] float32: raw maximum over all other groups
    rest_sums_ptr,  # out [N, M] float32: their sums, relative to it
    floor_ptr,  # out [N] int32: an ordered logit that is not above the k-th best token's
    k,  # min(k, V)
    take,  # min(k, NG)
    groups,
    scale,
    cap,
    inverse_cap,
    UNUSED: tl.constexpr,
    M: tl.constexpr,
    KP: tl.constexpr,
    NGP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, NGP)
    there = group < groups
    top = tl.load(top_ptr + row * groups + group, mask=there, other=-INF)
    key = tl.where(there, _ordered(top), LEAST)
    # The largest threshold that `take` groups reach, bit by bit from the top.
    threshold = tl.full([], LEAST, tl.int32)
    for i in range(32 - UNUSED):
        candidate = threshold ^ (tl.full([], 1, tl.int32) << (31 - i))
        threshold = tl.where(tl.sum((key >= candidate).to(tl.int32), axis=0) >= take, candidate, threshold)
    # the k-th best token is at least as good as the worst of k groups' best ones
    tl.store(floor_ptr + row, tl.where(take == k, threshold, LEAST))
    above = (key >> UNUSED) > (threshold >> UNUSED)
    equal = ((key >> UNUSED) == (threshold >> UNUSED)) & there
    need = take - tl.sum(above.to(tl.int32), axis=0)
    both = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << COUNT_BITS), axis=0)
    equals = both >> COUNT_BITS
    chosen = above | (equal & (equals <= need))
    place = (both & COUNT_MASK) + tl.minimum(equals, need) - 1
    tl.store(picked_ptr + row * KP + place, group, mask=chosen & (place < take))
    rest = there & (chosen == 0)
    rest_top = tl.max(tl.where(rest, top, -INF), axis=0)
    tl.store(rest_top_ptr + row, rest_top)
    reference = _finite_or_zero(_transform(rest_top, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, False))
    d = _transform(top, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, False) - reference
    for m in tl.static_range(M):
        sums = tl.load(sums_ptr + row * (M * groups) + m * groups + group, mask=rest, other=0.0)
        e = tl.where(rest, tl.exp2(d * tl.load(log2e_over_t_ptr + m)) * sums, 0.0)
        tl.store(rest_sums_ptr + row * M + m, tl.sum(e, axis=0))


@triton.jit
def _select(
    x_ptr,
    stride_n,
    stride_v,
    vocab,
    picked_ptr,  # [N, KP]
    floor_ptr,  # [N]
    log2e_over_t_ptr,
    head_ptr,  # out [N, ENTRIES] int64: (ordered logit, complement of the id), in no order: the k best, and maybe more
    count_ptr,  # out [N] int32: how many
    rest_top_ptr,  # out [N] float32: raw maximum of the picked groups' other tokens
    rest_sums_ptr,  # out [N, M] float32: their sums, relative to it
    k,  # min(k, V)
    take,
    scale,
    cap,
    inverse_cap,
    UNUSED: tl.constexpr,
    CHAIN: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    KP: tl.constexpr,
    ENTRIES: tl.constexpr,
    TILE: tl.constexpr,  # groups at a time
    UNIT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, KP)
    group = tl.load(picked_ptr + row * KP + place, mask=place < take, other=0)
    token = group[:, None] * G + tl.arange(0, G)[None, :]
    there = (place < take)[:, None] & (token < vocab)
    x = tl.load(x_ptr + row * stride_n + _column(token, stride_v, UNIT), mask=there, other=-INF).to(tl.float32)
    key = tl.where(there, _ordered(x), LEAST)
    # Few tokens reach the floor: these go on, all of them. Only where many tie is the k-th best looked for, bit by bit.
    low = tl.load(floor_ptr + row)
    want = tl.sum(tl.sum(((key >= low) & there).to(tl.int32), axis=1), axis=0)
    threshold = low
    if want > ENTRIES:
        want = k
        high = tl.max(tl.max(key, axis=1), axis=0)
        threshold = tl.full([], LEAST, tl.int32)
        for i in range(32 - UNUSED):
            bit = 31 - i
            if ((low ^ high) >> bit) == 0:  # it lies between two numbers that agree so far: no need to count
                threshold = (high >> bit) << bit
            else:
                candidate = threshold ^ (tl.full([], 1, tl.int32) << bit)
                count = tl.sum(tl.sum((key >= candidate).to(tl.int32), axis=1), axis=0)
                threshold = tl.where(count >= k, candidate, threshold)
    tl.store(count_ptr + row, want)
    level = threshold >> UNUSED
    is_below = (key >> UNUSED) < level
    is_level = ((key >> UNUSED) == level) & there
    above_all = tl.sum(tl.sum(((key >> UNUSED) > level).to(tl.int32), axis=1), axis=0)
    spare = above_all + tl.sum(tl.sum(is_level.to(tl.int32), axis=1), axis=0) - want  # equal, but not wanted
    need = want - above_all
    # The rest: what is below the level, and the spare ones, which all have its value.
    level_x = tl.max(tl.max(tl.where(is_level, x, -INF), axis=1), axis=0)
    rest = tl.where(is_below, x, -INF)
    rest_top = tl.where(spare > 0, level_x, tl.max(tl.max(rest, axis=1), axis=0))
    tl.store(rest_top_ptr + row, rest_top)
    reference = _finite_or_zero(_transform(rest_top, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, False))
    d = _transform(rest, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, False) - reference
    spares = tl.where((spare > 0) & (level_x > -INF), spare, 0).to(tl.float32)
    for m in tl.static_range(M):
        if ((CHAIN >> (16 * m)) & 0xFF00) == 0x0000:
            e = tl.exp2(d * tl.load(log2e_over_t_ptr + ((CHAIN >> (16 * m)) & 0xFF)))
        elif ((CHAIN >> (16 * m)) & 0xFF00) == 0x0200:
            e = e * e
        else:
            e = e * e
            e = e * e
        # where there are spare ones they are the rest's top: each adds e^0
        at = row * M + ((CHAIN >> (16 * m)) & 0xFF)
        tl.store(rest_sums_ptr + at, tl.sum(tl.sum(e, axis=1), axis=0) + spares)

    # Write the wanted ones down, a few groups at a time: all at once would take every register there is.
    seen = tl.full([], 0, tl.int32)
    for start in range(0, KP, TILE):
        places = start + tl.arange(0, TILE)
        members = tl.load(picked_ptr + row * KP + places, mask=places < take, other=0)
        tokens = members[:, None] * G + tl.arange(0, G)[None, :]
        inside = (places < take)[:, None] & (tokens < vocab)
        values = tl.load(x_ptr + row * stride_n + _column(tokens, stride_v, UNIT), mask=inside, other=-INF)
        keys = tl.where(inside, _ordered(values.to(tl.float32)), LEAST)
        above = (keys >> UNUSED) > level
        equal = ((keys >> UNUSED) == level) & inside
        # Groups ascend and so do the tokens in them: the first `need` of the equal ones have the lowest ids.
        both = above.to(tl.int32) + (equal.to(tl.int32) << COUNT_BITS)
        in_group = tl.sum(both, axis=1)
        both = seen + (tl.cumsum(in_group, axis=0) - in_group)[:, None] + tl.cumsum(both, axis=1)
        seen += tl.sum(in_group, axis=0)
        equals = both >> COUNT_BITS
        chosen = above | (equal & (equals <= need))
        slot = (both & COUNT_MASK) + tl.minimum(equals, need) - 1
        entry = (keys.to(tl.int64) << 32) | (tokens ^ LOW31).to(tl.int64)  # 2^31 - 1 - id
        tl.store(head_ptr + row * ENTRIES + slot, entry, mask=chosen & (slot < want))


@triton.jit
def _finish(
    head_ptr,  # [N, ENTRIES] int64
    count_ptr,  # [N]
    tops_ptr,  # [2, N] float32: raw maxima of what `_pick` and `_select` left
    sums_ptr,  # [2, N, M] float32
    finite_ptr,  # [N, parts] int32
    log2e_over_t_ptr,
    ids_ptr,  # out [N, K]
    logprobs_ptr,  # out [N, K]
    stride_out,
    tail_ptr,  # out [N, M]
    outcomes_ptr,  # out [N]
    state_ptr,  # out [5, N] float32: top z, log total, the head's last raw logit, the tail's raw top, 1.0 if finite
    edge_ptr,  # out [2, N] int32: the id of the head's last entry, the head's size
    rows,
    k,
    parts,
    cut_at,  # 1 - mass
    scale,
    cap,
    inverse_cap,
    ONE: tl.constexpr,  # the number of T = 1
    HAS_MASS: tl.constexpr,
    M: tl.constexpr,
    ENTRIES: tl.constexpr,
    STAGES: tl.constexpr,  # log2 of ENTRIES
    PARTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, ENTRIES)
    count = tl.load(count_ptr + row)
    entry = tl.load(head_ptr + row * ENTRIES + place, mask=place < count, other=LEAST64)
    entry = _sort_descending(entry, ENTRIES, STAGES)
    token = entry.to(tl.int32) ^ LOW31  # the lower half
    x = tl.where(place < count, _unordered((entry >> 32).to(tl.int32)), -INF)
    used = (x > -INF) & (place < k)
    z = _transform(x, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, False)

    left_x, right_x = tl.load(tops_ptr + row), tl.load(tops_ptr + rows + row)
    left = _transform(left_x, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, False)
    right = _transform(right_x, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, False)
    # the tail's third part: entries that did not make it into the head
    tail_x = tl.maximum(tl.maximum(left_x, right_x), tl.max(tl.where(used, -INF, x), axis=0))
    tail_top = tl.maximum(tl.maximum(left, right), tl.max(tl.where(used, -INF, z), axis=0))
    top = tl.maximum(tl.max(z, axis=0), tail_top)
    log2e = tl.load(log2e_over_t_ptr + ONE)
    reference = _finite_or_zero(tail_top)
    mass = tl.load(sums_ptr + row * M + ONE) * tl.exp2((left - reference) * log2e)
    mass += tl.load(sums_ptr + (rows + row) * M + ONE) * tl.exp2((right - reference) * log2e)
    mass += tl.sum(tl.exp2((tl.where(used, -INF, z) - reference) * log2e), axis=0)
    mass *= tl.exp2((tail_top - top) * log2e)
    d = tl.where(used, z - top, -INF)
    p = tl.exp2(d * log2e)
    total = tl.sum(p, axis=0) + mass
    # (top, log total) stay two numbers: their sum would lose what is small beside a logit of 1e4
    log_total = _log(total)
    fine = tl.abs(top + log_total) < INF
    log_total = tl.where(fine, log_total, float("nan"))
    logprob = d - log_total

    kept = used
    if HAS_MASS:
        # What lies behind the entries before this one, summed from the far end: exact where 1 - sum would be noise.
        behind = (tl.cumsum(p, axis=0, reverse=True) + mass) / total
        kept = used & ((behind > cut_at) | (place == 0))
        tail_x = tl.maximum(tail_x, tl.max(tl.where(kept, -INF, x), axis=0))
        tail_top = tl.maximum(tail_top, tl.max(tl.where(kept, -INF, z), axis=0))
        reference = _finite_or_zero(tail_top)
    left_out = tl.where(kept, -INF, z) - reference
    size = tl.sum(kept.to(tl.int32), axis=0)
    for m in tl.static_range(M):
        c = tl.load(log2e_over_t_ptr + m)
        s = tl.load(sums_ptr + row * M + m) * tl.exp2((left - reference) * c)
        s += tl.load(sums_ptr + (rows + row) * M + m) * tl.exp2((right - reference) * c)
        s += tl.sum(tl.exp2(left_out * c), axis=0)
        # c / log2e is 1/T
        tl.store(tail_ptr + row * M + m, _log(s) + ((tail_top - top) - log_total) * (c / log2e))
    unused = log_total - INF  # −inf, or NaN in a row that is not fine
    tl.store(ids_ptr + row * stride_out + place, tl.where(kept, token, 0), mask=place < k)
    tl.store(logprobs_ptr + row * stride_out + place, tl.where(kept, logprob, unused), mask=place < k)
    part = tl.arange(0, PARTS)
    finite = tl.sum(tl.load(finite_ptr + row * parts + part, mask=part < parts, other=0), axis=0)
    tl.store(outcomes_ptr + row, finite - size)
    last = kept & (place == size - 1)
    tl.store(state_ptr + row, top)
    tl.store(state_ptr + rows + row, log_total)
    tl.store(state_ptr + 2 * rows + row, tl.min(tl.where(last, x, INF), axis=0))
    tl.store(state_ptr + 3 * rows + row, tail_x)
    tl.store(state_ptr + 4 * rows + row, fine.to(tl.float32))
    tl.store(edge_ptr + row, tl.max(tl.where(last, token, -1), axis=0))
    tl.store(edge_ptr + rows + row, size)


@triton.jit
def _weights(x, token, vocab, edge_x, edge_id, top, draw_scale, scale, cap, inverse_cap, BITS, HAS_SCALE, HAS_CAP):
    """`draws.integer_weights` of the tokens of the tail; 0 for those of the head: the ones up to (edge_x, edge_id)."""
    z = _transform(x, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, True)
    weight = _exp2_exact((z - top) * draw_scale, BITS).to(tl.int64)
    head = (x > edge_x) | ((x == edge_x) & (token <= edge_id))
    return tl.where(head | (token >= vocab), 0, weight)


@triton.jit
def _weigh(
    x_ptr,
    stride_n,
    stride_v,
    vocab,
    groups,
    parts,
    state_ptr,  # [5, N], as `_finish` left it
    edge_ptr,  # [2, N]
    weights_ptr,  # out [N, groups] int64
    rows,
    draw_scale,
    scale,
    cap,
    inverse_cap,
    BITS: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    group = part * (BLOCK // G) + tl.arange(0, BLOCK // G)
    token = group[:, None] * G + tl.arange(0, G)[None, :]
    x = tl.load(x_ptr + row * stride_n + _column(token, stride_v, UNIT), mask=token < vocab, other=-INF)
    x = x.to(tl.float32)
    edge_x, edge_id = tl.load(state_ptr + 2 * rows + row), tl.load(edge_ptr + row)
    top = tl.load(state_ptr + 3 * rows + row)
    top = _finite_or_zero(_transform(top, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, True))
    weight = _weights(
        x, token, vocab, edge_x, edge_id, top, draw_scale, scale, cap, inverse_cap, BITS, HAS_SCALE, HAS_CAP
    )
    tl.store(weights_ptr + row * groups + group, tl.sum(weight, axis=1), mask=group < groups)


@triton.jit
def _invert(
    x_ptr,
    stride_n,
    stride_v,
    vocab,
    groups,
    draws,
    state_ptr,
    edge_ptr,
    weights_ptr,  # [N, groups] int64
    uniform_ptr,  # [N, draws] float64
    drawn_ptr,  # out [N, draws] int64
    rows,
    draw_scale,
    scale,
    cap,
    inverse_cap,
    BITS: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    draw = tl.program_id(0).to(tl.int64)
    row = draw // draws
    number = tl.arange(0, GROUPS)
    weights = tl.load(weights_ptr + row * groups + number, mask=number < groups, other=0)
    running = tl.cumsum(weights, axis=0)
    total = tl.sum(weights, axis=0)
    at = (tl.load(uniform_ptr + draw) * total.to(tl.float64)).to(tl.int64)
    at = tl.minimum(at, total - 1)
    # every running sum up to `at` belongs to a group that ends before it
    before = running <= at
    group = tl.minimum(tl.sum(before.to(tl.int32), axis=0), groups - 1)
    at -= tl.max(tl.where(before, running, 0), axis=0)
    token = group * G + tl.arange(0, G)
    x = tl.load(x_ptr + row * stride_n + _column(token, stride_v, UNIT), mask=token < vocab, other=-INF)
    x = x.to(tl.float32)
    edge_x, edge_id = tl.load(state_ptr + 2 * rows + row), tl.load(edge_ptr + row)
    top = tl.load(state_ptr + 3 * rows + row)
    top = _finite_or_zero(_transform(top, scale, cap, inverse_cap, HAS_SCALE, HAS_CAP, True))
    weight = _weights(
        x, token, vocab, edge_x, edge_id, top, draw_scale, scale, cap, inverse_cap, BITS, HAS_SCALE, HAS_CAP
    )
    inside = tl.sum((tl.cumsum(weight, axis=0) <= at).to(tl.int32), axis=0)
    tl.store(drawn_ptr + draw, tl.minimum(group * G + inside, vocab - 1).to(tl.int64))


# The Triton interpreter runs the kernels on CPU tensors; it is chosen when triton is imported.
INTERPRETED = is_interpreted(_scan)

_scales: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _log2e_over_t(temperatures: tuple[float, ...], device: torch.device) -> Tensor:
    """log2(e)/T `[M]` float32 on a device, copied there once."""
    key = (temperatures, device)
    if key not in _scales:
        _scales[key] = torch.tensor([dr.LOG2E / t for t in temperatures], dtype=torch.float32).to(device)
    return _scales[key]


def fill_triton(logits_NV: Tensor, out: Rows, plan: Plan, positions_N: Tensor, first_row: int) -> None:
    """Fill `out` from logits `[N, V]` (bfloat16, float16 or float32, any stride), k at most MAX_K.

    `first_row`: the number of the first row in an error message, which only CPU tensors can give.
    """
    on = torch.cuda.device(logits_NV.device) if logits_NV.is_cuda else contextlib.nullcontext()
    with on:
        _launch(logits_NV, out, plan, positions_N, first_row)


def _launch(x: Tensor, out: Rows, plan: Plan, positions_N: Tensor, first_row: int) -> None:
    rows, vocab = x.shape
    if x.device.type == "cpu":
        refuse(x.amax(1).isfinite(), x, first_row)
    k, many, device = plan.k, len(plan.temperatures), x.device
    stride_n, stride_v = x.stride()
    unit = stride_v == 1
    scales = _log2e_over_t(plan.temperatures, device)
    chain = sum((m | power << 8) << (16 * i) for i, (m, power) in enumerate(plan.chains()))
    unused = UNUSED_BITS[x.dtype]
    head_transform = (
        plan.logit_scale if plan.logit_scale is not None else 1.0,
        plan.softcap if plan.softcap is not None else 1.0,
        dr.reciprocal(plan.softcap) if plan.softcap is not None else 1.0,
    )
    flags = {"HAS_SCALE": plan.logit_scale is not None, "HAS_CAP": plan.softcap is not None}

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    group = Tuning.group if k <= 128 else Tuning.group // 2
    groups = triton.cdiv(vocab, group)
    block = max(group, min(Tuning.scan_block, triton.next_power_of_2(groups * group)))
    parts = triton.cdiv(groups * group, block)
    take = min(k, groups)
    padded_k = max(16, triton.next_power_of_2(k))
    group_tops, group_sums = scratch(rows, groups), scratch(rows, many, groups)
    finite = scratch(rows, parts, dtype=torch.int32)
    entries = 4 * padded_k
    picked, head = scratch(rows, padded_k, dtype=torch.int32), scratch(rows, entries, dtype=torch.int64)
    count, floor = scratch(rows, dtype=torch.int32), scratch(rows, dtype=torch.int32)
    # what the head leaves: in groups not picked [0], and in those picked [1]
    rest_tops, rest_sums = scratch(2, rows), scratch(2, rows, many)
    state, edge = scratch(5, rows), scratch(2, rows, dtype=torch.int32)

    _scan[(rows * parts,)](
        x, stride_n, stride_v, vocab, groups, parts, scales, group_tops, group_sums, finite, *head_transform,
        CHAIN=chain, M=many, G=group, BLOCK=block, UNIT=unit, **flags, num_warps=Tuning.scan_warps,
    )  # fmt: skip
    _pick[(rows,)](
        group_tops, group_sums, scales, picked, rest_tops[0], rest_sums[0], floor, k, take, groups, *head_transform,
        UNUSED=unused, M=many, KP=padded_k, NGP=triton.next_power_of_2(groups), **flags, num_warps=Tuning.pick_warps,
    )  # fmt: skip
    if k:
        tokens = padded_k * group
        _select[(rows,)](
            x, stride_n, stride_v, vocab, picked, floor, scales, head, count, rest_tops[1], rest_sums[1], k, take,
            *head_transform,
            UNUSED=unused, CHAIN=chain, M=many, G=group, KP=padded_k,
            ENTRIES=entries, TILE=min(padded_k, max(1, Tuning.select_tile // group)), UNIT=unit, **flags,
            num_warps=min(32, max(4, tokens // Tuning.select_tokens)),
        )  # fmt: skip
    else:
        count.zero_()
        rest_tops[1].fill_(-torch.inf)
        rest_sums[1].zero_()
    _finish[(rows,)](
        head, count, rest_tops, rest_sums, finite, scales, out.ids, out.logprobs, out.ids.stride(0), out.tail,
        out.outcomes, state, edge, rows, k, parts, 1.0 - plan.mass if plan.mass is not None else 0.0, *head_transform,
        ONE=plan.temperatures.index(1.0), HAS_MASS=plan.mass is not None, M=many, ENTRIES=entries,
        STAGES=entries.bit_length() - 1,
        PARTS=triton.next_power_of_2(parts), **flags, num_warps=1 if padded_k <= 64 else 4,
    )  # fmt: skip
    if plan.draws:
        fine = state[4] > 0
        drawn = _draw(x, state, edge, plan, positions_N, head_transform, flags)
        out.logprobs[:, k:].masked_fill_(~fine[:, None], torch.nan)
        has_tail = fine & (state[3] > -torch.inf)
        merge_drawn(x, drawn, has_tail, edge[1].long(), state[0], state[1], out, plan)


def _draw(
    x: Tensor,
    state: Tensor,
    edge: Tensor,
    plan: Plan,
    positions_N: Tensor,
    head_transform: tuple[float, float, float],
    flags: dict[str, bool],
) -> Tensor:
    """Drawn ids int64 `[N, draws]`; anything in rows without a tail."""
    rows, vocab = x.shape
    stride_n, stride_v = x.stride()
    unit, bits = stride_v == 1, dr.weight_bits(vocab)
    group = min(Tuning.weigh_group, triton.next_power_of_2(vocab))
    groups = triton.cdiv(vocab, group)
    block = max(group, min(Tuning.weigh_block, triton.next_power_of_2(groups * group)))
    parts = triton.cdiv(groups * group, block)
    weights = torch.empty((rows, groups), dtype=torch.int64, device=x.device)
    drawn = torch.empty((rows, plan.draws), dtype=torch.int64, device=x.device)
    uniform = dr.uniforms(plan.seed, positions_N, plan.draws)
    draw_scale = dr.exponent_scale(plan.draw_temperature)
    # fused multiply-adds round once where the twin rounds twice, and another token could be drawn
    exact = {"enable_fp_fusion": False, "num_warps": Tuning.weigh_warps}
    _weigh[(rows * parts,)](
        x, stride_n, stride_v, vocab, groups, parts, state, edge, weights, rows, draw_scale, *head_transform,
        BITS=bits, G=group, BLOCK=block, UNIT=unit, **flags, **exact,
    )  # fmt: skip
    _invert[(rows * plan.draws,)](
        x, stride_n, stride_v, vocab, groups, plan.draws, state, edge, weights, uniform, drawn, rows, draw_scale,
        *head_transform, BITS=bits, G=group, GROUPS=triton.next_power_of_2(groups), UNIT=unit, **flags, **exact,
    )  # fmt: skip
    return drawn
