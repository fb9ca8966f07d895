"""Decoding in plain torch operations, some thousand rows at a time: the same on a CPU and on a GPU, and sync-free."""

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import KDError

ROWS_AT_ONCE = {"cpu": 8192}  # their columns stay in the cache of a core
ROWS_ON_DEVICE = 2**17
# Columns a power of two of bytes apart would fall on the same few lines of a CPU's cache.
PITCH = 32


class Out(NamedTuple):
    """What is filled, `[P, K]` each; unused places hold 0, −inf and 0 from the start."""

    ids: Tensor  # int32
    logprobs: Tensor  # float32
    draws: Tensor | None  # int32


class Part(NamedTuple):
    """The head or the drawn entries of a shard: R rows with entries, longest first; E entries in W places.

    Streams are int16 or int32 and hold the bits of unsigned numbers. All tensors are on one device.
    """

    values: Tensor  # [E] code − the code in the place before; 0: tied (but for the first place)
    firsts: Tensor  # ranks of the entries that are not tied to the one before
    ties: Tensor  # of those that are: rank − the rank before − 1; of the type of firsts
    repeats: Tensor | None  # [E] draws less one; None: the head
    lengths: list[int]  # [W] rows that have a j-th entry
    starts: list[int]  # [W] where place j begins in the streams
    rows: Tensor | None  # [R] int64: the row of the targets; None: its own number
    counts: Tensor  # [R] int32
    offset: int | Tensor  # the place of a row's first entry: one for all, or int32 [R]
    begins: Tensor | None  # [R] int32: where in `ids` the row's list begins; None: there are no lists
    ids: Tensor  # int32: lists, order, then 0 for an unused place and −1 for a rank that is none
    logprobs: Tensor  # float32 of each code, then −inf for an unused place and NaN for a code that is none
    list_width: int  # ranks below this are places in the row's list
    shift: int  # from any other rank to its place in `ids`
    sort_ties: bool
    layout: Tensor  # [2, W] int64: starts and lengths once more, on the device


def fill_torch(part: Part, out: Out, checked: bool) -> None:
    """Write a part's entries into `out`. checked: raise KDError where the streams contradict each other."""
    device = part.values.device
    rows, width = part.lengths[0], len(part.lengths)
    size = min(rows, ROWS_AT_ONCE.get(device.type, ROWS_ON_DEVICE))
    code_table = part.logprobs
    pieces = part.firsts
    before: list[list[int]] | Tensor = []
    if part.sort_ties:
        counted, total = ties_before(part, size)
        before = counted.tolist() if device.type == "cpu" else counted
        if checked:
            refuse(part, total)
        code_table = poisoned(part, total)
        pieces = torch.cat([part.firsts, part.ties + 1])
    codes_KB = torch.empty(width, size + PITCH, dtype=part.values.dtype, device=device)
    ranks_KB = torch.empty(width, size + PITCH, dtype=part.firsts.dtype, device=device)
    number_B = torch.arange(size, dtype=torch.int32, device=device)
    last = len(pieces) - 1
    for block, start in enumerate(range(0, rows, size)):
        here = [length for size_j in part.lengths if (length := min(size_j - start, size)) > 0]
        for j, length in enumerate(here):
            at = part.starts[j] + start
            values, ranks = part.values[at : at + length], ranks_KB[j, :length]
            if j == 0:
                codes_KB[0, :length] = values
            else:
                torch.add(codes_KB[j - 1, :length], values, out=codes_KB[j, :length])
            if j == 0 or not part.sort_ties:
                ranks.copy_(part.firsts[at : at + length])
                continue
            tied = values == 0
            ties = tied.cumsum(0, dtype=torch.int32).add_(before[j][block])
            pick = torch.where(tied, ties + (len(part.firsts) - 1), (number_B[:length] + at).sub_(ties))
            if not checked:
                pick.clamp_(0, last)
            torch.addcmul(pieces.index_select(0, pick), ranks_KB[j - 1, :length], tied.to(ranks.dtype), out=ranks)
        _write(part, out, code_table, codes_KB[: len(here)], ranks_KB[: len(here)], start, here, checked)


