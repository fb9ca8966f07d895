"""Draws from a teacher's tail that are the same bits on every device, in every batching and on every retry.

A draw is made of integers alone, so nothing depends on the order in which anything is added up:

- random bits: a counter-based hash of (seed, global position, number of the draw, attempt) in wraparound int64;
- the weight of a token, an integer: `2^bits · e^((z - z_top)/T_d)`, cut, z_top being the tail's own most likely token;
- its units, a small integer that is never less than its weight in units of 2^(bits - UNIT_BITS), and rarely much more;
  they cost a third of the weight.

An attempt inverts the running sum of all tokens' units (in the order of the ids) at a random number. That names a
token, and leaves a remainder below the token's units: where it is below the token's weight, the token is drawn; where
not, the next attempt follows. So a token is drawn in proportion to its weight exactly. Tokens outside the tail have a
unit and no weight. Nine attempts in ten succeed.

Weights and units are computed in float32 by operations that IEEE 754 rounds one by one (no fused multiply-add), so two
devices agree on every bit. What is approximated: a weight is right to some 1e-6 relative (or the rounding of the
float32 logits, |z|·6e-8, where that is more), and a token whose probability is below 2^-bits of the most likely one's
(bits = 35 up to a vocabulary of 2^18) is never drawn. The top token's weight is exactly 2^bits, so a tail that is not
empty can always be drawn from. float64 logits are rounded to float32 first.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..targets import SparseTargets
from .config import TopKCall

GROUP = 32  # tokens per group of units
LOG2E = 1.4426950408889634
MINUS_2_LOG2E = -2.885390043258667  # as a float32
# 2^f on [-1/2, 1/2]: 1 + f·(C1 + f·(C2 + ...)), coefficients float32, relative error 1e-7.
C1 = 0.6931471824645996
C2 = 0.24022650718688965
C3 = 0.055503569543361664
C4 = 0.009618056938052177
C5 = 0.0013390866806730628
C6 = 0.00015461447765119374
# 2^-48 of the top is below one unit of weight, so lower values do not matter.
LOWEST = -48.0

# The units of the tail's top are about 2^UNIT_BITS: GROUP tokens' units add up exactly in float32, in any order.
UNIT_BITS = 18
# Units are bits of a float32 made by arithmetic: (1 + f)·2^n for y = n + f is never less than 2^y, and 6% more at most.
# y + 512 + 127 + UNIT_BITS lies between 512 and 1024, in steps of 2^-14, so that its fraction's 23 bits, shifted left
# by 9, are the exponent and the fraction wanted. One step more, so that no rounding takes it below.
UNIT_BIAS = 512.0 + 127.0 + UNIT_BITS + 2.0**-14
UNIT_SHIFT = 9
UNIT_LEAST = -20.0  # a quarter of a unit, which is rounded up to one
# An attempt fails with probability 1 - 0.94/(1 + V/2^UNIT_BITS) at most: this many never all do.
MAX_ATTEMPTS = 256
# On a CPU, the number of attempts per round grows, for the draws without a success so far.
_WINDOWS = (1, 4, 16, 64, 171)
ATTEMPT_STEP = 32  # attempts are counted above the 2^32 numbers of draws

STREAM = -7046029254386353131  # 0x9E3779B97F4A7C15, the golden-ratio step of a Weyl sequence
MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9 and
# 0x94D049BB133111EB: the finaliser of splitmix64 (Steele, Lea & Flood 2014, Stafford's 13)
MIX2 = -7723592293110705685


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers, one to one."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * MIX1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * MIX2
    return x ^ ((x >> 31) & (2**33 - 1))


def row_keys(seed: int, positions_N: Tensor) -> Tensor:
    """The key of a row's random bits, int64 `[N]`. positions_N: int64. seed: any integer, modulo 2^64."""
    start = (seed * STREAM + STREAM + 2**63) % 2**64 - 2**63  # what wraparound arithmetic would hold
    key = _mix(torch.full((), start, dtype=torch.int64, device=positions_N.device))
    return _mix(key + (positions_N + 1) * STREAM)


