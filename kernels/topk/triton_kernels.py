# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The kernels of the top-k entries and the tails: one read of the logits, then work on what that read singled out.

1. `_scan` reads the logits once. Every group of G tokens leaves its maximum and `Σ e^((z - max)/T)` for every
   temperature; every program the number of its finite logits. A group lies scattered over a block of tokens, so that a
   thread that loads neighbouring ones has most of a group to itself.
2. `_pick`, a program a row, finds the row's k best groups by bisection on the bits of their maxima, and adds up the
   sums of all the others.
3. `_select`, a program a row, reads these groups again, lists the runs of 8 tokens that reach the worst of the k maxima
   (some k), and adds up the others.
4. `_sift` reads these runs, writes their tokens that reach it as candidates (the k best and seldom many more), and adds
   up the others. `_sift_ties` does 3 and 4 again for the rows where too many reach it: exactly the k best.
5. `_finish` sorts the candidates, drops entries by `mass` and writes log-probabilities and tails.

No sum is the difference of two others, and a top-k entry is never in the tail's sums, so nothing cancels. Sums
run in a fixed order. Only the places of candidates come from an atomic counter, and they are sorted: results are the
same bits on every run. `select_kernels.py` has 3 and 4; `triton_impl.py` launches them.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from ..triton_math import INF, finite_or_zero, log
from .triton_math import (
    LEAST,
    LOW31,
    chain_step,
    column,
    ordered,
    sort_descending,
    transform,
    unordered,
    with_unused_bits,
)

LEAST64 = constexpr(-(2**63))
LOWEST_KEY = constexpr(-(2**31) + 2**23)  # of the lowest finite float32


