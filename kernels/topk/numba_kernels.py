# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
"""The compiled functions of `numba_impl.py`: a row is swept while it is in a core's own cache.

Compiled functions release the GIL, so that threads run in parallel. The integer arithmetic of draws
rounds every operation once: it is compiled without the flag `contract`, which would fuse multiplications and sums.
"""

import math
from contextlib import suppress
from typing import Any

import numba
import numpy as np
from numba.core.caching import FunctionCache

from . import draws as dr

LANES = 16  # groups whose maxima are computed together, interleaved, so that a vector has a token of each
CHUNK = LANES * 32  # tokens processed at a time, whose intermediate values fit into the fastest cache

# Numba reads these when it compiles, and keeps compiled code until this file changes: if one of
# the constants of draws.py changes, change this file too.
F = np.float32
ZERO, HALF, ONE, MINUS_INF = F(0), F(0.5), F(1), F(-np.inf)
LEAST = F(-126)  # 2^-126 is the least normal number
C1, C2, C3, C4, C5, C6 = (F(c) for c in (dr.C1, dr.C2, dr.C3, dr.C4, dr.C5, dr.C6))
LOWEST, MINUS_2_LOG2E = F(dr.LOWEST), F(dr.MINUS_2_LOG2E)
UNIT_LEAST, UNIT_BIAS, UNIT_SHIFT = F(dr.UNIT_LEAST), F(dr.UNIT_BIAS), np.int32(dr.UNIT_SHIFT)
UNIT_BITS, MAX_ATTEMPTS, ATTEMPT_STEP = dr.UNIT_BITS, dr.MAX_ATTEMPTS, dr.ATTEMPT_STEP
GROUP = dr.GROUP
STREAM, MIX1, MIX2 = np.int64(dr.STREAM), np.int64(dr.MIX1), np.int64(dr.MIX2)
NO_KEY = np.int64(-2139095041 << 32)  # of −inf, after all tokens
LOW_BITS = np.int64(0x7FFFFFFF)


def compiled(**options: Any) -> Any:
    """numba.njit without the GIL, cached on disk beside this file or in the user's cache, where one of them can
    be written to."""

    def decorate(function: Any) -> Any:
        made = numba.njit(nogil=True, **options)(function)
        with suppress(RuntimeError):  # neither can: it is compiled in every process
            made._cache = _Cache(function)
        return made

    return decorate


class _Cache(FunctionCache):
    """What `cache=True` makes; but what cannot be read is compiled anew, and what cannot be written is not kept."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # of any type: the file is incomplete, for example after a power cut
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk
            super().save_overload(sig, data)


# Arrays below are float32, of one dimension and length CHUNK, unless stated otherwise. Loops are explicit, so that the
# compiler vectorizes them.


@compiled(fastmath={"contract"}, inline="always")
def _exp2(y):
    """2^y for y <= 0, to 1e-7; 0 below the normal numbers."""
    low = max(y, LEAST)
    whole = np.floor(low + HALF)
    f = low - whole
    p = ((((((C6 * f + C5) * f) + C4) * f + C3) * f + C2) * f + C1) * f + ONE
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return p * F(np.int32(power).view(np.float32)) if y >= LEAST else ZERO


@compiled(inline="always")
def _exp2_exact(y, shift):
    """`draws._exp2_`: every operation rounds once."""
    y = min(max(y, LOWEST), ZERO)
    whole = np.floor(y + HALF)
    y = y - whole
    p = y * C6
    p = (p + C5) * y
    p = (p + C4) * y
    p = (p + C3) * y
    p = (p + C2) * y
    p = (p + C1) * y
    p = p + ONE
    power = np.int32((np.int32(whole) + np.int32(127 + shift)) << np.int32(23))
    return p * F(np.int32(power).view(np.float32))


@compiled(inline="always")
def _transformed(x, scale, cap, cap_reciprocal):
    """`draws.exact_transform`; cap 0: none."""
    x = x * scale
    if cap == ZERO or not abs(x) < np.inf:
        return x
    t = _exp2_exact(abs(x * cap_reciprocal) * MINUS_2_LOG2E, 0)
    return math.copysign((ONE - t) / (ONE + t), x) * cap


@compiled(inline="always")
def _units_of(d, scale):
    """`draws.units_`, of one token."""
    y = max(d * scale, UNIT_LEAST) + UNIT_BIAS
    return np.ceil(F(np.int32(F(y).view(np.int32) << UNIT_SHIFT).view(np.float32)))


@compiled()
def _transform(x, scale, cap, cap_reciprocal):
    """The LM head's transform, in place, of a row of any length."""
    for j in range(len(x)):
        x[j] = _transformed(x[j], scale, cap, cap_reciprocal)