def uniforms(key: Tensor, draw: Tensor, attempt: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, each a multiple of 2^-53: a function of a row's key, its draw and attempt.

    int64 of any shapes that broadcast.
    """
    bits = _mix(key + (draw + 1 + (attempt << ATTEMPT_STEP)) * STREAM)
    return ((bits >> 11) & (2**53 - 1)).to(torch.float64) * 2.0**-53


def weight_bits(vocab_size: int) -> int:
    """log2 of the top token's weight: 35, or less where a vocabulary above 2^18 would take the total past 2^53."""
    return min(35, 53 - math.ceil(math.log2(vocab_size)))


def exponent_scale(draw_temperature: float) -> float:
    """log2(e)/T_d as a float32 number: every device multiplies by the same bits."""
    return float(np.float32(LOG2E / draw_temperature))


def reciprocal(number: float) -> float:
    """1/number as a float32 number. (A division by a scalar is not the same operation on every device.)"""
    return float(np.float32(1.0 / number))


def _exp2_(y: Tensor, shift: int = 0) -> Tensor:
    """2^(y + shift) for float32 y, clamped to LOWEST..0. In place, one rounded operation at a time."""
    y.clamp_(LOWEST, 0.0)
    whole = (y + 0.5).floor_()
    y.sub_(whole)  # exact; in [-1/2, 1/2]
    p = y * C6
    for c in (C5, C4, C3, C2, C1):
        p.add_(c).mul_(y)
    p.add_(1.0)
    power = whole.to(torch.int32).add_(127 + shift).bitwise_left_shift_(23).view(torch.float32)  # 2^(whole + shift)
    return p.mul_(power)  # exact


def exact_transform(x: Tensor, logit_scale: float | None, softcap: float | None) -> Tensor:
    """The LM head's transform of a float32 logit (scale, then `cap·tanh(x/cap)`), to the same bits on every device."""
    if logit_scale is not None:
        x = x * logit_scale
    if softcap is None:
        return x
    t = _exp2_((x * reciprocal(softcap)).abs_().mul_(MINUS_2_LOG2E))
    tanh = (1.0 - t).div_(1.0 + t)
    return torch.where(x.abs() < torch.inf, tanh.copysign_(x).mul_(softcap), x)


def work_type(logits: Tensor) -> torch.dtype:
    """The type in which sums are computed."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def transform(x: Tensor, call: TopKCall) -> Tensor:
    """The LM head's transform of a logit: scale, then softcap. −inf (a masked token) stays."""
    if x.dtype == torch.float32:
        return exact_transform(x, call.logit_scale, call.softcap)
    if call.logit_scale is not None:
        x = x * call.logit_scale
    if call.softcap is not None:
        x = torch.where(x.abs() < torch.inf, torch.tanh(x / call.softcap) * call.softcap, x)
    return x


def integer_weights(d: Tensor, scale: float, bits: int) -> Tensor:
    """Weights int64 of float32 z - top; 0 where it is −inf. `scale`: `exponent_scale`."""
    return _exp2_(d * scale, bits).long()


def units_(d: Tensor, scale: float) -> Tensor:
    """Units of tokens: whole numbers >= 1 as float32, in place of d: float32 z - top, at most 0. 1 where it is −inf.

    scale: `exponent_scale`.
    """
    d.mul_(scale).clamp_(min=UNIT_LEAST).add_(UNIT_BIAS)
    d.view(torch.int32).bitwise_left_shift_(UNIT_SHIFT)
    return d.ceil_()


@dataclass(frozen=True)
class State:
    """The inputs of the draws of some rows, in the work type where none is named: float32, or float64 for such logits.

    Top-k entries are those that are kept.
    """

    sums: Tensor  # float32 `[n, groups]`: units of every group of GROUP tokens; a top-k entry counts as one
    edge_x: Tensor  # `[n]`: the logit of the last top-k entry (+inf if there are none)
    edge_id: Tensor  # int64 `[n]`: and its id
    tail_top_x: Tensor  # `[n]`: the tail's greatest logit as given
    top: Tensor  # `[n]`: the row's greatest z
    log_total: Tensor  # `[n]`: and the log-partition relative to it
    size: Tensor  # int64 `[n]`: number of top-k entries
    wanted: Tensor  # bool `[n]`: the row is fine and has a tail

    def __getitem__(self, rows: slice) -> "State":
        return State(*(tensor[rows] for tensor in vars(self).values()))

    def tail_top(self, call: TopKCall) -> Tensor:
        """The transformed logit of the tail's top, float32 `[n]`."""
        return exact_transform(self.tail_top_x.float(), call.logit_scale, call.softcap)


@dataclass(frozen=True)
class Share:
    """Where one part of a divided vocabulary lies in the units of its rows, int64 `[n]`: the units of the parts before
    it, and those of all parts."""

    before: Tensor
    total: Tensor


def draw(state: State, logits_NV: Tensor, keys_N: Tensor, call: TopKCall) -> Tensor:
    """Drawn ids int64 `[n, draws]`; anything in rows that are not to be drawn from. keys_N: `row_keys`."""
    n, device = len(keys_N), keys_N.device
    # The groups of all rows in one line, row after row: the units before each, and of all.
    before = torch.zeros(state.sums.numel() + 1, dtype=torch.int64, device=device)
    torch.cumsum(state.sums.reshape(-1), 0, dtype=torch.int64, out=before[1:])
    draws, top_N = call.draws, state.tail_top(call)
    number_D = torch.arange(draws, device=device)
    row_R, number_R1 = torch.arange(n, device=device), number_D  # first every row with all its draws at once
    token_P = torch.zeros(n * draws, dtype=torch.int64, device=device)
    wanted_P = state.wanted.repeat_interleave(draws)
    some: Tensor | slice = slice(None)
    first = 0
    for count in _WINDOWS:
        if first:
            # Elsewhere, reading which draws need more attempts would synchronize: all of them continue.
            some = wanted_P.nonzero()[:, 0] if device.type == "cpu" else torch.arange(n * draws, device=device)
            if not len(some):
                break
            row_R, number_R1 = some // draws, (some % draws)[:, None]
        attempt_A = torch.arange(first, first + count, device=device)
        u = uniforms(keys_N[row_R][:, None, None], number_R1[..., None], attempt_A)
        named, good = attempt(state, logits_NV, call, top_N, before, row_R, u.view(len(row_R), -1))
        named, good = named.view(-1, count), good.view(-1, count)
        which = torch.where(good, attempt_A - first, count - 1).amin(1, keepdim=True)  # the first that succeeds
        wanted = wanted_P[some]
        token_P[some] = torch.where(wanted, named.gather(1, which)[:, 0], token_P[some])
        wanted_P[some] = wanted & ~good.any(1)
        first += count
    return token_P.view(n, draws)


def attempt(
    state: State,
    logits_NV: Tensor,
    call: TopKCall,
    top_N: Tensor,
    before: Tensor,
    row_R: Tensor,
    u_RC: Tensor,
    share: Share | None = None,
) -> tuple[Tensor, Tensor]:
    """The token that each uniform number names in its row, and whether it is drawn.

    top_N: `State.tail_top`. before: the units before each group of all rows, one after another. share: where the logits
    are one part of a divided vocabulary, and `state` has its units and ids; tokens of other parts are not drawn.
    """
    (n, vocab), groups, bits = logits_NV.shape, state.sums.shape[1], weight_bits(call.vocab_size)
    scale = exponent_scale(call.draw_temperature)
    low_bits = bits - UNIT_BITS
    row_R1 = row_R[:, None]
    first_R1 = row_R1 * groups
    start_R1 = before[first_R1]
    own_R1 = before[first_R1 + groups] - start_R1
    total_R1 = (own_R1 if share is None else share.total[row_R1]) << low_bits
    at_RC = torch.minimum((u_RC * total_R1.double()).long(), total_R1 - 1)
    unit_RC = at_RC >> low_bits
    if share is not None:
        unit_RC.sub_(share.before[row_R1])
        ours_RC = (unit_RC >= 0).logical_and_(unit_RC < own_R1)
    unit_RC.add_(start_R1)
    # (the limits here and below are for rows of NaN, whose draws are not used)
    group_RC = torch.searchsorted(before, unit_RC, right=True).sub_(1).clamp_(0, n * groups - 1)
    inside_RC1 = (unit_RC - before[group_RC]).to(torch.float32)[:, :, None]  # below 2^24: exact

    # the group's tokens, and the units of each
    first_RC1 = (group_RC - first_R1).mul_(GROUP)[:, :, None]
    token_RCW = torch.arange(GROUP, device=row_R.device) + first_RC1
    x_RCW = logits_NV[row_R1[:, :, None], token_RCW.clamp_(0, vocab - 1)]
    edge_R11, top_R11 = state.edge_x[row_R1, None], top_N[row_R1, None]
    in_topk = (x_RCW == edge_R11).logical_and_(token_RCW <= state.edge_id[row_R1, None]).logical_or_(x_RCW > edge_R11)
    x_RCW = x_RCW.float().masked_fill_(in_topk, -torch.inf)
    d_RCW = exact_transform(x_RCW, call.logit_scale, call.softcap) - top_R11
    units_RCW = units_(d_RCW.clone(), scale)
    running_RCW = units_RCW.cumsum(2)
    behind_RCW = running_RCW <= inside_RC1
    place_RC1 = behind_RCW.sum(2, keepdim=True).clamp_(max=GROUP - 1)
    rest_RC = (inside_RC1[:, :, 0] - running_RCW.mul_(behind_RCW).amax(2)).long()  # units of the token itself
    rest_RC = (rest_RC << low_bits).add_(at_RC & (2**low_bits - 1))
    weight_RC = integer_weights(d_RCW.gather(2, place_RC1)[:, :, 0], scale, bits)
    good_RC = rest_RC < weight_RC
    return token_RCW.gather(2, place_RC1)[:, :, 0], good_RC if share is None else good_RC.logical_and_(ours_RC)


def merge_drawn(logits_NV: Tensor, ids_ND: Tensor, state: State, out: SparseTargets, call: TopKCall) -> None:
    """Write drawn ids (any order) behind the top-k entries of their rows: equal ids once, with their count, best first.

    Rows that are not wanted stay as they are. `out` holds the top-k entries, and unused entries behind them.
    """
    ids_ND = ids_ND.clamp(0, call.vocab_size - 1)
    merge_values(logits_NV.gather(1, ids_ND), ids_ND, state, out, call)


def merge_values(values_ND: Tensor, ids_ND: Tensor, state: State, out: SparseTargets, call: TopKCall) -> None:
    """`merge_drawn` with the logits of the drawn ids."""
    assert out.draws is not None
    ids_ND, by_id = ids_ND.sort(1)
    values_ND = values_ND.gather(1, by_id)
    z_ND = transform(values_ND.to(state.top.dtype), call)
    logprobs_ND = (z_ND - state.top[:, None] - state.log_total[:, None]).to(out.logprobs.dtype)
    ordered = values_ND.sort(dim=1, descending=True, stable=True)  # stable: equal values stay in the order of their ids
    ids_ND = ids_ND.gather(1, ordered.indices)
    new_ND = torch.ones_like(ids_ND)
    new_ND[:, 1:] = ids_ND[:, 1:] != ids_ND[:, :-1]
    place_ND = state.size[:, None] + new_ND.cumsum(1) - 1
    drawn_N1 = state.wanted[:, None]
    # equal ids write equal values to one place, and the counts are integers: no order of writing can show
    out.draws.scatter_add_(1, place_ND, drawn_N1.expand_as(place_ND).to(out.draws.dtype))
    ids = torch.where(drawn_N1, ids_ND.to(out.ids.dtype), out.ids.gather(1, place_ND))
    logprobs = torch.where(drawn_N1, logprobs_ND.gather(1, ordered.indices), out.logprobs.gather(1, place_ND))
    out.ids.scatter_(1, place_ND, ids)
    out.logprobs.scatter_(1, place_ND, logprobs)
