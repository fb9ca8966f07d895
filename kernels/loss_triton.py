# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment,attr-defined"
"""The loss in Triton: one program a row, one online pass over its logits, one write of its gradient.

The forward pass collects the row's maximum and the sums of e^(z-m) and e^((z-m)/T). The K+1 outcomes settle the
divergence, and with it two factors; the second pass, whose reads the L2 cache serves, writes
`a e^(z-m) + b e^((z-m)/T)` everywhere. Then the entries of S and the label are overwritten with their own values.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .call import DIVERGENCES, Call
from .checks import check_student, check_values, values_are_checked
from .errors import KDError
from .tail import OFF_GRID_NEEDS, ON_GRID, device_table
from .targets import SAMPLED_REACH

FORWARD_KL = tl.constexpr(DIVERGENCES.index("forward_kl"))
REVERSE_KL = tl.constexpr(DIVERGENCES.index("reverse_kl"))
JSD = tl.constexpr(DIVERGENCES.index("jsd"))
SKEW_KL = tl.constexpr(DIVERGENCES.index("skew_kl"))
BUCKET, SAMPLED, RENORMALIZE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Below this share of the student's mass, 1 - Σ_S p has too few digits left for the bucket: sum what is off S itself.
TINY_TAIL = tl.constexpr(0.125)
LOG2_E = tl.constexpr(math.log2(math.e))
# Settings of a call, as the prepare kernel leaves them for the others.
ALPHA, TEMPERATURE, SCALE, USE_DRAWS, DIVISOR, WEIGHTS = (tl.constexpr(i) for i in range(6))


@triton.jit
def prepare_kernel(
    params_ptr,
    table_ptr,
    labels_ptr,
    mask_ptr,
    index_ptr,
    num_items_ptr,
    upstream_ptr,
    alpha_ptr,
    temperature_ptr,
    alpha,
    temperature,
    count,
    P,
    N,
    ignore_index,
    reach,
    fixed_scale,
    M: tl.constexpr,
    OFF_GRID: tl.constexpr,
    SNAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Everything about a call that is not a row's: alpha, T, the gradient's scale, and the tail's spline weights."""
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr).to(tl.float32)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr).to(tl.float32)
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
    divisor = tl.maximum(divisor, 1.0)
    scale = 1.0 / divisor
    if fixed_scale != 0.0:
        scale = fixed_scale
    if upstream_ptr is not None:
        scale = scale * tl.load(upstream_ptr).to(tl.float32)

    # The spline's weights of (log outcomes, tail at each temperature), at β = 1/T: see fastkd.kernels.tail.
    beta = 1.0 / temperature
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
    served = (temperature > 0.0) & (beta > 0.0) & (beta <= highest * (1.0 + SNAP)) & (on_grid | OFF_GRID)
    temperature = tl.where(served, temperature, nan)

    tl.store(params_ptr + ALPHA, alpha)
    tl.store(params_ptr + TEMPERATURE, temperature)
    tl.store(params_ptr + SCALE, scale)
    tl.store(params_ptr + USE_DRAWS, tl.where(temperature <= reach, 1.0, 0.0))
    tl.store(params_ptr + DIVISOR, divisor)
    tl.store(params_ptr + WEIGHTS + m, weight, mask=there)


@triton.jit
def _counted(rows, there, labels_ptr, mask_ptr, index_ptr, N, ignore_index):
    """Which target rows count. A position outside the batch counts, so that its NaN is seen."""
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
def _head(raw, SOFTCAP: tl.constexpr, softcap, SCALED: tl.constexpr, logit_scale):
    """Logits in float32 from what the head's product left: the scale multiplies, then the cap; −inf stays −inf."""
    x = raw.to(tl.float32)
    if SCALED:
        x = x * logit_scale
    if SOFTCAP:
        capped = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (x / softcap)) + 1.0))
        x = tl.where(x == float("-inf"), x, capped)
    return x