@compiled()
def _maxima(x, half, tops):
    """Of tokens l, l + LANES, ... for each of the LANES; NaN is none. half: CHUNK // 2 numbers, overwritten."""
    for j in range(CHUNK // 2):
        v, w = x[j], x[j + CHUNK // 2]
        v = v if v > MINUS_INF else MINUS_INF
        half[j] = w if w > v else v
    length = CHUNK // 4
    while length >= LANES:
        for j in range(length):
            v, w = half[j], half[j + length]
            half[j] = w if w > v else v
        length //= 2
    for j in range(LANES):
        tops[j] = half[j]


@compiled()
def _count(x):
    """Tokens above −inf."""
    finite = np.int32(0)
    for j in range(CHUNK):
        finite += np.int32(x[j] > MINUS_INF)
    return finite


@compiled(fastmath={"contract", "reassoc"})
def _exponentials(x, top, scale, e):
    """2^(scale·(x - top)), and their sum."""
    s = ZERO
    for j in range(CHUNK):
        e[j] = _exp2((x[j] - top) * scale)
        s += e[j]
    return s


@compiled(fastmath={"reassoc"})
def _square(e):
    """The same in place, and their sum."""
    s = ZERO
    for j in range(CHUNK):
        e[j] = e[j] * e[j]
        s += e[j]
    return s


@compiled()
def _units(x, top, scale, u):
    for j in range(CHUNK):
        u[j] = _units_of(x[j] - top, scale)


@compiled(fastmath={"reassoc"})
def _group_sums(u, sums):
    """The sum of each GROUP of neighbors, for the length of `sums`. Integers: the order of adding has no effect."""
    for g in range(len(sums)):
        s = ZERO
        for j in range(GROUP):
            s += u[g * GROUP + j]
        sums[g] = s


@compiled(inline="always")
def _in_order(bits):
    """The bits of a float as an integer of the same order, and back."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@compiled(inline="always")
def _key(x, token):
    """An integer that is greater for what comes earlier in a stable descending sort."""
    ordered = np.int64(_in_order(F(x + ZERO).view(np.int32)))  # + 0: −0 ties with 0
    return (ordered << np.int64(32)) | (LOW_BITS - np.int64(token))


@compiled(inline="always")
def _x_of(key):
    return np.int32(_in_order(np.int32(key >> np.int64(32)))).view(np.float32)


@compiled()
def _replace_least(heap, key):
    """Replace the smallest key of a heap."""
    size, i = len(heap), 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = key


@compiled()
def _best(row, tops, heap):
    """Write the greatest keys of a row `[chunks·CHUNK]` to `heap`, descending; NO_KEY beyond their number.

    tops `[chunks·LANES]`: of `_maxima`. As many of its groups as the heap has room for hold everything that is wanted,
    so the least of these maxima is a bound.
    """
    heap[:] = NO_KEY
    bound = MINUS_INF
    if len(tops) >= len(heap):
        for g in range(len(tops)):
            if tops[g] > bound:
                _replace_least(heap, _key(tops[g], g))
                bound = _x_of(heap[0])
    heap[:] = NO_KEY
    for g in range(len(tops)):
        if tops[g] >= bound:
            first = (g // LANES) * CHUNK + g % LANES
            for token in range(first, first + CHUNK, LANES):
                if row[token] >= bound:
                    key = _key(row[token], token)
                    if key > heap[0]:
                        _replace_least(heap, key)
                        if heap[0] != NO_KEY:
                            bound = max(bound, _x_of(heap[0]))
    heap.sort()
    heap[:] = heap[::-1].copy()


@compiled()
def _copy(x, row):
    """A chunk of a row of logits; the last one, which may be shorter, is filled up with tokens that are no outcomes."""
    if len(x) == CHUNK:
        for j in range(CHUNK):
            row[j] = x[j]
    else:
        for j in range(CHUNK):
            row[j] = x[j] if j < len(x) else MINUS_INF


@compiled()
def sweep_rows(
    x_NV, entries, scales, steps, powers, transform, unit_scale, best_x, best_id, row_top, finite, sums, units
):
    """x_NV: C-contiguous. Outputs best_x, best_id `[n, entries (+ 1)]`, row_top, finite `[n]`, sums `[n, M]`; units
    `[n, groups]` where unit_scale is not 0. steps, powers: `TopKCall.chains`. transform: `_transform_numbers`."""
    n, vocab = x_NV.shape
    count = best_x.shape[1]
    chunks = -(-vocab // CHUNK)
    row, e = np.empty(chunks * CHUNK, F), np.empty(CHUNK, F)
    tops, heap = np.empty(chunks * LANES, F), np.empty(count, np.int64)
    for r in range(n):
        outcomes = 0
        for c in range(chunks):
            x = row[c * CHUNK : (c + 1) * CHUNK]
            _copy(x_NV[r, c * CHUNK : (c + 1) * CHUNK], x)
            _maxima(x, e, tops[c * LANES : (c + 1) * LANES])
            outcomes += _count(x)
        finite[r] = outcomes
        row_top[r] = F(np.nan) if outcomes < vocab and np.isnan(x_NV[r]).any() else tops.max()
        _best(row, tops, heap)
        for i in range(count):
            token = LOW_BITS - (heap[i] & np.int64(0xFFFFFFFF))
            there = heap[i] != NO_KEY and token < vocab
            best_id[r, i] = token if there else 0
            best_x[r, i] = row[token] if there else MINUS_INF
        for i in range(min(entries, count)):
            if best_x[r, i] > MINUS_INF:
                row[best_id[r, i]] = MINUS_INF
        tail_top = _tail_top(row, best_x[r, entries] if entries < count else MINUS_INF, transform)
        total = np.zeros(len(scales))
        for c in range(chunks):
            x = row[c * CHUNK : (c + 1) * CHUNK]
            for i in range(len(steps)):
                some = ZERO
                if powers[i] == 0:
                    some = _exponentials(x, tail_top, scales[steps[i]], e)
                for _ in range(powers[i] // 2):  # 2: once, 4: twice
                    some = _square(e)
                total[steps[i]] += some
        for i in range(len(total)):
            sums[r, i] = total[i]
        if unit_scale != ZERO:
            _row_units(row, vocab, tail_top, unit_scale, e, units[r])


@compiled()
def _tail_top(row, tail_top_x, transform):
    """Put a row without its top-k entries through the LM head's transform; its greatest z, 0 where there is none."""
    scale, cap, cap_reciprocal = transform[0], transform[1], transform[2]
    if scale != ONE or cap != ZERO:
        _transform(row, scale, cap, cap_reciprocal)
    top = _transformed(tail_top_x, scale, cap, cap_reciprocal)
    return top if top > MINUS_INF else ZERO


@compiled()
def _row_units(row, vocab, top, unit_scale, e, units):
    """Units of a row's groups `[groups]`; of what fills up the last one, which comes last, there are none."""
    for c in range(len(row) // CHUNK):
        _units(row[c * CHUNK : (c + 1) * CHUNK], top, unit_scale, e)
        _group_sums(e, units[c * (CHUNK // GROUP) : (c + 1) * (CHUNK // GROUP)])
    units[-1] -= F(len(units) * GROUP - vocab)


@compiled()
def unit_rows(x_NV, best_id, size, tail_top_x, transform, unit_scale, units):
    """The units alone, of what the first size[r] of best_id `[n, entries]` leave."""
    n, vocab = x_NV.shape
    chunks = -(-vocab // CHUNK)
    row, e = np.empty(chunks * CHUNK, F), np.empty(CHUNK, F)
    for r in range(n):
        for c in range(chunks):
            _copy(x_NV[r, c * CHUNK : (c + 1) * CHUNK], row[c * CHUNK : (c + 1) * CHUNK])
        for i in range(size[r]):
            row[best_id[r, i]] = MINUS_INF
        _row_units(row, vocab, _tail_top(row, tail_top_x[r], transform), unit_scale, e, units[r])


@compiled(inline="always")
def _mix(x):
    """`draws._mix`, of one int64."""
    x = (x ^ ((x >> 30) & np.int64(2**34 - 1))) * MIX1
    x = (x ^ ((x >> 27) & np.int64(2**37 - 1))) * MIX2
    return x ^ ((x >> 31) & np.int64(2**33 - 1))


@compiled()
def draw_rows(x_NV, sums, edge_x, edge_id, top, keys, wanted, transform, unit_scale, bits, ids):
    """`draws.draw`. x_NV: C-contiguous float32; ids int64 `[n, draws]`: to be filled in the rows that are wanted."""
    n, vocab = x_NV.shape
    groups = sums.shape[1]
    low_bits = np.int64(bits - UNIT_BITS)
    below = (np.int64(1) << low_bits) - np.int64(1)
    before = np.empty(groups + 1, np.int64)
    scale, cap, cap_reciprocal = transform[0], transform[1], transform[2]
    for r in range(n):
        if not wanted[r]:
            continue
        before[0] = 0
        for g in range(groups):
            before[g + 1] = before[g] + np.int64(sums[r, g])
        total = before[groups] << low_bits
        for number in range(ids.shape[1]):
            for attempt in range(MAX_ATTEMPTS):
                stream = np.int64(number + 1) + (np.int64(attempt) << np.int64(ATTEMPT_STEP))
                random = (_mix(keys[r] + stream * STREAM) >> 11) & np.int64(2**53 - 1)
                at = min(np.int64(np.float64(random) * 2.0**-53 * np.float64(total)), total - 1)
                unit = at >> low_bits
                group = np.searchsorted(before, unit, side="right") - 1
                inside = unit - before[group]  # units of the group's tokens before the one that is named, and its own
                token, d, u = 0, ZERO, np.int64(0)
                for token in range(group * GROUP, min(group * GROUP + GROUP, vocab)):
                    x = x_NV[r, token]
                    if x > edge_x[r] or (x == edge_x[r] and token <= edge_id[r]):
                        x = MINUS_INF  # a top-k entry
                    d = _transformed(x, scale, cap, cap_reciprocal) - top[r]
                    u = np.int64(_units_of(d, unit_scale))
                    if u > inside:
                        break
                    inside -= u
                ids[r, number] = token
                weight = np.int64(_exp2_exact(d * unit_scale, bits))
                if (inside << low_bits) + (at & below) < weight:
                    break
