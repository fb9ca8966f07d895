"""Top-k, tails and draws on a GPU: scratch memory, sizes and the order of the kernels' launches.

`triton_kernels.py` has the kernels of the top-k entries and the tails, `draws_triton.py` those of the draws. Nothing
waits for the device.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..targets import SparseTargets
from ..triton_math import is_interpreted
from . import draws as dr
from .config import TopKCall
from .draws import merge_drawn
from .draws_triton import draw
from .fill import Swept, over_temperatures, refuse
from .merge import merge
from .select_kernels import _select, _sift, _sift_ties
from .sizes import UNUSED_BITS, TopKSizes, power_of_2, topk_sizes
from .triton_kernels import _finish, _pick, _scan

# Rows a call of the kernels: bounds their scratch memory to some 16 numbers per 128 logits of these rows.
ROWS_AT_ONCE = 8192
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


class TritonSweeps:
    """A sweep over the logits, as `divided.py` takes it: the kernels up to the sort of the candidates."""

    def rows(self, vocab_size: int, itemsize: int, device: torch.device) -> int:
        return ROWS_AT_ONCE

    def sweep(self, logits_NV: Tensor, call: TopKCall) -> Swept:
        on = torch.cuda.device(logits_NV.device) if logits_NV.is_cuda else contextlib.nullcontext()
        with on:
            left = _reduce(logits_NV, call)
        # the candidates in the order of their ids, then best first
        ids = left.best & 0xFFFFFFFF
        there = torch.arange(ids.shape[1], device=ids.device) < left.count[:, None]
        ids, by_id = torch.where(there, ids, 2**32 + torch.arange(ids.shape[1], device=ids.device)).sort(1)
        bits = (left.best >> 32).to(torch.int32).view(torch.float32)
        x = torch.where(there, bits, -torch.inf).gather(1, by_id)
        tops, sums = left.rest_tops.T, left.rest_sums.transpose(0, 1)
        row_top = torch.maximum(x.amax(1), tops.amax(1))
        has_nan = sums.isnan().any(2).any(1)  # a maximum drops NaN, a sum does not
        return merge(
            x, ids, tops, sums, row_top=torch.where(has_nan, torch.nan, row_top),
            finite=left.finite.sum(1, dtype=torch.int64), call=call,
        )  # fmt: skip


@dataclass(frozen=True)
class _Reduced:
    """What the kernels before `_finish` leave of some rows, as `triton_kernels.py` describes it."""

    size: TopKSizes
    scales: Tensor
    best: Tensor
    count: Tensor
    rest_tops: Tensor
    rest_sums: Tensor
    finite: Tensor


def _transform_numbers(call: TopKCall) -> tuple[float | None, float | None, float | None]:
    """Scale, softcap and its reciprocal, for the kernels."""
    return call.logit_scale, call.softcap, None if call.softcap is None else dr.reciprocal(call.softcap)


def _reduce(x: Tensor, call: TopKCall) -> _Reduced:
    """All kernels but `_finish`."""
    rows, vocab = x.shape
    entries, many, device = call.entries, len(call.temperatures), x.device
    stride_n, stride_v = x.stride()
    unit = stride_v == 1
    scales = over_temperatures(dr.LOG2E, call.temperatures, device, torch.float32)
    chain = sum((m | power << 8) << (16 * i) for i, (m, power) in enumerate(call.chains()))
    unused = UNUSED_BITS[str(x.dtype).removeprefix("torch.")]
    transform = _transform_numbers(call)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    size = topk_sizes(vocab, entries)
    group_tops, group_sums = scratch(rows, size.groups), scratch(rows, many, size.groups)
    finite = scratch(rows, size.parts, dtype=torch.int32)
    picked, runs = (scratch(rows, n, dtype=torch.int32) for n in (size.picked, size.candidates))
    best = scratch(rows, size.candidates, dtype=torch.int64)
    picked_count, runs_count, count = scratch(3, rows, dtype=torch.int32)
    counter, floor = scratch(rows, dtype=torch.int32), scratch(rows)
    # the rest: in groups not picked [0], in runs not listed [1], and in those listed [2]
    rest_tops, rest_sums = scratch(3, rows), scratch(3, rows, many)
    groups = {"G": size.group, "RUN": size.run, "BLOCK": size.block}

    _scan[(rows * size.parts,)](
        x, stride_n, stride_v, vocab, size.parts, scales, group_tops, group_sums, finite, *transform,
        CHAIN=chain, M=many, UNIT=unit, **groups, num_warps=size.scan_warps,
    )  # fmt: skip
    _pick[(rows,)](
        group_tops, group_sums, scales, picked, size.picked, picked_count, floor, counter, rest_tops[0], rest_sums[0],
        entries, size.take, size.groups, *transform,
        UNUSED=unused, M=many, GROUPS=size.groups_a_block, NGP=power_of_2(size.groups), num_warps=size.pick_warps,
    )  # fmt: skip
    if entries:
        logits, sums = (x, stride_n, stride_v, vocab), {"CHAIN": chain, "M": many, "MP": power_of_2(many)}
        chosen = {**sums, "CANDIDATES": size.candidates, "UNIT": unit, "num_warps": size.select_warps}
        left = (counter, best, count, rest_tops[2], rest_sums[2])
        _select[(rows,)](
            *logits, picked, size.picked, picked_count, floor, scales, runs, runs_count, rest_tops[1],
            rest_sums[1], *transform, **groups, TILE=size.tile, **chosen,
        )  # fmt: skip
        _sift[(rows,)](*logits, floor, scales, runs, runs_count, *left, *transform, TILE=size.sift_tile, **chosen)
        _sift_ties[(rows,)](
            *logits, picked, size.picked, picked_count, scales, *left, rest_tops[1], rest_sums[1], entries, *transform,
            UNUSED=unused, ID_BITS=max(1, (vocab - 1).bit_length()), **groups, TILE=size.tile, **chosen,
        )  # fmt: skip
    else:
        count.zero_()
        rest_tops[1:].fill_(-torch.inf)
        rest_sums[1:].zero_()
    return _Reduced(size, scales, best, count, rest_tops, rest_sums, finite)


def _launch(x: Tensor, out: SparseTargets, call: TopKCall, positions_N: Tensor, first_row: int) -> None:
    left, transform = _reduce(x, call), _transform_numbers(call)
    rows, entries, size = len(x), call.entries, left.size
    state = torch.empty((5, rows), dtype=torch.float32, device=x.device)
    edge = torch.empty((2, rows), dtype=torch.int32, device=x.device)
    _finish[(rows,)](
        left.best, left.count, left.rest_tops, left.rest_sums, left.finite, left.scales,
        out.ids, out.logprobs, out.ids.stride(0), out.tail, out.outcomes, state, edge,
        rows, entries, size.parts, 1.0 - call.mass if call.mass is not None else 0.0, *transform,
        ONE=call.temperatures.index(1.0), HAS_MASS=call.mass is not None, M=len(call.temperatures),
        CANDIDATES=size.candidates, STAGES=size.candidates.bit_length() - 1, PARTS=power_of_2(size.parts),
        num_warps=size.finish_warps,
    )  # fmt: skip
    valid = state[4] > 0
    if x.device.type == "cpu":
        refuse(valid, x.amax(1), first_row)
    if call.draws:
        ids = draw(x, state, edge, call, positions_N, transform)
        out.logprobs[:, entries:].masked_fill_(~valid[:, None], torch.nan)
        top, log_total, edge_x, tail_top_x, _ = state
        has_tail, (edge_id, kept) = valid & (tail_top_x > -torch.inf), edge.long()
        merge_drawn(x, ids, dr.State(x[:, :0], edge_x, edge_id, tail_top_x, top, log_total, kept, has_tail), out, call)