@triton.jit
def _exp_pair(z, m, rate, MODE: tl.constexpr):
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
def _reduce(
    row_ptr,
    stride,
    V,
    rate,
    softcap,
    logit_scale,
    MODE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum, Σ e^(z-m) and Σ e^((z-m)/T) of a row, in one online pass."""
    m = float("-inf")
    s_1 = 0.0
    s_t = 0.0
    cols = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        there = start + cols < V
        raw = tl.load(row_ptr + (start + cols) * stride, mask=there, other=float("-inf"))
        z = _head(raw, SOFTCAP, softcap, SCALED, logit_scale)
        # tl.max drops a NaN; the sums below keep it
        new = tl.maximum(m, tl.max(z))
        ref = tl.where(new == float("-inf"), 0.0, new)
        f_1, f_t = _exp_pair(m, ref, rate, MODE)
        e_1, e_t = _exp_pair(z, ref, rate, MODE)
        s_t = s_t * f_t + tl.sum(e_t)
        if MODE == 1:
            s_1 = s_t
        else:
            s_1 = s_1 * f_1 + tl.sum(e_1)
        m = new
    return m, s_1, s_t


@triton.jit
def _reduce_without(
    row_ptr,
    stride,
    V,
    rate,
    ids,
    softcap,
    logit_scale,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum and Σ e^((z-m)/T) of a row without the columns in `ids`: slow, for rows that may not be marked."""
    m = float("-inf")
    s_t = 0.0
    cols = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        hit = tl.max(((start + cols)[:, None] == ids[None, :]).to(tl.int32), 1)
        there = (start + cols < V) & (hit == 0)
        raw = tl.load(row_ptr + (start + cols) * stride, mask=there, other=float("-inf"))
        z = _head(raw, SOFTCAP, softcap, SCALED, logit_scale)
        new = tl.maximum(m, tl.max(z))
        ref = tl.where(new == float("-inf"), 0.0, new)
        s_t = s_t * tl.exp2((m - ref) * rate) + tl.sum(tl.exp2((z - ref) * rate))
        m = new
    return m, s_t


@triton.jit
def _write(
    x_ptr,
    x_stride,
    g_ptr,
    g_stride,
    V,
    rate,
    m,
    a,
    b,
    softcap,
    logit_scale,
    MODE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a e^(z-m) + b e^((z-m)/T), through the head's own derivative, to every column of the row."""
    cols = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        there = start + cols < V
        raw = tl.load(x_ptr + (start + cols) * x_stride, mask=there, other=float("-inf"))
        z = _head(raw, SOFTCAP, softcap, SCALED, logit_scale)
        e_1, e_t = _exp_pair(z, m, rate, MODE)
        g = a * e_1 + b * e_t
        g = _through_head(g, z, SOFTCAP, softcap, SCALED, logit_scale)
        tl.store(g_ptr + (start + cols) * g_stride, g.to(g_ptr.dtype.element_ty), mask=there)


@triton.jit
def _through_head(g, z, SOFTCAP: tl.constexpr, softcap, SCALED: tl.constexpr, logit_scale):
    if SOFTCAP:
        y = z / softcap
        g = tl.where(z == float("-inf"), 0.0, g * (1.0 - y * y))
    if SCALED:
        g = g * logit_scale
    return g


@triton.jit
def _zero(g_ptr, stride, V, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        tl.store(g_ptr + (start + cols) * stride, tl.zeros((BLOCK,), g_ptr.dtype.element_ty), mask=start + cols < V)


@triton.jit
def _lse(x):
    """logsumexp of a small vector; −inf for an empty one."""
    m = tl.max(x)
    ref = tl.where(m == float("-inf"), 0.0, m)
    return ref + tl.log(tl.sum(tl.exp(x - ref)))


@triton.jit
def _log_add(x, y):
    m = tl.maximum(x, y)
    ref = tl.where(m == float("-inf"), 0.0, m)
    return ref + tl.log(tl.exp(x - ref) + tl.exp(y - ref))


@triton.jit
def _times(weight, x):
    """weight * x where 0 * ±inf is 0."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def _slope(w, log_q, log_p, mix, DIVERGENCE: tl.constexpr):
    """For an outcome: its term of the divergence, and p * b with b the derivative of that term in p."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if DIVERGENCE == FORWARD_KL:
        term = _times(w, log_q - log_p)
        slope = -w
    elif DIVERGENCE == REVERSE_KL:
        term = _times(p, log_p - log_q)
        slope = term
    elif DIVERGENCE == JSD or DIVERGENCE == SKEW_KL:
        log_m = _log_add(log_q + tl.log(mix), log_p + tl.log(1.0 - mix))
        if DIVERGENCE == JSD:
            p_over_m = _times(p, log_p - log_m)
            term = mix * _times(q, log_q - log_m) + (1.0 - mix) * p_over_m
            slope = (1.0 - mix) * p_over_m
        else:
            term = _times(q, log_q - log_m)
            slope = -(1.0 - mix) * _times(q, tl.exp(log_p - log_m))
    else:
        term = 0.5 * tl.abs(q - p)
        slope = p * tl.where(q > p, -0.5, tl.where(q < p, 0.5, 0.0))
    return term, slope


@triton.jit
def loss_kernel(
    x_ptr,
    g_ptr,
    hard_ptr,
    soft_ptr,
    params_ptr,
    labels_ptr,
    mask_ptr,
    weights_ptr,
    index_ptr,
    ids_ptr,
    logprobs_ptr,
    draws_ptr,
    tail_ptr,
    outcomes_ptr,
    x_outer,
    x_inner,
    x_stride,
    g_outer,
    g_inner,
    g_stride,
    inner,
    first_row,
    V,
    teacher_V,
    K,
    N,
    outcomes_stride,
    ignore_index,
    inverse_draw_temperature,
    mix,
    softcap,
    logit_scale,
    DIVERGENCE: tl.constexpr,
    TREATMENT: tl.constexpr,
    BY_POSITION: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    IN_PLACE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SLOW: tl.constexpr,
):
    """One target row: its losses (times its weight), and its gradient where one is wanted."""
    pid = tl.program_id(0)
    row = (first_row + pid).to(tl.int64)
    position = row
    inside = True
    if index_ptr is not None:
        position = tl.load(index_ptr + row).to(tl.int64)
        inside = (position >= 0) & (position < N)
        position = tl.where(inside, position, 0)
    at = position if BY_POSITION else pid.to(tl.int64)
    x_ptr += (at // inner) * x_outer + (at % inner) * x_inner
    if WANT_GRAD:
        g_ptr += (at // inner) * g_outer + (at % inner) * g_inner

    counted = True
    label = 0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + position).to(tl.int64)
        counted = label != ignore_index
    if mask_ptr is not None:
        counted = counted & (tl.load(mask_ptr + position) != 0)
    if not inside:
        # no position to read or write: the row says so in its loss
        tl.store(hard_ptr + row, float("nan"))
        tl.store(soft_ptr + row, float("nan"))
        if WANT_GRAD and not BY_POSITION:
            _zero(g_ptr, g_stride, V, BLOCK)
        return
    if not counted:
        tl.store(hard_ptr + row, 0.0)
        tl.store(soft_ptr + row, 0.0)
        if WANT_GRAD:
            _zero(g_ptr, g_stride, V, BLOCK)
        return

    nan = float("nan")
    alpha = tl.load(params_ptr + ALPHA)
    T = tl.load(params_ptr + TEMPERATURE)
    row_weight = 1.0
    if weights_ptr is not None:
        row_weight = tl.load(weights_ptr + position).to(tl.float32)

    # --- the teacher at T -----------------------------------------------------------------------------------------
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=0).to(tl.int64)
    logprob = tl.load(logprobs_ptr + row * K + k, mask=k < K, other=float("-inf")).to(tl.float32)
    used = logprob > float("-inf")
    bad = tl.max(((used & ((ids < 0) | (ids >= teacher_V))) | (logprob != logprob)).to(tl.int32), 0) > 0
    ids = tl.where((ids < 0) | (ids >= V), 0, ids)
    if labels_ptr is not None:
        bad = bad | (label < 0) | (label >= V)
        label = tl.where((label < 0) | (label >= V), 0, label)

    m_index = tl.arange(0, BLOCK_M)
    tails = tl.load(tail_ptr + row * M + m_index - 1, mask=(m_index > 0) & (m_index <= M), other=0.0).to(tl.float32)
    outcomes = tl.load(outcomes_ptr + row * outcomes_stride).to(tl.float32)
    spline = tl.load(params_ptr + WEIGHTS + m_index, mask=m_index <= M, other=0.0)
    empty = (outcomes <= 0.0) | (tl.max((tails == float("-inf")).to(tl.int32), 0) > 0)
    tails = tl.where(m_index == 0, tl.log(tl.maximum(outcomes, 1.0)), tails)
    log_tail = tl.sum(tl.where(spline == 0.0, 0.0, spline * tails), 0)
    log_tail = tl.where(empty, float("-inf"), log_tail)

    drawn = tl.zeros((BLOCK_K,), tl.int1)
    draws = tl.zeros((BLOCK_K,), tl.float32)
    if draws_ptr is not None:
        draws = tl.load(draws_ptr + row * K + k, mask=k < K, other=0).to(tl.float32)
        drawn = used & (draws > 0.0)
    head = used & (drawn == 0)
    has_head = tl.max(head.to(tl.int32), 0) > 0
    has_draws = tl.max(drawn.to(tl.int32), 0) > 0
    scaled = logprob / T
    log_head = _lse(tl.where(head, scaled, float("-inf")))
    log_z = _log_add(log_head, log_tail)
    log_z = tl.where(log_z == float("-inf"), 0.0, log_z)
    log_q = scaled - log_z
    log_q_tail = log_tail - log_z
    by_draws = False
    if TREATMENT == SAMPLED:
        by_draws = has_draws & (tl.load(params_ptr + USE_DRAWS) > 0.0)
    if TREATMENT == RENORMALIZE:
        log_q = scaled - log_head
    support = head | (drawn & by_draws)
    log_q = tl.where(support, log_q, float("-inf"))
    w = tl.exp(log_q)
    if TREATMENT == SAMPLED:
        # q_tail is shared among the drawn entries in proportion to c_j p_j^(1/T - 1/T_d)
        share = tl.log(tl.maximum(draws, 1.0)) + logprob * (1.0 / T - inverse_draw_temperature)
        share = tl.where(drawn, share, float("-inf"))
        w = tl.where(drawn & by_draws, tl.exp(share - _lse(share) + log_q_tail), w)
    bad = bad | (has_draws & (has_head == 0) & (by_draws == 0))
    has_support = has_head | by_draws
    # whether the rest of the vocabulary is an outcome of its own
    bucket = has_head & (by_draws == 0) & (TREATMENT != RENORMALIZE)
    log_q_tail = tl.where(bucket, log_q_tail, float("-inf"))

    rate = LOG2_E / T
    # --- the student ----------------------------------------------------------------------------------------------
    z = _head(tl.load(x_ptr + ids * x_stride, mask=support, other=float("-inf")), SOFTCAP, softcap, SCALED, logit_scale)
    z_label = 0.0
    if labels_ptr is not None:
        z_label = _head(tl.load(x_ptr + label * x_stride), SOFTCAP, softcap, SCALED, logit_scale)
    if T == 1.0:
        m, s_1, s_t = _reduce(x_ptr, x_stride, V, rate, softcap, logit_scale, 1, SOFTCAP, SCALED, BLOCK)
    elif T == 2.0:
        m, s_1, s_t = _reduce(x_ptr, x_stride, V, rate, softcap, logit_scale, 2, SOFTCAP, SCALED, BLOCK)
    else:
        m, s_1, s_t = _reduce(x_ptr, x_stride, V, rate, softcap, logit_scale, 0, SOFTCAP, SCALED, BLOCK)

    e_1 = tl.exp(z - m)
    log_s = tl.log(s_t)
    log_p = tl.where(support, (z - m) / T - log_s, float("-inf"))
    # e^((z-m)/T) as the sweep forms it, so that what the sum has of these entries cancels to the last digit
    p_tail = 1.0 - tl.sum(tl.where(support, tl.exp2((z - m) * rate), 0.0), 0) / s_t
    m_off = m
    s_off = s_t * tl.maximum(p_tail, 0.0)
    log_p_tail = tl.log(tl.maximum(p_tail, 0.0))
    if bucket & (p_tail < TINY_TAIL):
        if WANT_GRAD:
            if not IN_PLACE:
                cols = tl.arange(0, BLOCK)
                for start in range(0, V, BLOCK):
                    there = start + cols < V
                    tl.store(
                        g_ptr + (start + cols) * g_stride, tl.load(x_ptr + (start + cols) * x_stride, mask=there), there
                    )
            tl.debug_barrier()
            tl.store(g_ptr + ids * g_stride, float("-inf"), mask=support)
            tl.debug_barrier()
            if T == 1.0:
                m_off, _, s_off = _reduce(g_ptr, g_stride, V, rate, softcap, logit_scale, 1, SOFTCAP, SCALED, BLOCK)
            else:
                # only the tempered sum is wanted: at T' = 1 of z/T it takes one exponential
                m_off, _, s_off = _reduce(g_ptr, g_stride, V, rate, softcap, logit_scale, 0, SOFTCAP, SCALED, BLOCK)
        else:
            taken = tl.where(support, ids, -1)
            m_off, s_off = _reduce_without(
                x_ptr, x_stride, V, rate, taken, softcap, logit_scale, SOFTCAP, SCALED, BLOCK_SLOW
            )
        log_p_tail = tl.where(s_off > 0.0, tl.log(s_off) + (m_off - m) / T - log_s, float("-inf"))

    # --- the divergence and its gradient ----------------------------------------------------------------------------
    term, slope = _slope(w, log_q, log_p, mix, DIVERGENCE)
    term = tl.where(support, term, 0.0)
    slope = tl.where(support, slope, 0.0)
    p = tl.exp(log_p)
    if TREATMENT == RENORMALIZE:
        divergence = tl.sum(term, 0)
        mean_slope = tl.sum(slope, 0)
        p_tail = tl.maximum(p_tail, 0.0)
        off = -p_tail * mean_slope
    else:
        w_tail = tl.exp(log_q_tail)
        term_tail, slope_tail = _slope(w_tail, log_q_tail, log_p_tail, mix, DIVERGENCE)
        p_tail = tl.exp(log_p_tail)
        divergence = tl.sum(term, 0) + tl.where(bucket, term_tail, 0.0)
        mean_slope = tl.sum(slope, 0) + tl.where(bucket, slope_tail, 0.0)
        off = tl.where(bucket, slope_tail, 0.0) - p_tail * mean_slope
    on = slope - p * mean_slope
    divergence = tl.where(has_support, divergence, 0.0)
    off = tl.where(has_support, off, 0.0)

    hard = nan
    if labels_ptr is not None:
        hard = (tl.log(s_1) - (z_label - m)) * row_weight
        hard = tl.where(bad, nan, hard)
    tl.store(hard_ptr + row, hard)
    tl.store(soft_ptr + row, tl.where(bad, nan, T * T * divergence * row_weight))

    if WANT_GRAD:
        scale = tl.load(params_ptr + SCALE) * row_weight
        scale = tl.where(bad, nan, scale)
        hard_scale = alpha * scale
        soft_scale = (1.0 - alpha) * T * scale
        # a factor of exactly 0 means that the part is not wanted: 0 * inf must not make it NaN
        base = tl.where(m_off == float("-inf"), m, m_off)
        a = tl.where(hard_scale == 0.0, 0.0, hard_scale * tl.exp(base - m) / s_1)
        b = tl.where((soft_scale == 0.0) | (s_off == 0.0), 0.0, soft_scale * off / s_off)
        g_entries = hard_scale * (e_1 / s_1) + tl.where(soft_scale == 0.0, 0.0, soft_scale * on)
        g_label = 0.0
        if labels_ptr is not None:
            g_entries = g_entries - tl.where(ids == label, hard_scale, 0.0)
            # the label off S: its share of both parts, less its own mass
            g_label = a * tl.exp(z_label - base) + b * tl.exp((z_label - base) / T) - hard_scale
            g_label = _through_head(g_label, z_label, SOFTCAP, softcap, SCALED, logit_scale)
        g_entries = _through_head(g_entries, z, SOFTCAP, softcap, SCALED, logit_scale)
        if T == 1.0:
            _write(
                x_ptr, x_stride, g_ptr, g_stride, V, rate, base, a, b, softcap, logit_scale, 1, SOFTCAP, SCALED, BLOCK
            )
        elif T == 2.0:
            _write(
                x_ptr, x_stride, g_ptr, g_stride, V, rate, base, a, b, softcap, logit_scale, 2, SOFTCAP, SCALED, BLOCK
            )
        else:
            _write(
                x_ptr, x_stride, g_ptr, g_stride, V, rate, base, a, b, softcap, logit_scale, 0, SOFTCAP, SCALED, BLOCK
            )
        # every thread's share of the sweep lies before the entries that overwrite it
        tl.debug_barrier()
        element = g_ptr.dtype.element_ty
        if labels_ptr is not None:
            label_off_support = tl.max((support & (ids == label)).to(tl.int32), 0) == 0
            tl.store(g_ptr + label * g_stride, g_label.to(element), mask=label_off_support)
        tl.store(g_ptr + ids * g_stride, g_entries.to(element), mask=support)


@triton.jit
def total_kernel(
    hard_ptr, soft_ptr, params_ptr, out_hard_ptr, out_soft_ptr, out_loss_ptr, P, HARD: tl.constexpr, BLOCK: tl.constexpr
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


@triton.jit
def zero_uncovered_kernel(g_ptr, covered_ptr, outer, inner_stride, stride, inner, V, BLOCK: tl.constexpr):
    """Zeros in the rows of the gradient that no target row belongs to."""
    position = tl.program_id(0).to(tl.int64)
    if tl.load(covered_ptr + position) == 0:
        _zero(g_ptr + (position // inner) * outer + (position % inner) * inner_stride, stride, V, BLOCK)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    """x *= factor; a factor of 1 costs nothing, and no one has to ask the device for it."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < numel)
    tl.store(x_ptr + cols, (x.to(tl.float32) * factor).to(x_ptr.dtype.element_ty), mask=cols < numel)


def scale_triton_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, in place, for a contiguous x."""
    block = 4096
    if x.numel():
        scale_kernel[(triton.cdiv(x.numel(), block),)](x, factor, x.numel(), BLOCK=block, num_warps=8)


def sweep_settings(width: int, itemsize: int) -> dict[str, int]:
    """Block and warps of the sweeps. The second read of a row must come from L2: few rows in flight, each wide.

    Measured on an H100; see bench/bench_loss.py --tune.
    """
    block = min(32768 // max(1, itemsize // 2), triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": min(32, max(4, block // 1024))}


class TritonRows:
    """The rows of one call on a GPU: `TorchRows`, without a look at any value. Rows that do not count are swept too."""

    def __init__(
        self,
        call: Call,
        positions: int,
        width: int,
        dtype: torch.dtype,
        *,
        upstream: Tensor | None = None,
        fixed_scale: float | None = None,
        softcap: float | None = None,
        logit_scale: float | None = None,
        want_grad: bool = True,
        what: str = "logits",
        settings: dict[str, int] | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise KDError(f"{what}: found {dtype}; float32, bfloat16 or float16 is needed with impl='triton'.")
        if values_are_checked(call.ids.device):
            check_values(call, positions, width)
        device = call.ids.device
        self.call, self.index, self.rows, self.want_grad = call, call.positions, call.rows, want_grad
        self.width, self.positions, self.what = width, positions, what
        grid = tuple(call.temperatures)
        m = len(grid)
        self.block_m = triton.next_power_of_2(m + 1)
        self.params = torch.empty(WEIGHTS.value + m + 1, dtype=torch.float32, device=device)
        self.divisor = self.params[DIVISOR.value]
        # float32, and not the outputs' memory: the sums are taken in one order by one program
        self.hard, self.soft = torch.empty(2, max(self.rows, 1), dtype=torch.float32, device=device)
        reach = SAMPLED_REACH * call.draw_temperature * (1 + ON_GRID) if call.treatment == "auto" else float("inf")
        prepare_kernel[(1,)](
            self.params,
            device_table(grid, device),
            call.labels,
            call.mask,
            call.positions,
            call.num_items,
            upstream,
            call.alpha_tensor,
            call.temperature_tensor,
            call.alpha,
            call.temperature,
            call.items,
            self.rows,
            positions,
            call.ignore_index,
            reach,
            fixed_scale or 0.0,
            M=m,
            OFF_GRID=m >= OFF_GRID_NEEDS,
            SNAP=ON_GRID,
            BLOCK=4096,
            BLOCK_M=self.block_m,
            num_warps=8,
        )
        treatment = "sampled" if call.treatment == "auto" else call.treatment
        if treatment == "sampled" and call.draws is None:
            treatment = "bucket"
        k = call.ids.shape[1]
        self.constants: dict[str, Any] = dict(
            DIVERGENCE=DIVERGENCES.index(call.divergence),
            TREATMENT={"bucket": BUCKET, "sampled": SAMPLED, "renormalize": RENORMALIZE}[treatment],
            WANT_GRAD=want_grad,
            SOFTCAP=softcap is not None,
            SCALED=logit_scale is not None,
            M=m,
            BLOCK_K=max(16, triton.next_power_of_2(k)),
            BLOCK_M=self.block_m,
            BLOCK_SLOW=512,
            **(settings or sweep_settings(width, dtype.itemsize)),
        )
        self.softcap, self.logit_scale = softcap or 1.0, logit_scale or 1.0
        self.targets = tuple(
            None if x is None else x.contiguous() for x in (call.ids, call.logprobs, call.draws, call.tail)
        )

    def loss_(self, x_CV: Tensor, first: int) -> None:
        """Losses of the rows from `first` on, whose raw logits x holds; x becomes their gradient, if one is wanted."""
        self._launch(x_CV[None], x_CV[None] if self.want_grad else None, x_CV.shape[0], first, by_position=False)

    def loss_at_positions(self, logits_BLV: Tensor, out_BLV: Tensor | None) -> None:
        """Losses of all rows, at their positions in the logits; their gradient goes to `out`."""
        self._launch(logits_BLV, out_BLV, self.rows, 0, by_position=True)
        index = self.safe_index()
        if out_BLV is not None and index is not None:
            covered = torch.zeros(self.positions + 1, dtype=torch.int8, device=out_BLV.device)
            covered[index] = 1
            if self.positions:
                zero_uncovered_kernel[(self.positions,)](
                    out_BLV, covered, *out_BLV.stride(), out_BLV.shape[1], self.width, BLOCK=4096, num_warps=8
                )

    def safe_index(self) -> Tensor | None:
        """The positions of the rows, int64 `[P]`; those outside the batch all at N, one past its end."""
        if self.index is None:
            return None
        inside = (self.index >= 0) & (self.index < self.positions)
        return torch.where(inside, self.index, self.positions).long()

    def _launch(self, x: Tensor, g: Tensor | None, programs: int, first: int, *, by_position: bool) -> None:
        if programs == 0:
            return
        call = self.call
        loss_kernel[(programs,)](
            x,
            g,
            self.hard,
            self.soft,
            self.params,
            call.labels,
            call.mask,
            call.weights,
            call.positions,
            *self.targets,
            call.outcomes,
            *x.stride(),
            *(x if g is None else g).stride(),
            x.shape[1],
            first,
            self.width,
            call.vocab_size,
            call.ids.shape[1],
            self.positions,
            call.outcomes.stride(0) if call.outcomes.ndim else 0,
            call.ignore_index,
            1.0 / call.draw_temperature,
            call.mix,
            self.softcap,
            self.logit_scale,
            BY_POSITION=by_position,
            IN_PLACE=g is not None and g.data_ptr() == x.data_ptr(),
            **self.constants,
        )

    def total(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, hard and soft."""
        if values_are_checked(self.params.device):
            bad = self.soft[: self.rows].isnan()
            check_student(bad if self.call.labels is None else bad | self.hard[: self.rows].isnan(), self.what)
        loss, hard, soft = (torch.empty((), dtype=torch.float32, device=self.params.device) for _ in range(3))
        total_kernel[(1,)](
            self.hard,
            self.soft,
            self.params,
            hard,
            soft,
            loss,
            self.rows,
            HARD=self.call.labels is not None,
            BLOCK=4096,
            num_warps=8,
        )
        return loss, hard, soft


def kd_loss_triton(
    logits: Tensor, call: Call, upstream: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hard, soft of logits `[..., V]`; the gradient times `upstream` goes to `out`, which may be the logits."""
    width = logits.shape[-1]
    rows = TritonRows(
        call, logits.numel() // max(width, 1), width, logits.dtype, upstream=upstream, want_grad=out is not None
    )
    rows.loss_at_positions(_as_three(logits), None if out is None else _as_three(out))
    return rows.total()


def _as_three(x: Tensor) -> Tensor:
    """A view `[B, L, V]` of `[..., V]`: two strides address every position, so that no slice has to be copied."""
    if x.ndim <= 3:
        return x[None] if x.ndim == 2 else x
    return x.view(-1, *x.shape[-2:])
