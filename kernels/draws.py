"""Draws from a teacher's tail that are the same bits on every device, in every batching and on every retry.

A draw has two halves, and neither depends on the order in which anything is added up:

- a uniform number keyed by (seed, global position, number of the draw): a counter-based hash in wraparound int64;
- an integer weight for every token of the tail, relative to the tail's own most likely token. Integers add up to the
  same total in any order, so inverting their running sum (in the order of the ids) names the same token everywhere.

The weight of a token is `2^bits · e^((z - z_top)/T_d)`, cut to an integer. It is computed in float32 by operations that
IEEE 754 rounds one by one (no fused multiply-add), so two devices agree on every bit. What is approximated: a weight is
right to some 1e-6 relative (or the rounding of the float32 logits, |z|·6e-8, where that is more), and a token whose
probability is below 2^-bits of the most likely one's (bits = 35 up to a vocabulary of 2^18) is never drawn. The top
token's weight is exactly 2^bits, so a tail that is not empty can always be drawn from. float64 logits are rounded to
float32 first.

The Triton kernels use the same constants and the same operations in the same order.
"""

import math

import numpy as np
import torch
from torch import Tensor

LOG2E = 1.4426950408889634
MINUS_2_LOG2E = -2.885390043258667  # as a float32
# 2^f on [-1/2, 1/2]: 1 + f·(C1 + f·(C2 + ...)), coefficients float32, relative error 1e-7.
C1 = 0.6931471824645996
C2 = 0.24022650718688965
C3 = 0.055503569543361664
C4 = 0.009618056938052177
C5 = 0.0013390866806730628
C6 = 0.00015461447765119374
# 2^-48 of the top is below one unit of weight: no need to look further down.
LOWEST = -48.0

_STREAM = -7046029254386353131  # 0x9E3779B97F4A7C15, the golden-ratio step of a Weyl sequence
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9 and
# 0x94D049BB133111EB: the finaliser of splitmix64 (Steele, Lea & Flood 2014, Stafford's 13)
_MIX2 = -7723592293110705685


def _wrap(number: int) -> int:
    """A Python integer as the int64 that wraparound arithmetic would hold."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers, one to one."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX2
    return x ^ ((x >> 31) & (2**33 - 1))


def uniforms(seed: int, positions_N: Tensor, draws: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 `[N, draws]`, each a multiple of 2^-53, a function of (seed, position, draw).

    positions_N: int64 `[N]`. seed: any integer, taken modulo 2^64.
    """
    key = _mix(torch.full((), _wrap(seed * _STREAM + _STREAM), dtype=torch.int64, device=positions_N.device))
    row_N = _mix(key + (positions_N + 1) * _STREAM)
    step_D = torch.arange(1, draws + 1, dtype=torch.int64, device=positions_N.device) * _STREAM
    bits_ND = _mix(row_N[:, None] + step_D)
    return ((bits_ND >> 11) & (2**53 - 1)).to(torch.float64) * 2.0**-53


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
    """What the head does to a float32 logit (scale, then `cap·tanh(x/cap)`), to the same bits on every device."""
    if logit_scale is not None:
        x = x * logit_scale
    if softcap is None:
        return x
    t = _exp2_((x * reciprocal(softcap)).abs_().mul_(MINUS_2_LOG2E))
    tanh = (1.0 - t).div_(1.0 + t)
    return torch.where(x.abs() < torch.inf, tanh.copysign_(x).mul_(softcap), x)


def integer_weights(z_NV: Tensor, top_N: Tensor, scale: float, bits: int) -> Tensor:
    """Weights int64 `[N, V]` of transformed float32 logits relative to each row's top; 0 where z is −inf."""
    return _exp2_((z_NV - top_N[:, None]).mul_(scale), bits).long()


def invert(weights_NV: Tensor, uniform_ND: Tensor) -> Tensor:
    """The id each uniform number falls on, int64 `[N, draws]`, ids in ascending order; V where a row's total is 0."""
    running_NV = weights_NV.cumsum(1)
    total_N1 = running_NV[:, -1:]
    r_ND = torch.minimum((uniform_ND * total_N1.double()).long(), total_N1 - 1)
    return torch.searchsorted(running_NV, r_ND.clamp_(min=0), right=True)


def merge(
    ids_ND: Tensor,
    values_ND: Tensor,
    logprobs_ND: Tensor,
    drawn_N: Tensor,
    kept_N: Tensor,
    *,
    out_ids: Tensor,
    out_logprobs: Tensor,
    out_draws: Tensor,
) -> None:
    """Write the drawn entries of every row behind its head: equal ids once, with their count, best first.

    ids_ND int64 ascending in each row, values_ND the logits there (what "best" means), logprobs_ND, drawn_N bool (rows
    without draws are left as they are), kept_N the number of entries in the head. The outputs `[N, K]` hold the head,
    and unused places behind it.
    """
    ordered = values_ND.sort(dim=1, descending=True, stable=True)  # stable: equal values stay in the order of their ids
    ids_ND = ids_ND.gather(1, ordered.indices)
    new_ND = torch.ones_like(ids_ND)
    new_ND[:, 1:] = ids_ND[:, 1:] != ids_ND[:, :-1]
    place_ND = kept_N[:, None] + new_ND.cumsum(1) - 1
    drawn_N1 = drawn_N[:, None]
    # equal ids write equal values to one place, and the counts are integers: no order of writing can show
    out_draws.scatter_add_(1, place_ND, drawn_N1.expand_as(place_ND).to(out_draws.dtype))
    ids = torch.where(drawn_N1, ids_ND.to(out_ids.dtype), out_ids.gather(1, place_ND))
    logprobs = torch.where(drawn_N1, logprobs_ND.gather(1, ordered.indices), out_logprobs.gather(1, place_ND))
    out_ids.scatter_(1, place_ND, ids)
    out_logprobs.scatter_(1, place_ND, logprobs)
