# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment,attr-defined"
"""The loss in Triton: one program per row, one online pass over its logits, one write of its gradient.

The first pass collects the row's statistics: a reference and the sums of e^z and e^(z/T) relative to it. The K+1
outcomes (see torch_impl.py) determine the divergence and two factors a and b; the second pass, whose reads come from
the L2 cache, writes `a e^z + b e^(z/T)` everywhere. Then the entries of S and the label are overwritten with their own
values.
"""

import math

import triton
import triton.language as tl
from triton.language import constexpr

from .. import triton_math as tm
from .row_passes import (
    exponents_at,
    logits_of,
    reduce_off_topk,
    reduce_row,
    slope_of_head,
    through_cap,
    write_row,
    zero_row,
)

BUCKET, SAMPLED, RENORMALIZE = constexpr(0), constexpr(1), constexpr(2)
# Stages of a row, see loss_kernel; and the numbers that one passes to the next before the logits of S.
WHOLE, OWN, MERGED = constexpr(0), constexpr(1), constexpr(2)
SUMS = constexpr(6)
LN_2 = constexpr(math.log(2.0))
# By how much 1 - Σ_S p may miss p_tail: rounded sums of float32, of entries that were computed twice.
ROUNDING = constexpr(2.0**-20)
# By how much that may move the gradient off S: see `is_rounded`.
MAY_MOVE = constexpr(2.0**-16)
HUGE = constexpr(2.0**64)
# Where `prepare_kernel` stores the numbers of a call.
ALPHA, TEMPERATURE, SCALE, USE_DRAWS, DIVISOR, WEIGHTS = (constexpr(i) for i in range(6))


@triton.jit
def prepare_kernel(
    params_ptr, table_ptr, labels_ptr, mask_ptr, index_ptr, num_items_ptr, upstream_ptr, alpha_ptr, T_ptr,
    alpha, T, count, P, N, ignore_index, reach, fixed_scale,
    M: constexpr, OFF_GRID: constexpr, SNAP: constexpr, HIGHEST: constexpr, BLOCK: constexpr, BLOCK_M: constexpr,
):  # fmt: skip
    """The numbers that all rows of a call share: alpha, T, the gradient's scale, and the tail's spline weights."""
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr).to(tl.float32)
    if T_ptr is not None:
        T = tl.load(T_ptr).to(tl.float32)
    nan = float("nan")
    alpha = tl.where((alpha >= 0.0) & (alpha <= 1.0), alpha, nan)
    if labels_ptr is None:
        alpha = alpha * 0.0

    divisor = count * 1.0
    if count < 0:
        if num_items_ptr is not None:
            divisor = tl.load(num_items_ptr).to(tl.float32)
        else:
            counted = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, P, BLOCK):
                rows = start + tl.arange(0, BLOCK)
                counted += _counted(rows, rows < P, labels_ptr, mask_ptr, index_ptr, N, ignore_index).to(tl.int32)
            divisor = tl.sum(counted).to(tl.float32)
    # a negative, NaN or infinite count makes the loss NaN: `maximum` would make it 1
    divisor = tl.where((divisor >= 0.0) & (divisor < float("inf")), tl.maximum(divisor, 1.0), nan)
    scale = 1.0 / divisor
    if fixed_scale != 0.0:
        scale = fixed_scale
    if upstream_ptr is not None:
        scale = scale * tl.load(upstream_ptr).to(tl.float32)

    # The spline's weights of (log outcomes, tail at each T), at β = 1/T: see fastkd.kernels.tail.
    beta = 1.0 / T
    interval = 0
    start = 0.0
    highest = 0.0
    for i in tl.static_range(M + 1):
        knot = tl.load(table_ptr + i)
        highest = tl.maximum(highest, knot)
        reached = knot <= beta * (1.0 + SNAP)
        interval = tl.where(reached, i, interval)
        start = tl.where(reached, knot, start)
    on_grid = tl.abs(beta - start) <= SNAP * beta
    t = tl.where(on_grid, 0.0, beta - start)
    m = tl.arange(0, BLOCK_M)
    row = table_ptr + (M + 1) + interval * 4 * (M + 1) + m
    there = m < M + 1
    weight = tl.load(row + 3 * (M + 1), mask=there, other=0.0)
    weight = weight * t + tl.load(row + 2 * (M + 1), mask=there, other=0.0)
    weight = weight * t + tl.load(row + (M + 1), mask=there, other=0.0)
    weight = weight * t + tl.load(row, mask=there, other=0.0)
    served = (T > 0.0) & (T <= HIGHEST) & (beta <= highest * (1.0 + SNAP)) & (on_grid | OFF_GRID)
    T = tl.where(served, T, nan)

    tl.store(params_ptr + ALPHA, alpha)
    tl.store(params_ptr + TEMPERATURE, T)
    tl.store(params_ptr + SCALE, scale)
    tl.store(params_ptr + USE_DRAWS, tl.where(reach >= T, 1.0, 0.0))
    tl.store(params_ptr + DIVISOR, divisor)
    tl.store(params_ptr + WEIGHTS + m, weight, mask=there)


