# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels of the top-k entries and the tails: one read of the logits, then work on what that read singled out.

1. `_scan` reads the logits once. Every group of G neighbouring tokens leaves its maximum and `Σ e^((z - max)/T)` for
   every temperature; every program the number of its finite logits.
2. `_pick`, a program a row, finds the row's k best groups by bisection on the bits of their maxima, and adds up the
   sums of all the others.
3. `_select`, a program a row, reads the k groups again, keeps the tokens that reach the worst of the k maxima (the k
   best and seldom many more; where too many do, exactly the k best), and adds up the rest.
4. `_finish` sorts these tokens, drops entries by `mass` and writes log-probabilities and tails.

No sum is the difference of two others, and a top-k entry is never in the tail's sums, so nothing cancels. Sums
run in a fixed order without atomics: results are the same bits on every run. `triton_impl.py` launches them.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from ..triton_math import INF, finite_or_zero, log
from .triton_math import LOW31, chain_step, column, ordered, sort_descending, transform, unordered

LEAST = constexpr(-(2**31))  # below every ordered logit
LEAST64 = constexpr(-(2**63))
# Two counts in one int32: of tokens above a threshold (up to four times the largest k), and over them of tokens equal.
COUNT_BITS = constexpr(13)
COUNT_MASK = constexpr(2**13 - 1)


