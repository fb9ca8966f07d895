# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Decoding in Triton: two reads of the values, one of the rest, one write of the result.

1. `_count_ties`: how many entries of each block of rows are tied at each place, so that every program knows where its
   ties and firsts begin.
2. `_fill`, a program a block of rows, goes through their places with each row's running code and rank.
"""

import contextlib

import torch
import triton
import triton.language as tl

from .decode_torch import Out, Part, poisoned, refuse
from .errors import KDError

BAD = tl.constexpr(-(2**30))  # a rank that stays below every table's first


class Tuning:
    """Sizes that only speed depends on."""

    rows = 128  # a program
    warps = 4


@triton.jit
def _unsigned(x, NARROW: tl.constexpr):
    """int32 of the unsigned number whose bits these are."""
    x = x.to(tl.int32)
    if NARROW:
        x = x & 0xFFFF
    return x


@triton.jit
def _count_ties(
    values_ptr,  # [E] int16 or int32
    layout_ptr,  # [2, W] int64: where each place begins, and how many rows have it
    counts_ptr,  # [R] int32, falling
    found_ptr,  # out [W, blocks] int32, zeros
    width,
    blocks,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    for j in range(1, tl.load(counts_ptr + block * ROWS)):
        there = row < tl.load(layout_ptr + width + j)
        values = tl.load(values_ptr + tl.load(layout_ptr + j) + row, mask=there, other=1)
        tl.store(found_ptr + j * blocks + block, tl.sum((values == 0).to(tl.int32), axis=0))


@triton.jit
def _fill(
    values_ptr,  # [E] int16 or int32
    firsts_ptr,
    ties_ptr,
    repeats_ptr,  # [E], or None
    layout_ptr,  # [2, W] int64
    counts_ptr,  # [R] int32, falling
    before_ptr,  # [W, blocks] int32: ties before each place of each block
    rows_ptr,  # [R] int64: rows of the result; None: their own numbers
    offset_ptr,  # [R] int32: the place of the first entry; None: `offset`
    begins_ptr,  # [R] int32: where each row's list begins; None: there are no lists
    ids_ptr,  # table, then 0, −1
    logprobs_ptr,  # table, then −inf, NaN
    out_ids_ptr,  # [P, K]
    out_logprobs_ptr,
    out_draws_ptr,
    rows,  # R
    width,  # W
    blocks,
    out_width,  # K
    firsts,  # how many there are
    ties,
    offset,
    list_width,
    shift,  # from a rank that is not in a list to its place in the table
    last_id,  # the last usable places of the tables
    last_code,
    SORTED: tl.constexpr,
    NARROW_VALUES: tl.constexpr,
    NARROW_RANKS: tl.constexpr,
    NARROW_REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    if rows_ptr is None:
        target = row.to(tl.int64) * out_width
    else:
        target = tl.load(rows_ptr + row, mask=exists, other=0) * out_width
    if offset_ptr is None:
        target += offset
    else:
        target += tl.load(offset_ptr + row, mask=exists, other=0)
    if begins_ptr is not None:
        begins = tl.load(begins_ptr + row, mask=exists, other=0)
    code = tl.zeros([ROWS], tl.int32)
    rank = tl.zeros([ROWS], tl.int32)
    for j in range(tl.load(counts_ptr + block * ROWS)):
        start = tl.load(layout_ptr + j)
        there = row < tl.load(layout_ptr + width + j)
        values = _unsigned(tl.load(values_ptr + start + row, mask=there, other=1), NARROW_VALUES)
        code += values
        if SORTED:
            tied = there & (values == 0) & (j > 0)
            so_far = tl.load(before_ptr + j * blocks + block) + tl.cumsum(tied.to(tl.int32), axis=0)
            at_first = start + row - so_far
            at_tie = so_far - 1
            first = tl.load(firsts_ptr + at_first, mask=there & (tied == 0) & (at_first < firsts), other=0)
            tie = tl.load(ties_ptr + at_tie, mask=tied & (at_tie < ties), other=0)
            beyond = tl.where(tied, at_tie >= ties, at_first >= firsts)
            next_rank = rank + 1 + _unsigned(tie, NARROW_RANKS)
            rank = tl.where(tied, next_rank, _unsigned(first, NARROW_RANKS))
            rank = tl.where(beyond, BAD, rank)
        else:
            rank = _unsigned(tl.load(firsts_ptr + start + row, mask=there, other=0), NARROW_RANKS)
        if begins_ptr is None:
            index = rank
        else:
            index = rank + tl.where(rank < list_width, begins, shift)
        index = tl.where((index < 0) | (index > last_id), last_id + 1, index)
        tl.store(out_ids_ptr + target + j, tl.load(ids_ptr + index), mask=there)
        index = tl.where((code < 0) | (code > last_code), last_code + 1, code)
        tl.store(out_logprobs_ptr + target + j, tl.load(logprobs_ptr + index), mask=there)
        if repeats_ptr is not None:
            repeats = _unsigned(tl.load(repeats_ptr + start + row, mask=there, other=0), NARROW_REPEATS)
            tl.store(out_draws_ptr + target + j, repeats + 1, mask=there)


# The Triton interpreter runs the kernels on CPU tensors; it is chosen when triton is imported.
INTERPRETED = not isinstance(_fill, triton.JITFunction)


def fill_triton(part: Part, out: Out, checked: bool) -> None:
    """Write a part's entries into `out`. checked: raise KDError where the streams contradict each other."""
    with torch.cuda.device(part.values.device) if part.values.is_cuda else contextlib.nullcontext():
        _launch(part, out, checked)
    if checked and (bool((out.ids < 0).any()) or bool(out.logprobs.isnan().any())):
        raise KDError("raw: found a code or a rank outside its table.")


def _launch(part: Part, out: Out, checked: bool) -> None:
    rows, width = part.lengths[0], len(part.lengths)
    blocks = triton.cdiv(rows, Tuning.rows)
    ties = torch.zeros(width, blocks, dtype=torch.int32, device=part.values.device)
    before, code_table = ties, part.logprobs
    if part.sort_ties:
        _count_ties[(blocks,)](
            part.values, part.layout, part.counts, ties, width, blocks, ROWS=Tuning.rows, num_warps=Tuning.warps
        )
        up_to = ties.view(-1).cumsum(0, dtype=torch.int32)
        before = up_to - ties.view(-1)
        code_table = poisoned(part, up_to[-1])
        if checked:
            refuse(part, up_to[-1])
    several = isinstance(part.offset, torch.Tensor)
    _fill[(blocks,)](
        part.values,
        part.firsts,
        part.ties,
        part.repeats,
        part.layout,
        part.counts,
        before,
        part.rows,
        part.offset if several else None,
        part.begins,
        part.ids,
        code_table,
        out.ids,
        out.logprobs,
        out.draws,
        rows,
        width,
        blocks,
        out.ids.shape[1],
        len(part.firsts),
        len(part.ties),
        0 if several else part.offset,
        part.list_width,
        part.shift,
        len(part.ids) - 2,
        len(part.logprobs) - 2,
        SORTED=part.sort_ties,
        NARROW_VALUES=part.values.dtype == torch.int16,
        NARROW_RANKS=part.firsts.dtype == torch.int16,
        NARROW_REPEATS=part.repeats is not None and part.repeats.dtype == torch.int16,
        ROWS=Tuning.rows,
        num_warps=Tuning.warps,
    )
