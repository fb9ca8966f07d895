"""A cached shard's streams to SparseTargets, on the device that the streams are on.

The streams are those of `Cache.raw_shard`, whose meaning is in the cache's FORMAT.md; their numbers come out bit for
bit as `Cache.read_shard` gives them. A part (head, drawn entries) is stored place by place, the rows longest first:
the first entries of all rows, then the second entries of those that have one, and so on.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .decode_torch import Out, Part, fill_torch
from .errors import KDError
from .loss.checks import values_are_checked
from .targets import SparseTargets

IMPLEMENTATIONS = ("auto", "torch", "triton")
NO_TAIL = -(2**31)  # the code of a tail of −inf
MOST_ENTRIES = 2**31 - 1  # of a part: they are numbered in int32


class _Counts(NamedTuple):
    """How many entries of a part each row has: on the host, where sizes come from, and on the device."""

    host: Tensor  # [n] int64
    device: Tensor  # [n] int32


class _Rows(NamedTuple):
    """Which positions have a row of the targets."""

    total: int
    kept: Tensor | None  # [total] int64, ascending, on the device; None: all positions
    number: Tensor | None  # [n] int64, on the device: the row of each position kept; None: its own number


@torch.no_grad()
def decode_targets(raw: Mapping[str, Tensor], *, compact: bool = False, impl: str = "auto") -> SparseTargets:
    """The targets of a shard of n positions, on the device of `raw["tail"]`.

    raw: the arrays of `Cache.raw_shard` as tensors, in the types that they have there. The streams and tables
        (`tail`, `outcomes`, `<part>/values`, `firsts`, `ties`, `repeats`, `grid`, `table`, `list_begins`) are needed
        on that device; `<part>/counts`, `temperatures` and the single numbers are read on the host, so leave them
        there. Other names are not looked at.
    compact: keep only the positions that have entries, with `index` their numbers in the shard.
    impl: "triton" (CUDA, or a CPU under the Triton interpreter), "torch", or "auto": triton for CUDA tensors.

    Returns ids int32 and logprobs float32 `[n, K]`, tail float32 `[n, M]`, outcomes int32 `[n]`, and draws int32
    `[n, K]` where the cache has draws; K is the width of the cache's rows.

    With the host's arrays on the host, nothing waits for a GPU. Peak memory beyond the streams and the result: about
    150 bytes a row for tails, counts and orders; and with "torch" a copy of firsts and ties, and about 30 bytes a place
    of 8192 rows (CPU) or 2^17 rows (GPU) at a time.

    Streams that contradict each other (a cache's reader refuses a shard whose bytes were changed) raise KDError where
    their sizes say so, and on the CPU also where an entry lies outside its table (that a rank lies in the list of its
    own row's token is `read_shard`'s to check). On a GPU an entry outside its table has the id −1
    or the log-probability NaN, all entries have NaN where the ties cannot be told apart, and a loss is NaN then;
    nothing is read or written out of bounds.
    """
    if impl not in IMPLEMENTATIONS:
        raise KDError(f"impl: got {impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}.")
    tail_MN = _get(raw, "tail")
    device, n = tail_MN.device, tail_MN.shape[1]
    width, vocab_size = int(_get(raw, "width")), int(_get(raw, "vocab_size"))
    parts = {part: _counts(raw, part, n, device) for part in ("head", "draws") if f"{part}/counts" in raw}
    if not parts:
        raise KDError("raw: got neither 'head/counts' nor 'draws/counts'; expected the arrays of Cache.raw_shard.")
    total = torch.stack([c.host for c in parts.values()]).sum(0)
    if int(total.max()) > width:
        raise KDError(f"raw: found rows of up to {int(total.max())} entries; the cache's rows have {width} places.")
    rows = _rows(total, parts, device) if compact else _Rows(n, None, None)
    out = Out(
        torch.zeros(rows.total, width, dtype=torch.int32, device=device),
        torch.full((rows.total, width), -torch.inf, device=device),
        torch.zeros(rows.total, width, dtype=torch.int32, device=device) if "draws" in parts else None,
    )
    fill = _implementation(impl, device)
    for name, counts in parts.items():
        if int(counts.host.max()):
            ahead = parts["head"] if name == "draws" and "head" in parts else None
            part = _part(raw, name, counts, ahead, rows, vocab_size)
            fill(part, out, values_are_checked(device))
    outcomes = vocab_size - parts["head"].device if "head" in parts else torch.full_like(tail_MN[0], vocab_size)
    outcomes = raw["outcomes"].to(torch.int32) if "outcomes" in raw else outcomes.to(torch.int32)
    tail_NM = _tail(tail_MN, float(_get(raw, "tail_step")))
    return SparseTargets(
        ids=out.ids,
        logprobs=out.logprobs,
        tail=tail_NM if rows.kept is None else tail_NM[rows.kept],
        outcomes=outcomes if rows.kept is None else outcomes[rows.kept],
        vocab_size=vocab_size,
        draws=out.draws,
        temperatures=tuple(_get(raw, "temperatures").tolist()),
        draw_temperature=float(_get(raw, "draw_temperature")),
        index=rows.kept,
    )


def _get(raw: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in raw:
        raise KDError(f"raw: got no {name!r}; expected the arrays of Cache.raw_shard.")
    return raw[name]


def _implementation(impl: str, device: torch.device) -> Callable[[Part, Out, bool], None]:
    """What fills the rows. Raises KDError where Triton is asked for and cannot run."""
    if impl == "torch" or (impl == "auto" and device.type != "cuda"):
        return fill_torch
    from . import decode_triton

    if device.type != "cuda" and not decode_triton.INTERPRETED:
        raise KDError(
            f"impl: found 'triton' for tensors on {device}; CUDA tensors, or the Triton interpreter "
            "(TRITON_INTERPRET=1 before triton is imported), are needed. Use impl='auto'."
        )
    return decode_triton.fill_triton


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _counts(raw: Mapping[str, Tensor], part: str, n: int, device: torch.device) -> _Counts:
    counts = raw[f"{part}/counts"]
    if tuple(counts.shape) != (n,):
        raise KDError(f"raw['{part}/counts']: got shape {tuple(counts.shape)}; expected ({n},), as of tail.")
    return _Counts(counts.to("cpu").to(torch.int64), _upload(counts, device).to(torch.int32))


def _rows(total: Tensor, parts: Mapping[str, _Counts], device: torch.device) -> _Rows:
    """The positions with entries, found on the device (the host knows only how many there are)."""
    counted = torch.zeros(len(total), dtype=torch.bool, device=device)
    for counts in parts.values():
        counted |= counts.device > 0
    count = int((total > 0).sum())
    kept = torch.sort((~counted).to(torch.int32), stable=True).indices[:count]
    return _Rows(count, kept, counted.cumsum(0) - 1)


def _part(
    raw: Mapping[str, Tensor], name: str, counts: _Counts, ahead: _Counts | None, rows: _Rows, vocab_size: int
) -> Part:
    """A part's streams, checked against its counts, with its tables and the order of its rows."""
    per_count = torch.bincount(counts.host)
    lengths = per_count.flip(0).cumsum(0).flip(0)[1:]
    entries, with_entries = int(lengths.sum()), int(lengths[0])
    if entries > MOST_ENTRIES:
        raise KDError(f"raw: {name}: got {entries} entries; up to {MOST_ENTRIES} can be decoded. Read it decoded.")
    streams = {s: _signed(_get(raw, f"{name}/{s}")) for s in ("values", "firsts", "ties")}
    repeats = _signed(_get(raw, f"{name}/repeats")) if name == "draws" else None
    sort_ties, list_width = bool(_get(raw, "sort_ties")), int(_get(raw, f"{name}/list_width"))
    table, grid, begins = (_get(raw, f"{name}/{s}") for s in ("table", "grid", "list_begins"))
    grid = grid.to(torch.float32)
    found = [len(streams["values"]), len(streams["firsts"]) + len(streams["ties"])]
    found += [len(repeats)] if repeats is not None else []
    if found != [entries] * len(found) or (len(streams["ties"]) and not sort_ties):
        raise KDError(f"raw: {name}: got {found} numbers in its streams for {entries} entries.")
    if streams["firsts"].dtype != streams["ties"].dtype:
        # an empty stream has the type of an empty stream
        streams = {s: t if s == "values" else _widened(t) for s, t in streams.items()}
    if len(table) < list_width + vocab_size or (list_width and len(begins) != len(counts.host)):
        raise KDError(f"raw: {name}: found tables that do not fit {vocab_size} ids and {len(counts.host)} positions.")
    order = None
    if bool((counts.host[1:] > counts.host[:-1]).any()):
        most = int(counts.host.max())
        order = torch.sort(most - counts.device, stable=True).indices[:with_entries]
    at = slice(with_entries) if order is None else order
    offset: int | Tensor = 0
    if ahead is not None:
        offsets = ahead.host[counts.host > 0]
        offset = int(offsets[0]) if bool((offsets == offsets[0]).all()) else ahead.device[at]
    starts = lengths.cumsum(0) - lengths
    return Part(
        **streams,
        repeats=repeats,
        lengths=lengths.tolist(),
        starts=starts.tolist(),
        rows=order if rows.number is None else rows.number[at],
        counts=counts.device[at],
        offset=offset,
        begins=begins[at] if list_width else None,
        ids=torch.cat([table, table.new_zeros(1), table.new_full((1,), -1)]),
        logprobs=torch.cat([grid, grid.new_full((1,), -torch.inf), grid.new_full((1,), torch.nan)]),
        list_width=list_width,
        shift=len(table) - vocab_size - list_width,
        sort_ties=sort_ties,
        layout=_upload(torch.stack([starts, lengths]), table.device),
    )


def _signed(stream: Tensor) -> Tensor:
    """The same bits in a type that torch calculates with: sums that wrap around are right in either."""
    return stream.view(torch.int16 if stream.element_size() == 2 else torch.int32)


def _widened(stream: Tensor) -> Tensor:
    return stream if stream.dtype == torch.int32 else stream.to(torch.int32) & 0xFFFF


def _tail(codes_MN: Tensor, step: float) -> Tensor:
    """Tails `[n, M]` of their codes: the first temperature's, then differences between neighbours."""
    absent = codes_MN[0] == NO_TAIL
    values = codes_MN.masked_fill(absent, 0).cumsum(0, dtype=torch.int64).t().to(torch.float64) * step
    return values.masked_fill_(absent[:, None], -torch.inf).to(torch.float32).contiguous()
