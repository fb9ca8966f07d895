"""Top-k, tails and draws on a GPU: scratch memory, sizes and the order of the kernels' launches.

`triton_kernels.py` has the kernels of the top-k entries and the tails, `draws_triton.py` those of the draws. Nothing
waits for the device.
"""

import contextlib

import torch
import triton
from torch import Tensor

from ..targets import SparseTargets
from ..triton_math import is_interpreted
from . import draws as dr
from .config import TopKCall
from .draws import merge_drawn
from .draws_triton import draw
from .fill import over_temperatures, refuse
from .triton_kernels import _finish, _pick, _scan, _select

# Rows a call of the kernels: bounds their scratch memory to some 16 numbers per 128 logits of these rows.
ROWS_AT_ONCE = 8192
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


def fill_triton(logits_NV: Tensor, out: SparseTargets, call: TopKCall, positions_N: Tensor, first_row: int) -> None:
    """Fill `out` from logits `[N, V]` (bfloat16, float16 or float32, any stride); at most 1024 top-k entries.

    `first_row`: the number of the first row in an error message, which only CPU tensors can give.
    """
    on = torch.cuda.device(logits_NV.device) if logits_NV.is_cuda else contextlib.nullcontext()
    with on:
        for start in range(0, len(logits_NV), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            _launch(logits_NV[some], out[some], call, positions_N[some], first_row + start)


def _launch(x: Tensor, out: SparseTargets, call: TopKCall, positions_N: Tensor, first_row: int) -> None:
    rows, vocab = x.shape
    entries, many, device = call.entries, len(call.temperatures), x.device
    stride_n, stride_v = x.stride()
    unit = stride_v == 1
    scales = over_temperatures(dr.LOG2E, call.temperatures, device, torch.float32)
    chain = sum((m | power << 8) << (16 * i) for i, (m, power) in enumerate(call.chains()))
    unused = UNUSED_BITS[x.dtype]
    transform = (call.logit_scale, call.softcap, None if call.softcap is None else dr.reciprocal(call.softcap))

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
        CHAIN=chain, M=many, G=group, BLOCK=block, UNIT=unit, num_warps=Tuning.scan_warps,
    )  # fmt: skip
    _pick[(rows,)](
        group_tops, group_sums, scales, picked, rest_tops[0], rest_sums[0], floor, entries, take, groups, *transform,
        UNUSED=unused, M=many, KP=padded_k, NGP=triton.next_power_of_2(groups), num_warps=Tuning.pick_warps,
    )  # fmt: skip
    if entries:
        tokens = padded_k * group
        _select[(rows,)](
            x, stride_n, stride_v, vocab, picked, floor, scales, best, count, rest_tops[1], rest_sums[1], entries, take,
            *transform,
            UNUSED=unused, CHAIN=chain, M=many, G=group, KP=padded_k,
            CANDIDATES=candidates, TILE=min(padded_k, max(1, Tuning.select_tile // group)), UNIT=unit,
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
        PARTS=triton.next_power_of_2(parts), num_warps=1 if padded_k <= 64 else 4,
    )  # fmt: skip
    valid = state[4] > 0
    if x.device.type == "cpu":
        refuse(valid, x.amax(1), first_row)
    if call.draws:
        ids = draw(x, state, edge, call, positions_N, transform)
        out.logprobs[:, entries:].masked_fill_(~valid[:, None], torch.nan)
        top, log_total, edge_x, tail_top_x, _ = state
        has_tail, (edge_id, size) = valid & (tail_top_x > -torch.inf), edge.long()
        merge_drawn(x, ids, dr.State(x[:, :0], edge_x, edge_id, tail_top_x, top, log_total, size, has_tail), out, call)