def refuse(part: Part, ties: Tensor) -> None:
    """Raise KDError where the values have another number of ties than the stream of them."""
    if int(ties) != len(part.ties):
        raise KDError(f"raw: got {len(part.ties)} ties where the values have {int(ties)}.")


def poisoned(part: Part, ties: Tensor) -> Tensor:
    """The log-probabilities of the codes; all NaN where `refuse` would raise, without looking."""
    return torch.where(ties == len(part.ties), part.logprobs, torch.nan)


def ties_before(part: Part, size: int) -> tuple[Tensor, Tensor]:
    """How many ties come before place j of each `size` rows, int32 `[W, blocks]`, and how many there are, `[]`."""
    rows, width = part.lengths[0], len(part.lengths)
    ties = torch.zeros(width, -(-rows // size), dtype=torch.int32, device=part.values.device)
    for j in range(1, width):
        start, length = part.starts[j], part.lengths[j]
        whole = length // size
        if whole:
            column = part.values[start : start + whole * size].view(whole, size)
            ties[j, :whole] = size - torch.count_nonzero(column, dim=1)
        if rest := length - whole * size:
            ties[j, whole] = rest - torch.count_nonzero(part.values[start + whole * size : start + length])
    up_to = ties.view(-1).cumsum(0, dtype=torch.int32).view(ties.shape)
    return up_to - ties, up_to[-1, -1]


def _write(
    part: Part,
    out: Out,
    code_table: Tensor,
    codes_KB: Tensor,
    ranks_KB: Tensor,
    start: int,
    here: list[int],
    checked: bool,
) -> None:
    """Look up a block's codes and ranks, and put them where they belong; column j is meant up to here[j]."""
    width, size = len(here), here[0]
    some = slice(start, start + size)
    place_K = torch.arange(width, dtype=torch.int32, device=codes_KB.device)
    unused = place_K >= part.counts[some, None] if here[-1] < size else None
    code = _unsigned(codes_KB[:, :size])
    rank = _unsigned(ranks_KB[:, :size])
    if part.begins is not None:
        rank += torch.where(rank < part.list_width, part.begins[some, None], part.shift)
    found = [_look_up(part.ids, rank, unused, checked), _look_up(code_table, code, unused, checked)]
    if part.repeats is not None:
        draws_KB = codes_KB.new_zeros((width, size), dtype=torch.int32)
        for j, length in enumerate(here):
            at = part.starts[j] + start
            draws_KB[j, :length] = _unsigned(part.repeats[at : at + length]) + 1
        found.append(draws_KB.t())
    for target, values in zip((t for t in out if t is not None), found, strict=False):
        if isinstance(part.offset, Tensor):
            # a column more, for the unused places that reach beyond the row
            places = (part.offset[some, None] + place_K).clamp(max=target.shape[1]).long()
            rows = target[some] if part.rows is None else target[part.rows[some]]
            rows = torch.cat([rows, rows[:, :1]], 1).scatter_(1, places, values)[:, :-1]
        else:
            rows = values
        columns = target if isinstance(part.offset, Tensor) else target[:, part.offset : part.offset + width]
        if part.rows is None:
            columns[some] = rows
        else:
            columns.index_copy_(0, part.rows[some], rows)


def _unsigned(stream: Tensor) -> Tensor:
    """int32 of the unsigned numbers whose bits these are, contiguous and, if it is two-dimensional, transposed."""
    stream = stream.t().contiguous()
    return stream.to(torch.int32).bitwise_and_(0xFFFF) if stream.dtype == torch.int16 else stream


def _look_up(table: Tensor, index: Tensor, unused: Tensor | None, checked: bool) -> Tensor:
    """table[index]; its last entry but one for an unused place, and its last where there is none of this number."""
    none = len(table) - 2
    if unused is not None:
        index.masked_fill_(unused, none)
    if checked:
        least, most = index.aminmax()
        if int(least) < 0 or int(most) > none:
            raise KDError("raw: found a code or a rank outside its table.")
    else:
        index.masked_fill_((index < 0) | (index > none), none + 1)
    return table.index_select(0, index.view(-1)).view(index.shape)
