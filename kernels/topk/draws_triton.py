# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The draws of `draws.py` in Triton, to the same bits.

`_weigh` reads the logits once more for the units of every token, and writes their sum per group. `_draw`, one program
per draw, makes its attempts: it finds the group of a random number and the token in it, and computes its weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from ..triton_math import INF, finite_or_zero
from . import draws as dr
from .config import TopKCall
from .sizes import draw_sizes, power_of_2
from .triton_math import column, exp2_exact, ordered, transform, unordered

STREAM = constexpr(dr.STREAM)
MIX1 = constexpr(dr.MIX1)
MIX2 = constexpr(dr.MIX2)
ATTEMPT_STEP = constexpr(dr.ATTEMPT_STEP)
MAX_ATTEMPTS = constexpr(dr.MAX_ATTEMPTS)
UNIT_BIAS = constexpr(dr.UNIT_BIAS)
UNIT_SHIFT = constexpr(dr.UNIT_SHIFT)
UNIT_LEAST = constexpr(dr.UNIT_LEAST)


@triton.jit
def _mix(x):
    """`draws._mix`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _units(d, draw_scale):
    """`draws.units_` of z - top, as int32; 1 where it is −inf."""
    y = tl.maximum(d * draw_scale, UNIT_LEAST) + UNIT_BIAS
    return tl.ceil((y.to(tl.int32, bitcast=True) << UNIT_SHIFT).to(tl.float32, bitcast=True)).to(tl.int32)


@triton.jit
def _in_topk(x, token, edge_x, edge_id):
    """Whether a token comes no later than the last top-k entry in a stable descending sort."""
    return (x > edge_x) | ((x == edge_x) & (token <= edge_id))


@triton.jit
def _before(x):
    """The next float32 below a finite number."""
    key = ordered(x)
    return unordered(tl.where(key == 0, -2, key - 1))  # -1 is -0.0, which equals 0.0


@triton.jit
def _weigh(
    x_ptr, stride_n, stride_v, vocab, parts,
    state_ptr, edge_ptr,  # [5, N] and [2, N], as `triton_kernels._finish` left them
    units_ptr,  # out [N, groups] int32
    rows, draw_scale, scale, cap, inverse_cap,
    G: constexpr, BLOCK: constexpr, UNIT: constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    start = part * BLOCK
    token = start + tl.arange(0, BLOCK)
    at = x_ptr + row * stride_n + column(token, stride_v, UNIT)
    edge_x, edge_id = tl.load(state_ptr + 2 * rows + row), tl.load(edge_ptr + row)
    top = tl.load(state_ptr + 3 * rows + row)
    top = finite_or_zero(transform(top, scale, cap, inverse_cap, True))
    if start + BLOCK <= vocab:
        raw = tl.load(at)
    else:
        raw = tl.load(at, mask=token < vocab, other=-INF)
    x = raw.to(tl.float32)
    # What ties with the last top-k entry goes by the id, which only one block of a row has to compare.
    least = edge_x
    if edge_id >= start + BLOCK:
        least = _before(edge_x)
    elif edge_id >= start:
        x = tl.where((x == edge_x) & (token <= edge_id), INF, x)
    x = tl.where(x > least, -INF, x)
    units = _units(transform(x, scale, cap, inverse_cap, True) - top, draw_scale)
    sums = tl.sum(tl.reshape(units, [BLOCK // G, G]), axis=1)
    # tokens behind the vocabulary's end have a unit each
    groups = parts * (BLOCK // G)
    group = part * (BLOCK // G) + tl.arange(0, BLOCK // G)
    sums -= tl.minimum(tl.maximum((group + 1) * G - vocab, 0), G)
    tl.store(units_ptr + row * groups + group, sums)


@triton.jit
def _draw(
    x_ptr, stride_n, stride_v, vocab, groups, draws,
    state_ptr, edge_ptr, units_ptr,  # as `_weigh` has them
    key_ptr,  # [N] int64
    drawn_ptr,  # out [N, draws] int64
    rows, draw_scale, scale, cap, inverse_cap,
    BITS: constexpr,  # of a weight
    LOW_BITS: constexpr,  # of these, those below a unit
    G: constexpr, GROUPS: constexpr, UNIT: constexpr,
):  # fmt: skip
    draw = tl.program_id(0).to(tl.int64)
    row = draw // draws
    number = draw % draws
    key = tl.load(key_ptr + row)
    place = tl.arange(0, GROUPS)
    running = tl.cumsum(tl.load(units_ptr + row * groups + place, mask=place < groups, other=0).to(tl.int64), axis=0)
    total = tl.max(running, axis=0) << LOW_BITS
    edge_x, edge_id = tl.load(state_ptr + 2 * rows + row), tl.load(edge_ptr + row)
    top_x = tl.load(state_ptr + 3 * rows + row)
    top = finite_or_zero(transform(top_x, scale, cap, inverse_cap, True))
    drawn = tl.full([], 0, tl.int32)
    # a row without a tail, or with NaN, has no draws
    wanted = (top_x > -INF) & (tl.load(state_ptr + 4 * rows + row) > 0)
    attempt = tl.where(wanted, 0, MAX_ATTEMPTS).to(tl.int64)
    while attempt < MAX_ATTEMPTS:
        bits = _mix(key + (number + 1 + (attempt << ATTEMPT_STEP)) * STREAM)
        u = ((bits >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * (1.0 / 9007199254740992.0)
        at = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
        unit = at >> LOW_BITS
        # every running sum up to `unit` belongs to a group that ends before it
        before = running <= unit
        group = tl.minimum(tl.sum(before.to(tl.int32), axis=0), groups - 1)
        inside = (unit - tl.max(tl.where(before, running, 0), axis=0)).to(tl.int32)
        token = group * G + tl.arange(0, G)
        x = tl.load(x_ptr + row * stride_n + column(token, stride_v, UNIT), mask=token < vocab, other=-INF)
        x = x.to(tl.float32)
        in_topk = _in_topk(x, token, edge_x, edge_id)
        d = transform(x, scale, cap, inverse_cap, True) - top
        units = tl.cumsum(tl.where(token < vocab, _units(tl.where(in_topk, -INF, d), draw_scale), 0), axis=0)
        behind = units <= inside
        found = tl.sum(behind.to(tl.int32), axis=0)
        rest = (inside - tl.max(tl.where(behind, units, 0), axis=0)).to(tl.int64) << LOW_BITS
        rest += at - (unit << LOW_BITS)
        drawn = tl.minimum(group * G + found, vocab - 1)
        # the token itself, out of the group's: −inf for a top-k entry, which has no weight
        d = tl.max(tl.where((token == drawn) & (in_topk == 0), d, -INF), axis=0)
        weight = exp2_exact(d * draw_scale, BITS).to(tl.int64)
        attempt = tl.where(rest < weight, MAX_ATTEMPTS, attempt + 1).to(tl.int64)
    tl.store(drawn_ptr + draw, drawn.to(tl.int64))


def draw(
    x: Tensor,
    state: Tensor,
    edge: Tensor,
    call: TopKCall,
    positions_N: Tensor,
    transform_numbers: tuple[float | None, ...],
) -> Tensor:
    """Drawn ids int64 `[N, draws]`; anything in rows without a tail. state, edge: as `_finish` leaves them."""
    rows, vocab = x.shape
    stride_n, stride_v = x.stride()
    unit, bits, size = stride_v == 1, dr.weight_bits(vocab), draw_sizes(vocab)
    units = torch.empty((rows, size.groups), dtype=torch.int32, device=x.device)
    drawn = torch.empty((rows, call.draws), dtype=torch.int64, device=x.device)
    keys = dr.row_keys(call.seed, positions_N)
    draw_scale = dr.exponent_scale(call.draw_temperature)
    # fused multiply-adds round once where the twin rounds twice, and another token could be drawn
    exact = {"enable_fp_fusion": False}
    _weigh[(rows * size.parts,)](
        x, stride_n, stride_v, vocab, size.parts, state, edge, units, rows, draw_scale, *transform_numbers,
        G=size.group, BLOCK=size.block, UNIT=unit, num_warps=size.warps, **exact,
    )  # fmt: skip
    _draw[(rows * call.draws,)](
        x, stride_n, stride_v, vocab, size.groups, call.draws, state, edge, units, keys, drawn, rows, draw_scale,
        *transform_numbers, BITS=bits, LOW_BITS=bits - dr.UNIT_BITS, G=size.group, GROUPS=power_of_2(size.groups),
        UNIT=unit, num_warps=size.draw_warps, **exact,
    )  # fmt: skip
    return drawn