@triton.jit
def _scan(
    x_ptr, stride_n, stride_v, vocab,  # [N, V] of any strides
    groups,  # NG = ceil(V / G)
    parts,  # programs a row
    log2e_over_t_ptr,  # [M] float32
    top_ptr,  # out [N, NG] float32: raw maxima
    sums_ptr,  # out [N, M, NG] float32
    finite_ptr,  # out [N, parts] int32
    scale, cap, inverse_cap,
    CHAIN: constexpr,  # 16 bits a step: see `chain_step`
    M: constexpr, G: constexpr, BLOCK: constexpr, UNIT: constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    group = part * (BLOCK // G) + tl.arange(0, BLOCK // G)
    token = group[:, None] * G + tl.arange(0, G)[None, :]
    x = tl.load(x_ptr + row * stride_n + column(token, stride_v, UNIT), mask=token < vocab, other=-INF)
    x = x.to(tl.float32)
    top = tl.max(x, axis=1)
    there = group < groups
    tl.store(top_ptr + row * groups + group, top, mask=there)
    finite = tl.minimum(vocab - part * BLOCK, BLOCK)
    # Counting costs three instructions a token, the minimum one.
    if tl.min(tl.min(x, axis=1), axis=0) == -INF:
        finite = tl.sum(tl.sum((x > -INF).to(tl.int32), axis=1), axis=0)
    tl.store(finite_ptr + row * parts + part, finite)
    reference = finite_or_zero(transform(top, scale, cap, inverse_cap, False))
    d = transform(x, scale, cap, inverse_cap, False) - reference[:, None]
    e = d
    for m in tl.static_range(M):
        e = chain_step(e, d, log2e_over_t_ptr, (CHAIN >> (16 * m)) & 0xFFFF)
        at = row * (M * groups) + ((CHAIN >> (16 * m)) & 0xFF) * groups + group
        tl.store(sums_ptr + at, tl.sum(e, axis=1), mask=there)


@triton.jit
def _pick(
    top_ptr, sums_ptr, log2e_over_t_ptr,  # as `_scan` has them
    picked_ptr,  # out [N, KP] int32: numbers of the best groups, ascending
    rest_top_ptr,  # out [N] float32: raw maximum over all other groups
    rest_sums_ptr,  # out [N, M] float32: their sums, relative to it
    floor_ptr,  # out [N] int32: an ordered logit that is not above the k-th best token's
    entries,  # top-k entries: min(k, V)
    take,  # min(entries, NG)
    groups, scale, cap, inverse_cap,
    UNUSED: constexpr, M: constexpr, KP: constexpr, NGP: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, NGP)
    there = group < groups
    top = tl.load(top_ptr + row * groups + group, mask=there, other=-INF)
    key = tl.where(there, ordered(top), LEAST)
    # The largest threshold that `take` groups reach, bit by bit from the top.
    threshold = tl.full([], LEAST, tl.int32)
    for i in range(32 - UNUSED):
        candidate = threshold ^ (tl.full([], 1, tl.int32) << (31 - i))
        threshold = tl.where(tl.sum((key >= candidate).to(tl.int32), axis=0) >= take, candidate, threshold)
    # the k-th best token is at least as good as the worst of k groups' best ones
    tl.store(floor_ptr + row, tl.where(take == entries, threshold, LEAST))
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
    reference = finite_or_zero(transform(rest_top, scale, cap, inverse_cap, False))
    d = transform(top, scale, cap, inverse_cap, False) - reference
    for m in tl.static_range(M):
        sums = tl.load(sums_ptr + row * (M * groups) + m * groups + group, mask=rest, other=0.0)
        e = tl.where(rest, tl.exp2(d * tl.load(log2e_over_t_ptr + m)) * sums, 0.0)
        tl.store(rest_sums_ptr + row * M + m, tl.sum(e, axis=0))


@triton.jit
def _select(
    x_ptr, stride_n, stride_v, vocab,
    picked_ptr, floor_ptr, log2e_over_t_ptr,  # as `_pick` has them
    best_ptr,  # out [N, CANDIDATES] int64: (ordered logit, complement of the id), unordered: the top-k, and maybe more
    count_ptr,  # out [N] int32: how many
    rest_top_ptr,  # out [N] float32: raw maximum of the picked groups' other tokens
    rest_sums_ptr,  # out [N, M] float32: their sums, relative to it
    entries, take, scale, cap, inverse_cap,
    UNUSED: constexpr, CHAIN: constexpr, M: constexpr, G: constexpr, KP: constexpr, CANDIDATES: constexpr,
    TILE: constexpr,  # groups at a time
    UNIT: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, KP)
    group = tl.load(picked_ptr + row * KP + place, mask=place < take, other=0)
    token = group[:, None] * G + tl.arange(0, G)[None, :]
    there = (place < take)[:, None] & (token < vocab)
    x = tl.load(x_ptr + row * stride_n + column(token, stride_v, UNIT), mask=there, other=-INF).to(tl.float32)
    key = tl.where(there, ordered(x), LEAST)
    # Usually few tokens reach the floor, and all are kept. Only if many tie is the k-th best searched for, bit by bit.
    low = tl.load(floor_ptr + row)
    want = tl.sum(tl.sum(((key >= low) & there).to(tl.int32), axis=1), axis=0)
    threshold = low
    if want > CANDIDATES:
        want = entries
        high = tl.max(tl.max(key, axis=1), axis=0)
        threshold = tl.full([], LEAST, tl.int32)
        for i in range(32 - UNUSED):
            bit = 31 - i
            if ((low ^ high) >> bit) == 0:  # it lies between two numbers that agree so far: no need to count
                threshold = (high >> bit) << bit
            else:
                candidate = threshold ^ (tl.full([], 1, tl.int32) << bit)
                count = tl.sum(tl.sum((key >= candidate).to(tl.int32), axis=1), axis=0)
                threshold = tl.where(count >= entries, candidate, threshold)
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
    reference = finite_or_zero(transform(rest_top, scale, cap, inverse_cap, False))
    d = transform(rest, scale, cap, inverse_cap, False) - reference
    spares = tl.where((spare > 0) & (level_x > -INF), spare, 0).to(tl.float32)
    e = d
    for m in tl.static_range(M):
        e = chain_step(e, d, log2e_over_t_ptr, (CHAIN >> (16 * m)) & 0xFFFF)
        # spare ones, if any, are the rest's top: each adds e^0
        at = row * M + ((CHAIN >> (16 * m)) & 0xFF)
        tl.store(rest_sums_ptr + at, tl.sum(tl.sum(e, axis=1), axis=0) + spares)

    # Write the selected ones, a few groups at a time: all at once would need too many registers.
    seen = tl.full([], 0, tl.int32)
    for start in range(0, KP, TILE):
        places = start + tl.arange(0, TILE)
        members = tl.load(picked_ptr + row * KP + places, mask=places < take, other=0)
        tokens = members[:, None] * G + tl.arange(0, G)[None, :]
        inside = (places < take)[:, None] & (tokens < vocab)
        values = tl.load(x_ptr + row * stride_n + column(tokens, stride_v, UNIT), mask=inside, other=-INF)
        keys = tl.where(inside, ordered(values.to(tl.float32)), LEAST)
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
        tl.store(best_ptr + row * CANDIDATES + slot, entry, mask=chosen & (slot < want))


@triton.jit
def _finish(
    best_ptr,  # [N, CANDIDATES] int64
    count_ptr,  # [N]
    tops_ptr,  # [2, N] float32: raw maxima of what `_pick` and `_select` left
    sums_ptr,  # [2, N, M] float32
    finite_ptr,  # [N, parts] int32
    log2e_over_t_ptr,
    ids_ptr, logprobs_ptr, stride_out,  # out [N, K]
    tail_ptr,  # out [N, M]
    outcomes_ptr,  # out [N]
    state_ptr,  # out [5, N] float32: top z, log total, the last entry's raw logit, the tail's raw top, 1.0 if finite
    edge_ptr,  # out [2, N] int32: the id of the last top-k entry, and how many are kept
    rows, entries, parts,
    cut_at,  # 1 - mass
    scale, cap, inverse_cap,
    ONE: constexpr,  # the number of T = 1
    HAS_MASS: constexpr, M: constexpr, CANDIDATES: constexpr,
    STAGES: constexpr,  # log2 of CANDIDATES
    PARTS: constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, CANDIDATES)
    count = tl.load(count_ptr + row)
    entry = tl.load(best_ptr + row * CANDIDATES + place, mask=place < count, other=LEAST64)
    entry = sort_descending(entry, CANDIDATES, STAGES)
    token = entry.to(tl.int32) ^ LOW31  # the lower half
    x = tl.where(place < count, unordered((entry >> 32).to(tl.int32)), -INF)
    used = (x > -INF) & (place < entries)
    z = transform(x, scale, cap, inverse_cap, False)

    left_x, right_x = tl.load(tops_ptr + row), tl.load(tops_ptr + rows + row)
    left = transform(left_x, scale, cap, inverse_cap, False)
    right = transform(right_x, scale, cap, inverse_cap, False)
    # the tail's third part: candidates that are no top-k entries
    tail_x = tl.maximum(tl.maximum(left_x, right_x), tl.max(tl.where(used, -INF, x), axis=0))
    tail_top = tl.maximum(tl.maximum(left, right), tl.max(tl.where(used, -INF, z), axis=0))
    top = tl.maximum(tl.max(z, axis=0), tail_top)
    log2e = tl.load(log2e_over_t_ptr + ONE)
    reference = finite_or_zero(tail_top)
    mass = tl.load(sums_ptr + row * M + ONE) * tl.exp2((left - reference) * log2e)
    mass += tl.load(sums_ptr + (rows + row) * M + ONE) * tl.exp2((right - reference) * log2e)
    mass += tl.sum(tl.exp2((tl.where(used, -INF, z) - reference) * log2e), axis=0)
    mass *= tl.exp2((tail_top - top) * log2e)
    d = tl.where(used, z - top, -INF)
    p = tl.exp2(d * log2e)
    total = tl.sum(p, axis=0) + mass
    # (top, log total) stay two numbers: their sum would lose what is small beside a logit of 1e4
    log_total = log(total)
    fine = tl.abs(top + log_total) < INF
    # a finite logit that float32 cannot hold relative to the best: in the tail, among the entries
    fine = fine & ((tail_x == -INF) | (tail_top - top > -INF))
    fine = fine & (tl.max((used & (d == -INF)).to(tl.int32), axis=0) == 0)
    log_total = tl.where(fine, log_total, float("nan"))
    logprob = d - log_total

    kept = used
    if HAS_MASS:
        # What lies behind the entries before this one, summed from the far end: exact where 1 - sum would be noise.
        behind = (tl.cumsum(p, axis=0, reverse=True) + mass) / total
        kept = used & ((behind > cut_at) | (place == 0))
        tail_x = tl.maximum(tail_x, tl.max(tl.where(kept, -INF, x), axis=0))
        tail_top = tl.maximum(tail_top, tl.max(tl.where(kept, -INF, z), axis=0))
        reference = finite_or_zero(tail_top)
    left_out = tl.where(kept, -INF, z) - reference
    size = tl.sum(kept.to(tl.int32), axis=0)
    for m in tl.static_range(M):
        c = tl.load(log2e_over_t_ptr + m)
        s = tl.load(sums_ptr + row * M + m) * tl.exp2((left - reference) * c)
        s += tl.load(sums_ptr + (rows + row) * M + m) * tl.exp2((right - reference) * c)
        s += tl.sum(tl.exp2(left_out * c), axis=0)
        # c / log2e is 1/T
        tl.store(tail_ptr + row * M + m, log(s) + ((tail_top - top) - log_total) * (c / log2e))
    unused = log_total - INF  # −inf, or NaN in a row that is not fine
    tl.store(ids_ptr + row * stride_out + place, tl.where(kept, token, 0), mask=place < entries)
    tl.store(logprobs_ptr + row * stride_out + place, tl.where(kept, logprob, unused), mask=place < entries)
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
