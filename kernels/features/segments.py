"""Which rows are compared with which: segments of a padded or packed micro-batch, in blocks of query rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import KDError

CPU_BLOCK = 2**18
"""Numbers of one block of logits `[heads, queries, keys]` on a CPU: they stay in its cache."""
GPU_BLOCK = 2**24
"""The same on a GPU: enough for it to be busy."""


class Block(NamedTuple):
    """Query rows `start:stop` and the rows of their keys, `first:last`."""

    start: int
    stop: int
    first: int
    last: int
    mask: bool  # whether some query of the block must not see some key of it


@dataclass(frozen=True)
class Segments:
    """The rows of each segment: rows bounds[i] to bounds[i + 1] belong together, and to no other rows.

    bounds: ascends from 0 to N, the number of rows.
    """

    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        bounds = self.bounds
        if not bounds or bounds[0] != 0 or any(b < a for a, b in pairwise(bounds)):
            raise KDError(f"segments: got bounds {bounds!s:.60}; expected row numbers that ascend from 0.")

    def __len__(self) -> int:
        """N, the number of rows."""
        return self.bounds[-1]

    @classmethod
    def of(cls, index: Tensor | None, bounds: Tensor | Sequence[int]) -> "Segments":
        """The segments of rows at the flattened positions `index` `[N]` of a micro-batch, ascending (`targets.index`).

        bounds: flattened positions at which segments begin, and the end of the last: cu_seqlens of a packed
            micro-batch, `range(0, B * L + 1, L)` of a padded one. A tensor on a GPU is read on the host.
        index: None where every position has a row.

        KDError if positions lie outside of the bounds, or do not ascend.
        """
        of = bounds if isinstance(bounds, Tensor) else torch.as_tensor(list(bounds))
        if of.ndim != 1 or not len(of) or of.dtype.is_floating_point:
            raise KDError(
                f"segments: got bounds of shape {tuple(of.shape)} and {of.dtype}; expected whole numbers [S + 1]."
            )
        if index is None:
            return cls(tuple(of.tolist()))
        of = of.to(index.device)
        if len(index):
            inside = (index[0] >= of[0]) & (index[-1] < of[-1])
            if not bool(inside & (index[1:] > index[:-1]).all()):
                raise KDError(
                    f"segments: got positions {int(index.min())} to {int(index.max())} in bounds {int(of[0])} to "
                    f"{int(of[-1])}; expected positions that ascend within the bounds."
                )
        rows = torch.searchsorted(index.contiguous(), of.to(index.dtype)).tolist()
        return cls((*dict.fromkeys(rows),))  # segments without rows are left out

    @classmethod
    def one(cls, rows: int) -> "Segments":
        """All rows in one segment."""
        return cls((0, rows))

    def visible(self, causal: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows of each row's keys: from `first` `[N]` up to, not including, `last` `[N]`."""
        bounds = torch.tensor(self.bounds, device=device)
        lengths = bounds.diff()
        first = bounds[:-1].repeat_interleave(lengths, output_size=len(self))
        if causal:
            return first, torch.arange(1, len(self) + 1, device=device)
        return first, bounds[1:].repeat_interleave(lengths, output_size=len(self))

    def blocks(self, heads: int, causal: bool, device: torch.device, size: int | None = None) -> Iterator[Block]:
        """Blocks of query rows that cover all rows. Each has at most `size` numbers in its logits `[heads, queries,
        keys]`, but at least 16 queries; the default depends on the device.

        Long segments are cut; short ones share a block, as long as it does not become larger than the longest.
        """
        size = size or (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK)
        pairs = [(a, b) for a, b in pairwise(self.bounds) if b > a]
        at = 0
        while at < len(pairs):
            begin, end = pairs[at]
            at += 1
            rows = max(16, size // (heads * (end - begin)))
            if end - begin > rows:
                for start in range(begin, end, rows):
                    stop = min(start + rows, end)
                    yield Block(start, stop, begin, stop if causal else end, causal)
                continue
            several = False
            while at < len(pairs) and (pairs[at][1] - begin) ** 2 * heads <= size:
                end, several = pairs[at][1], True
                at += 1
            yield Block(begin, end, begin, end, causal or several)


def check_segments(segments: Segments | None, rows: int) -> Segments:
    """The segments of `rows` rows; one, if they are None. Raises KDError if they are of another number of rows."""
    if segments is None:
        return Segments.one(rows)
    if not isinstance(segments, Segments) or len(segments) != rows:
        got = f"segments of {len(segments)} rows" if isinstance(segments, Segments) else type(segments).__name__
        raise KDError(f"segments: got {got}; expected `Segments` of {rows} rows (Segments.of(index, bounds)).")
    return segments