@triton.jit
def _counted(rows, there, labels_ptr, mask_ptr, index_ptr, N, ignore_index):
    """Which target rows count. A row whose position lies outside the batch counts, so that its NaN shows."""
    positions = rows
    inside = there
    if index_ptr is not None:
        positions = tl.load(index_ptr + rows, mask=there, other=0)
        inside = there & (positions >= 0) & (positions < N)
    counted = there
    if labels_ptr is not None:
        counted = counted & (tl.load(labels_ptr + positions, mask=inside, other=0) != ignore_index)
    if mask_ptr is not None:
        counted = counted & (tl.load(mask_ptr + positions, mask=inside, other=1) != 0)
    return counted


@triton.jit
def outcome_terms(weight, log_q, log_p, parameter):
    """The terms f(q, p) of outcomes, and p df/dp. `loss_kernel_of` puts a divergence's `triton_terms` in its place."""
    tl.static_assert(False, "no divergence: see loss_kernel_of")
    return log_q, log_p


@triton.jit
def is_rounded(p_tail, slope_below, slope_above):
    """Whether p_tail, which 1 - Σ_S p gives to ROUNDING, is known too roughly for the gradient off S, or the loss.

    slope_below, slope_above: the tail's p df/dp at max(p_tail, 2 ROUNDING) ∓ ROUNDING. The gradient in u_j = z_j / T
    off S is `p_j (slope / p_tail - Σ slope)`. An error of p_tail moves the sum of its absolute values by p_tail times
    the change of slope / p_tail; the divergence moves no more. Forward KL's slope is -q_tail and that is
    2 ROUNDING q_tail / p_tail: MAY_MOVE means p_tail < q_tail / 8. For reverse KL, JSD and skew KL it is a few times
    ROUNDING, unless q_tail is 0. The divergence moves by ROUNDING slope / p_tail: for reverse KL, whose slope / p_tail
    is the logarithm of p_tail / q_tail, that is more than MAY_MOVE of it under a teacher of q_tail < e^-16.
    """
    p = tl.maximum(p_tail, 2.0 * ROUNDING)
    # a slope may be infinite
    below = tl.minimum(tl.maximum(slope_below, -HUGE), HUGE)
    above = tl.minimum(tl.maximum(slope_above, -HUGE), HUGE)
    size = tl.maximum(tl.abs(below), tl.abs(above))
    below, above = below / (p - ROUNDING), above / (p + ROUNDING)
    moves = tl.maximum(tl.abs(below), tl.abs(above)) * ROUNDING > tl.maximum(size, 1.0) * MAY_MOVE
    return (p_tail < p) | moves | (p * tl.abs(above - below) > MAY_MOVE)


