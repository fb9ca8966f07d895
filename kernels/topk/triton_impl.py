"""Top-k, tails and draws on a GPU: scratch memory, sizes and the order of the kernels' launches.

`triton_kernels.py` has the kernels of the top-k entries and the tails, `draws_triton.py` those of the draws. Nothing
waits for the device.
"""

import contextlib

import torch
import triton
from torch import Tensor

from ..interpreter import is_interpreted
from ..targets import SparseTargets
from . import draws as dr
from .config import TopKCall
from .draws_triton import draw
from .fill import merge_drawn, refuse
from .triton_kernels import _finish, _pick, _scan, _select

MAX_K = 1024
# float32 bits that a logit of the type never uses: the bisection need not look at them
UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


class Tuning:
    """Sizes that affect speed only: tokens per group, tokens and warps a program."""

    group = 128  # halved for more than 128 top-k entries
    scan_block = 4096
    scan_warps = 4
    pick_warps = 4
    select_tokens = 1024  # a warp
    select_tile = 2048  # tokens at a time


# The Triton interpreter runs the kernels on CPU tensors; it is chosen when triton is imported.
INTERPRETED = is_interpreted(_scan)

_scales: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _log2e_over_t(temperatures: tuple[float, ...], device: torch.device) -> Tensor:
    """log2(e)/T `[M]` float32 on a device, copied there once."""
    key = (temperatures, device)
    if key not in _scales:
        _scales[key] = torch.tensor([dr.LOG2E / t for t in temperatures], dtype=torch.float32, device="cpu").to(device)
    return _scales[key]


def fill_triton(logits_NV: Tensor, out: SparseTargets, call: TopKCall, positions_N: Tensor, first_row: int) -> None:
    """Fill `out` from logits `[N, V]` (bfloat16, float16 or float32, any stride); at most MAX_K top-k entries.

    `first_row`: the number of the first row in an error message, which only CPU tensors can give.
    """
    on = torch.cuda.device(logits_NV.device) if logits_NV.is_cuda else contextlib.nullcontext()
    with on:
        _launch(logits_NV, out, call, positions_N, first_row)


def _launch(x: Tensor, out: SparseTargets, call: TopKCall, positions_N: Tensor, first_row: int) -> None:
    rows, vocab = x.shape
    entries, many, device = call.entries, len(call.temperatures), x.device
    stride_n, stride_v = x.stride()
    unit = stride_v == 1
    scales = _log2e_over_t(call.temperatures, device)
    chain = sum((m | power << 8) << (16 * i) for i, (m, power) in enumerate(call.chains()))
    unused = UNUSED_BITS[x.dtype]
    transform = (
        call.logit_scale if call.logit_scale is not None else 1.0,
        call.softcap if call.softcap is not None else 1.0,
        dr.reciprocal(call.softcap) if call.softcap is not None else 1.0,
    )
    flags = {"HAS_SCALE": call.logit_scale is not None, "HAS_CAP": call.softcap is not None}

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    group = Tuning.group if entries <= 128 else Tuning.group // 2
    groups = triton.cdiv(vocab, group)
    block = max(group, min(Tuning.scan_block, triton.next_power_of_2(groups * group)))
    parts = triton.cdiv(groups * group, block)
    take = min(entries, groups)
    padded_k = max(16, triton.next_power_of_2(entries))
    group_tops, group_sums = scratch(rows, groups), scratch(rows, many, groups)
    finite = scratch(rows, parts, dtype=torch.int32)
    candidates = 4 * padded_k
    picked, best = scratch(rows, padded_k, dtype=torch.int32), scratch(rows, candidates, dtype=torch.int64)
    count, floor = scratch(rows, dtype=torch.int32), scratch(rows, dtype=torch.int32)
    # the rest: in groups not picked [0], and in those picked [1]
    rest_tops, rest_sums = scratch(2, rows), scratch(2, rows, many)
    state, edge = scratch(5, rows), scratch(2, rows, dtype=torch.int32)

    _scan[(rows * parts,)](
        x, stride_n, stride_v, vocab, groups, parts, scales, group_tops, group_sums, finite, *transform,
        CHAIN=chain, M=many, G=group, BLOCK=block, UNIT=unit, **flags, num_warps=Tuning.scan_warps,
    )  # fmt: skip
    _pick[(rows,)](
        group_tops, group_sums, scales, picked, rest_tops[0], rest_sums[0], floor, entries, take, groups, *transform,
        UNUSED=unused, M=many, KP=padded_k, NGP=triton.next_power_of_2(groups), **flags, num_warps=Tuning.pick_warps,
    )  # fmt: skip
    if entries:
        tokens = padded_k * group
        _select[(rows,)](
            x, stride_n, stride_v, vocab, picked, floor, scales, best, count, rest_tops[1], rest_sums[1], entries, take,
            *transform,
            UNUSED=unused, CHAIN=chain, M=many, G=group, KP=padded_k,
            CANDIDATES=candidates, TILE=min(padded_k, max(1, Tuning.select_tile // group)), UNIT=unit, **flags,
            num_warps=min(32, max(4, tokens // Tuning.select_tokens)),
        )  # fmt: skip
    else:
        count.zero_()
        rest_tops[1].fill_(-torch.inf)
        rest_sums[1].zero_()
    _finish[(rows,)](
        best, count, rest_tops, rest_sums, finite, scales, out.ids, out.logprobs, out.ids.stride(0), out.tail,
        out.outcomes, state, edge, rows, entries, parts, 1.0 - call.mass if call.mass is not None else 0.0, *transform,
        ONE=call.temperatures.index(1.0), HAS_MASS=call.mass is not None, M=many, CANDIDATES=candidates,
        STAGES=candidates.bit_length() - 1,
        PARTS=triton.next_power_of_2(parts), **flags, num_warps=1 if padded_k <= 64 else 4,
    )  # fmt: skip
    valid = state[4] > 0
    if x.device.type == "cpu":
        refuse(valid, x.amax(1), first_row)
    if call.draws:
        drawn = draw(x, state, edge, call, positions_N, transform, flags)
        out.logprobs[:, entries:].masked_fill_(~valid[:, None], torch.nan)
        has_tail = valid & (state[3] > -torch.inf)
        merge_drawn(x, drawn, has_tail, edge[1].long(), state[0], state[1], out, call)