@triton.jit
def _scan(
    x_ptr, stride_n, stride_v, vocab,  # [N, V] of any strides
    parts,  # programs a row
    log2e_over_t_ptr,  # [M] float32
    top_ptr,  # out [N, NG] float32: raw maxima, of NG = parts * (BLOCK // G) groups
    sums_ptr,  # out [N, M, NG] float32
    finite_ptr,  # out [N, parts] int32
    scale, cap, inverse_cap,
    CHAIN: constexpr,  # 16 bits a step: see `chain_step`
    M: constexpr, G: constexpr, RUN: constexpr, BLOCK: constexpr, UNIT: constexpr,
):  # fmt: skip
    GROUPS: constexpr = BLOCK // G  # a program
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    token = part * BLOCK + tl.arange(0, BLOCK)
    at = x_ptr + row * stride_n + column(token, stride_v, UNIT)
    # A load without a mask is a vector load wherever the rows are aligned, whatever the vocabulary.
    if (part + 1) * BLOCK <= vocab:
        raw = tl.load(at)
    else:
        raw = tl.load(at, mask=token < vocab, other=-INF)
    # [run, group, token in the run]: most of a group lies in one thread, which needs no other one for its sums
    x = tl.reshape(raw, [G // RUN, GROUPS, RUN]).to(tl.float32)
    top = tl.max(tl.max(x, axis=0), axis=1)
    group = part * GROUPS + tl.arange(0, GROUPS)
    groups = parts * GROUPS
    tl.store(top_ptr + row * groups + group, top)
    finite = tl.minimum(vocab - part * BLOCK, BLOCK)
    # Counting costs three instructions a token, the minimum one.
    if tl.min(x) == -INF:
        finite = tl.sum((x > -INF).to(tl.int32))
    tl.store(finite_ptr + row * parts + part, finite)
    reference = finite_or_zero(transform(top, scale, cap, inverse_cap, False))
    d = transform(x, scale, cap, inverse_cap, False) - reference[None, :, None]
    e = d
    for m in tl.static_range(M):
        e = chain_step(e, d, log2e_over_t_ptr, (CHAIN >> (16 * m)) & 0xFFFF)
        at_sums = row * (M * groups) + ((CHAIN >> (16 * m)) & 0xFF) * groups + group
        tl.store(sums_ptr + at_sums, tl.sum(tl.sum(e, axis=0), axis=1))


@triton.jit
def _pick(
    top_ptr, sums_ptr, log2e_over_t_ptr,  # as `_scan` has them
    picked_ptr, stride_picked,  # out int32: numbers of the best groups, ascending
    picked_count_ptr,  # out [N] int32: how many
    floor_ptr,  # out [N] float32: a finite logit that is not above the k-th best token's
    counter_ptr,  # out [N] int32: 0
    rest_top_ptr,  # out [N] float32: raw maximum over all other groups
    rest_sums_ptr,  # out [N, M] float32: their sums, relative to it
    entries,  # top-k entries: min(k, V)
    take,  # min(entries, NG)
    groups, scale, cap, inverse_cap,
    UNUSED: constexpr, M: constexpr, GROUPS: constexpr, NGP: constexpr,
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
    floor = tl.where(take == entries, tl.maximum(with_unused_bits(threshold, UNUSED), LOWEST_KEY), LOWEST_KEY)
    tl.store(floor_ptr + row, unordered(floor))
    tl.store(counter_ptr + row, 0)
    above = (key >> UNUSED) > (threshold >> UNUSED)
    equal = ((key >> UNUSED) == (threshold >> UNUSED)) & there
    need = take - tl.sum(above.to(tl.int32), axis=0)
    # Of groups that tie, those whose tokens have the lower ids: blocks ascend. The groups of one block do not, so that
    # all of the last block that tie are picked.
    equals = tl.cumsum(equal.to(tl.int32), axis=0)
    last_block = tl.min(tl.where(equal & (equals >= need), group // GROUPS, NGP), axis=0)
    chosen = above | (equal & (group // GROUPS <= last_block) & (need > 0))
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(picked_ptr + row * stride_picked + place, group, mask=chosen)
    tl.store(picked_count_ptr + row, tl.sum(chosen.to(tl.int32), axis=0))
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
def _finish(
    best_ptr, count_ptr,  # as `_sift` has them
    tops_ptr,  # [3, N] float32: raw maxima of what `_pick`, `_select` and `_sift` left
    sums_ptr,  # [3, N, M] float32
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
    entry = tl.load(best_ptr + row * CANDIDATES + place, mask=place < count, other=0)
    key = ordered((entry >> 32).to(tl.int32).to(tl.float32, bitcast=True))
    entry = (key.to(tl.int64) << 32) | (entry.to(tl.int32) ^ LOW31).to(tl.int64)  # of equal ones the lower id first
    entry = sort_descending(tl.where(place < count, entry, LEAST64), count, CANDIDATES, STAGES)
    token = entry.to(tl.int32) ^ LOW31  # the lower half
    x = tl.where(place < count, unordered((entry >> 32).to(tl.int32)), -INF)
    used = (x > -INF) & (place < entries)
    z = transform(x, scale, cap, inverse_cap, False)

    # the tail: three parts that are summed, and candidates that are no top-k entries
    part = tl.arange(0, 4)
    part_x = tl.load(tops_ptr + part * rows + row, mask=part < 3, other=-INF)
    part_z = transform(part_x, scale, cap, inverse_cap, False)
    part_sums = sums_ptr + (part * rows + row) * M
    tail_x = tl.maximum(tl.max(part_x, axis=0), tl.max(tl.where(used, -INF, x), axis=0))
    tail_top = tl.maximum(tl.max(part_z, axis=0), tl.max(tl.where(used, -INF, z), axis=0))
    top = tl.maximum(tl.max(z, axis=0), tail_top)
    log2e = tl.load(log2e_over_t_ptr + ONE)
    reference = finite_or_zero(tail_top)
    part_mass = tl.load(part_sums + ONE, mask=part < 3, other=0.0)
    mass = tl.sum(part_mass * tl.exp2((part_z - reference) * log2e), axis=0)
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
        s = tl.sum(tl.load(part_sums + m, mask=part < 3, other=0.0) * tl.exp2((part_z - reference) * c), axis=0)
        s += tl.sum(tl.exp2(left_out * c), axis=0)
        # c / log2e is 1/T
        tl.store(tail_ptr + row * M + m, log(s) + ((tail_top - top) - log_total) * (c / log2e))
    unused = log_total - INF  # −inf, or NaN in a row that is not fine
    tl.store(ids_ptr + row * stride_out + place, tl.where(kept, token, 0), mask=place < entries)
    tl.store(logprobs_ptr + row * stride_out + place, tl.where(kept, logprob, unused), mask=place < entries)
    program = tl.arange(0, PARTS)
    finite = tl.sum(tl.load(finite_ptr + row * parts + program, mask=program < parts, other=0), axis=0)
    tl.store(outcomes_ptr + row, finite - size)
    last = kept & (place == size - 1)
    tl.store(state_ptr + row, top)
    tl.store(state_ptr + rows + row, log_total)
    tl.store(state_ptr + 2 * rows + row, tl.min(tl.where(last, x, INF), axis=0))
    tl.store(state_ptr + 3 * rows + row, tail_x)
    tl.store(state_ptr + 4 * rows + row, fine.to(tl.float32))
    tl.store(edge_ptr + row, tl.max(tl.where(last, token, -1), axis=0))
    tl.store(edge_ptr + rows + row, size)