@triton.jit
def merge_ranks(own_ptr, rows, ranks, p_1, p_t, K, BLOCK_K: constexpr, BLOCK_R: constexpr):
    """The statistics of a whole row, of those that each rank stored of its columns: reference, Σ e^z and Σ e^(z/T);
    reference and Σ e^(z/T) off the top-k entries; the label's logit; and those of the support `[K]`.

    own_ptr: the row's of the first rank; the next rank's come after `rows` rows. Every rank adds in the same order.
    """
    rank = tl.arange(0, BLOCK_R)
    there = rank < ranks
    at = own_ptr + rank.to(tl.int64) * rows * (SUMS + K)
    none = float("-inf")
    r_R = tl.load(at, mask=there, other=none)
    off_R = tl.load(at + 3, mask=there, other=none)
    r = tl.max(r_R, 0)
    r_off = tl.max(off_R, 0)
    u_R = r_R - tm.finite_or_zero(r)
    s_1 = tl.sum(tl.load(at + 1, mask=there, other=0.0) * tl.exp2(p_1 * u_R), 0)
    s_t = tl.sum(tl.load(at + 2, mask=there, other=0.0) * tl.exp2(p_t * u_R), 0)
    off_R = off_R - tm.finite_or_zero(r_off)
    s_off = tl.sum(tl.load(at + 4, mask=there, other=0.0) * tl.exp2(p_t * off_R), 0)
    z_label = tl.max(tl.load(at + 5, mask=there, other=none), 0)
    k = tl.arange(0, BLOCK_K)
    z_RK = tl.load(at[:, None] + SUMS + k[None, :], mask=there[:, None] & (k < K)[None, :], other=none)
    return r, s_1, s_t, r_off, s_off, z_label, tl.max(z_RK, 0)


@triton.jit
def loss_kernel(
    x_ptr, g_ptr, hard_ptr, soft_ptr, params_ptr,  # logits, and what is written; numbers of the call
    part_ptr, statistics_ptr, ranks,  # of a divided vocabulary; None, None, 1 of a whole one
    labels_ptr, mask_ptr, weights_ptr, index_ptr,  # of the positions; None for those not given
    ids_ptr, logprobs_ptr, draws_ptr, tail_ptr, outcomes_ptr,  # of the target rows
    x_outer, x_inner, x_stride, g_outer, g_inner, g_stride, inner, first_row,
    V, teacher_V, K, N, outcomes_stride, ignore_index, inverse_draw_temperature, parameter, softcap, logit_scale,
    STAGE: constexpr, TREATMENT: constexpr, BY_POSITION: constexpr, WANT_GRAD: constexpr, M: constexpr,
    BLOCK_K: constexpr, BLOCK_M: constexpr, BLOCK_R: constexpr, BLOCK: constexpr, THREADS: constexpr, VEC: constexpr,
    EDGES: constexpr, X_ALIGNED: constexpr, G_ALIGNED: constexpr,
):  # fmt: skip
    """The losses of one target row (times its weight), and its gradient if WANT_GRAD.

    STAGE: WHOLE, or of a vocabulary divided over ranks first OWN, which stores the statistics of this rank's V columns,
    and then, with those of all ranks `[ranks, programs, SUMS + K]`, MERGED. part_ptr: the first of these columns, and
    the number of all ranks'.
    """
    pid = tl.program_id(0)
    row = (first_row + pid).to(tl.int64)
    position = row
    inside = True
    if index_ptr is not None:
        position = tl.load(index_ptr + row).to(tl.int64)
        inside = (position >= 0) & (position < N)
        position = tl.where(inside, position, 0)
    at = position if BY_POSITION else pid.to(tl.int64)
    outer = at // inner
    at -= outer * inner
    x_ptr += outer * x_outer + at * x_inner
    if WANT_GRAD:
        g_ptr += outer * g_outer + at * g_inner

    # all small loads are issued here, before the first wait: their latencies overlap
    alpha = tl.load(params_ptr + ALPHA)
    T = tl.load(params_ptr + TEMPERATURE)
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=0)
    logprob = tl.load(logprobs_ptr + row * K + k, mask=k < K, other=float("-inf"))
    if draws_ptr is not None:
        draws = tl.load(draws_ptr + row * K + k, mask=k < K, other=0)
    m_index = tl.arange(0, BLOCK_M)
    tails = tl.load(tail_ptr + row * M + m_index - 1, mask=(m_index > 0) & (m_index <= M), other=0.0)
    outcomes = tl.load(outcomes_ptr + row * outcomes_stride)
    spline = tl.load(params_ptr + WEIGHTS + m_index, mask=m_index <= M, other=0.0)
    row_weight = 1.0
    if weights_ptr is not None:
        row_weight = tl.load(weights_ptr + position).to(tl.float32)
    counted = True
    label = 0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + position).to(tl.int64)
        counted = label != ignore_index
    if mask_ptr is not None:
        counted = counted & (tl.load(mask_ptr + position) != 0)
    if not inside:
        # there is no position to read or write: the loss is NaN
        tl.store(hard_ptr + row, float("nan"))
        tl.store(soft_ptr + row, float("nan"))
        if WANT_GRAD and not BY_POSITION:
            zero_row(g_ptr, g_stride, V, BLOCK)
        return
    if not counted:
        tl.store(hard_ptr + row, 0.0)
        tl.store(soft_ptr + row, 0.0)
        if WANT_GRAD:
            zero_row(g_ptr, g_stride, V, BLOCK)
        return

    nan = float("nan")

    # --- the student's row ------------------------------------------------------------------------------------------
    if STAGE != MERGED:
        r, s_1, s_t = reduce_row(x_ptr, x_stride, V, T, softcap, logit_scale, BLOCK, THREADS, VEC, EDGES, X_ALIGNED)
    all_V = V
    if STAGE != WHOLE:
        first_column = tl.load(part_ptr)
        all_V = tl.load(part_ptr + 1)

    # --- the teacher at T -----------------------------------------------------------------------------------------
    ids = ids.to(tl.int64)
    logprob = logprob.to(tl.float32)
    used = logprob > float("-inf")
    wrong = (used & ((ids < 0) | (ids >= teacher_V))) | (logprob != logprob)
    ids = tl.where((ids < 0) | (ids >= all_V), 0, ids)
    # with alpha = 1 a soft loss of NaN adds nothing: the hard loss must be NaN too
    bad = T != T
    if labels_ptr is not None:
        outside = (label < 0) | (label >= all_V)
        bad = bad | outside
        label = tl.where(outside, 0, label)
    columns = ids
    label_column = label
    if STAGE != WHOLE:
        bad = bad | (teacher_V > all_V)
        columns = ids - first_column
        here = (columns >= 0) & (columns < V)
        columns = tl.where(here, columns, 0)
        label_column = label - first_column
        label_here = (label_column >= 0) & (label_column < V)
        label_column = tl.where(label_here, label_column, 0)

    tails = tails.to(tl.float32)
    outcomes = outcomes.to(tl.float32)
    empty = (outcomes <= 0.0) | (tl.max((tails == float("-inf")).to(tl.int32), 0) > 0)
    tails = tl.where(m_index == 0, tl.log(tl.maximum(outcomes, 1.0)), tails)
    log_tail = tl.sum(tl.where(spline == 0.0, 0.0, spline * tails), 0)
    log_tail = tl.where(empty, float("-inf"), log_tail)

    drawn = tl.zeros((BLOCK_K,), tl.int1)
    if draws_ptr is not None:
        draws = draws.to(tl.float32)
        drawn = used & (draws > 0.0)
    else:
        draws = tl.zeros((BLOCK_K,), tl.float32)
    in_topk = used & (drawn == 0)
    # three counts in one sum: a sum across warps costs as much as a hundred instructions
    tl.static_assert(BLOCK_K < 2**20)
    counts = tl.sum(wrong.to(tl.int64) + (in_topk.to(tl.int64) << 20) + (drawn.to(tl.int64) << 40), 0)
    bad = bad | ((counts & 0xFFFFF).to(tl.int32) > 0)
    has_topk = ((counts >> 20) & 0xFFFFF).to(tl.int32) > 0
    has_draws = (counts >> 40).to(tl.int32) > 0
    scaled = logprob / T
    log_topk = tm.logsumexp(tl.where(in_topk, scaled, float("-inf")))
    log_z = tm.log_add(log_topk, log_tail)
    log_z = tl.where(log_z == float("-inf"), 0.0, log_z)
    log_q = scaled - log_z
    log_q_tail = log_tail - log_z
    by_draws = False
    if TREATMENT == SAMPLED:
        by_draws = has_draws & (tl.load(params_ptr + USE_DRAWS) > 0.0)
    if TREATMENT == RENORMALIZE:
        log_q = scaled - log_topk
    support = in_topk | (drawn & by_draws)
    log_q = tl.where(support, log_q, float("-inf"))
    w = tl.exp(log_q)
    if TREATMENT == SAMPLED:
        # q_tail is shared among the drawn entries in proportion to c_j p_j^(1/T - 1/T_d)
        share = tl.log(tl.maximum(draws, 1.0)) + logprob * (1.0 / T - inverse_draw_temperature)
        share = tl.where(drawn, share, float("-inf"))
        w = tl.where(drawn & by_draws, tl.exp(share - tm.logsumexp(share) + log_q_tail), w)
    bad = bad | (has_draws & (has_topk == 0) & (by_draws == 0))
    has_support = has_topk | by_draws
    # whether the rest of the vocabulary is one outcome
    bucket = has_topk & (by_draws == 0) & (TREATMENT != RENORMALIZE)
    log_q_tail = tl.where(bucket, log_q_tail, float("-inf"))

    # --- the student ----------------------------------------------------------------------------------------------
    own = support
    if STAGE != WHOLE:
        own = support & here
    rate, p_1, p_t = exponents_at(T, softcap)
    z_label = 0.0
    if STAGE == MERGED:
        r, s_1, s_t, r_off, s_off, z_label, z = merge_ranks(
            statistics_ptr + pid.to(tl.int64) * (SUMS + K), tl.num_programs(0), ranks, p_1, p_t, K, BLOCK_K, BLOCK_R
        )
        z = tl.where(support, z, float("-inf"))
    else:
        z = logits_of(tl.load(x_ptr + columns * x_stride, mask=own, other=float("-inf")), softcap, logit_scale)
        if labels_ptr is not None:
            z_label = logits_of(tl.load(x_ptr + label_column * x_stride), softcap, logit_scale)
    stored = row * K
    if STAGE == OWN:
        # Decided before the row is known, by this rank's p_tail of its own mass: where `is_rounded` is content with it
        # on every rank, the row's is known as well as the worst of them, relatively. Nothing may be NaN where this rank
        # holds no logit above −inf.
        s_topk = tl.sum(tl.where(z > float("-inf"), tl.exp2(p_t * tl.fma(z, rate, -r)), 0.0), 0)
        p_tail = tl.where(s_topk > 0.0, 1.0 - s_topk / s_t, 1.0)
        r_off = r
        s_off = s_t * tl.maximum(p_tail, 0.0)
        p_known = tl.maximum(p_tail, 2.0 * ROUNDING)
        w_tail = tl.exp(log_q_tail)
        _, slope_below = outcome_terms(w_tail, log_q_tail, tl.log(p_known - ROUNDING), parameter)
        _, slope_above = outcome_terms(w_tail, log_q_tail, tl.log(p_known + ROUNDING), parameter)
        if bucket & is_rounded(p_tail, slope_below, slope_above):
            r_off, s_off = reduce_off_topk(
                x_ptr, x_stride, V, T, ids_ptr + stored, logprobs_ptr + stored,
                draws_ptr if draws_ptr is None else draws_ptr + stored, K, first_column.to(tl.int32), softcap,
                logit_scale, BLOCK, THREADS, VEC, EDGES, X_ALIGNED,
            )  # fmt: skip
        out_ptr = statistics_ptr + pid.to(tl.int64) * (SUMS + K)
        tl.store(out_ptr, r)
        tl.store(out_ptr + 1, s_1)
        tl.store(out_ptr + 2, s_t)
        tl.store(out_ptr + 3, r_off)
        tl.store(out_ptr + 4, s_off)
        tl.store(out_ptr + 5, tl.where(label_here, z_label, float("-inf")))
        tl.store(out_ptr + SUMS + k, z, mask=k < K)
        return
    # of NaN, +inf, or nothing but −inf: without an outcome or a label, nothing else would show it
    bad = bad | ((s_t > 0.0) == 0)
    u = tl.fma(z, rate, -r)
    log_s = tl.log(s_t)
    log_p = tl.where(support, p_t * u * LN_2 - log_s, float("-inf"))
    p_tail = 1.0 - tl.sum(tl.where(support, tl.exp2(p_t * u), 0.0), 0) / s_t
    w_tail = tl.exp(log_q_tail)
    if STAGE == MERGED:
        if bucket:
            log_p_tail = tl.where(s_off > 0.0, tl.log(s_off) + p_t * (r_off - r) * LN_2 - log_s, float("-inf"))
        else:
            r_off = r
            s_off = s_t * tl.maximum(p_tail, 0.0)
            log_p_tail = tm.log(tl.maximum(p_tail, 0.0))
    else:
        r_off = r
        s_off = s_t * tl.maximum(p_tail, 0.0)
        log_p_tail = tm.log(tl.maximum(p_tail, 0.0))
    if bucket and STAGE == WHOLE:
        p_known = tl.maximum(p_tail, 2.0 * ROUNDING)
        _, slope_below = outcome_terms(w_tail, log_q_tail, tl.log(p_known - ROUNDING), parameter)
        _, slope_above = outcome_terms(w_tail, log_q_tail, tl.log(p_known + ROUNDING), parameter)
        if is_rounded(p_tail, slope_below, slope_above):
            r_off, s_off = reduce_off_topk(
                x_ptr, x_stride, V, T, ids_ptr + stored, logprobs_ptr + stored,
                draws_ptr if draws_ptr is None else draws_ptr + stored, K, 0, softcap, logit_scale, BLOCK, THREADS, VEC,
                EDGES, X_ALIGNED,
            )  # fmt: skip
            log_p_tail = tl.where(s_off > 0.0, tl.log(s_off) + p_t * (r_off - r) * LN_2 - log_s, float("-inf"))

    # --- the divergence and its gradient ----------------------------------------------------------------------------
    term, slope = outcome_terms(w, log_q, log_p, parameter)
    term = tl.where(support, term, 0.0)
    slope = tl.where(support, slope, 0.0)
    p = tl.exp(log_p)
    if TREATMENT == RENORMALIZE:
        divergence = tl.sum(term, 0)
        mean_slope = tl.sum(slope, 0)
        p_tail = tl.maximum(p_tail, 0.0)
        off = -p_tail * mean_slope
    else:
        term_tail, slope_tail = outcome_terms(w_tail, log_q_tail, log_p_tail, parameter)
        p_tail = tl.exp(log_p_tail)
        divergence = tl.sum(term, 0) + tl.where(bucket, term_tail, 0.0)
        mean_slope = tl.sum(slope, 0) + tl.where(bucket, slope_tail, 0.0)
        off = tl.where(bucket, slope_tail, 0.0) - p_tail * mean_slope
    on = slope - p * mean_slope
    divergence = tl.where(has_support, divergence, 0.0)
    off = tl.where(has_support, off, 0.0)

    hard = nan
    if labels_ptr is not None:
        hard = (tl.log(s_1) - p_1 * tl.fma(z_label, rate, -r) * LN_2) * row_weight
        hard = tl.where(bad, nan, hard)
    tl.store(hard_ptr + row, hard)
    tl.store(soft_ptr + row, tl.where(bad, nan, T * T * divergence * row_weight))

    if WANT_GRAD:
        scale = tl.load(params_ptr + SCALE) * row_weight * slope_of_head(softcap, logit_scale)
        scale = tl.where(bad, nan, scale)
        hard_scale = alpha * scale
        soft_scale = (1.0 - alpha) * T * scale
        # a factor of exactly 0 means that the part is not wanted: 0 * inf must not make it NaN
        base = tl.where(r_off == float("-inf"), r, r_off)
        a = tl.where(hard_scale == 0.0, 0.0, hard_scale * tl.exp2(p_1 * (base - r)) / s_1)
        b = tl.where((soft_scale == 0.0) | (s_off == 0.0), 0.0, soft_scale * off / s_off)
        g_entries = hard_scale * (tl.exp2(p_1 * u) / s_1) + tl.where(soft_scale == 0.0, 0.0, soft_scale * on)
        g_label = 0.0
        if labels_ptr is not None:
            g_entries = g_entries - tl.where(ids == label, hard_scale, 0.0)
            # the label off S: its share of both parts, minus the hard loss's own term
            u_label = tl.fma(z_label, rate, -base)
            g_label = a * tl.exp2(p_1 * u_label) + b * tl.exp2(p_t * u_label) - hard_scale
            # that of the lowest capped logit, -1, for one of −inf
            g_label = through_cap(g_label, tl.maximum(z_label, -1.0), softcap)
        g_entries = through_cap(g_entries, tl.maximum(z, -1.0), softcap)
        # all warps have read their entries of S before another warp's part of the pass overwrites them
        tl.debug_barrier()
        write_row(
            x_ptr, x_stride, g_ptr, g_stride, V, T, base, a, b, softcap, logit_scale, BLOCK, THREADS, VEC,
            EDGES, X_ALIGNED, G_ALIGNED,
        )  # fmt: skip
        # all threads have written their part of the pass before the entries overwrite it
        tl.debug_barrier()
        element = g_ptr.dtype.element_ty
        if labels_ptr is not None:
            if STAGE == WHOLE:
                tl.store(g_ptr + label * g_stride, g_label.to(element))
            else:
                tl.store(g_ptr + label_column * g_stride, g_label.to(element), mask=label_here)
            # a label in S is an entry of S, whose store comes last
            tl.debug_barrier()
        tl.store(g_ptr + columns * g_stride, g_entries.to(element), mask=own)


@triton.jit
def total_kernel(
    hard_ptr, soft_ptr, params_ptr, out_hard_ptr, out_soft_ptr, out_loss_ptr, P, HARD: constexpr, BLOCK: constexpr
):
    """Loss, hard and soft from the rows' losses, summed in one fixed order."""
    cols = tl.arange(0, BLOCK)
    hard_sums = tl.zeros((BLOCK,), tl.float32)
    soft_sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, P, BLOCK):
        there = start + cols < P
        if HARD:
            hard_sums += tl.load(hard_ptr + start + cols, mask=there, other=0.0)
        soft_sums += tl.load(soft_ptr + start + cols, mask=there, other=0.0)
    alpha = tl.load(params_ptr + ALPHA)
    divisor = tl.load(params_ptr + DIVISOR)
    soft = tl.sum(soft_sums) / divisor
    loss = tl.where(alpha == 1.0, 0.0, (1.0 - alpha) * soft)
    hard = float("nan")
    if HARD:
        hard = tl.sum(hard_sums) / divisor
        loss += tl.where(alpha == 0.0, 0.0, alpha * hard)
    tl.store(out_loss_ptr, loss)
    tl.store(out_hard_ptr, hard)
    tl.store(out_soft_ptr, soft)
