"""The losses on any device in pure PyTorch: blocks of rows, each loaded, turned into its gradient and put away."""

import torch
from torch import Tensor

from ..targets import TargetsAt
from .call import Call
from .checks import check_values
from .torch_impl import loss_rows_

# One block of logits in the work type: small enough for the last-level cache, large enough that calls do not show.
BLOCK_BYTES = 16 << 20


def total(call: Call, hard_P: Tensor, soft_P: Tensor, divisor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hard and soft (0-d float32) from the losses of the rows. A part with factor 0 adds nothing, even inf."""
    hard, soft, (alpha, _) = hard_P.sum() / divisor, soft_P.sum() / divisor, call.numbers()
    if call.labels is None:
        alpha, hard = 0.0, torch.full_like(soft, torch.nan)
    loss = (alpha * hard if alpha else 0.0) + ((1 - alpha) * soft if alpha < 1 else torch.zeros_like(soft))
    return loss.float(), hard.float(), soft.float()


def counted_rows(call: Call, positions: int, width: int) -> tuple[Call, Tensor | None, Tensor]:
    """The call over the rows that count alone, the positions they lie at (None: all in order), and the divisor."""
    check_values(call, positions, width)
    index, call = call.positions, call.by_row()
    divisor, counted = call.divisor(), call.counted()
    if not bool(counted.all()):
        rows = counted.nonzero()[:, 0]
        call, index = call.take(rows), rows if index is None else index[rows]
    elif index is None and call.rows != positions:
        index = torch.arange(call.rows, device=call.ids.device)
    return call, index, divisor


def work_type(dtype: torch.dtype) -> torch.dtype:
    """The type of all arithmetic: float32, or float64 for float64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TorchRows:
    """The rows of one call that count, block by block; `TritonRows` is the same on a GPU."""

    def __init__(
        self,
        call: Call,
        positions: int,
        width: int,
        dtype: torch.dtype,
        *,
        upstream: Tensor | None = None,
        fixed_scale: float | None = None,
        softcap: float | None = None,
        logit_scale: float | None = None,
        want_grad: bool = True,
        what: str = "logits",
    ) -> None:
        self.call, self.index, self.divisor = counted_rows(call, positions, width)
        self.rows, self.dtype, self.want_grad, self.what = self.call.rows, work_type(dtype), want_grad, what
        self.softcap, self.logit_scale = softcap, logit_scale
        divisor = self.divisor.to(self.dtype)
        scale = 1.0 / divisor if fixed_scale is None else torch.full_like(divisor, fixed_scale)
        self.scale = scale if upstream is None else upstream.to(self.dtype) * scale
        self.step = max(1, BLOCK_BYTES // (width * self.dtype.itemsize))
        # once for all rows: their number of small operations would show in every block
        self.at = self.call.targets_at(self.call.numbers()[1], self.dtype)
        self.scratch = torch.empty(0, dtype=self.dtype, device=call.ids.device)
        self.hard, self.soft = (torch.empty(self.rows, dtype=self.dtype, device=call.ids.device) for _ in range(2))

    def loss_(self, x_CV: Tensor, first: int) -> None:
        """Losses of the rows from `first` on, whose raw logits x holds; x becomes their gradient, if one is wanted."""
        for start in range(0, len(x_CV), self.step):
            block = x_CV[start : start + self.step]
            work = block.to(self.dtype)
            rows = slice(first + start, first + start + len(block))
            self.hard[rows], self.soft[rows] = loss_rows_(
                work,
                self.call.take(rows),
                TargetsAt(*(x[rows] for x in self.at)),
                self.scale,
                self.scratch,
                softcap=self.softcap,
                logit_scale=self.logit_scale,
                want_grad=self.want_grad,
                first_row=rows.start,
                what=self.what,
            )
            if self.want_grad and work is not block:
                block.copy_(work)

    def counted(self) -> Tensor | None:
        """Which rows count, bool `[P]`; None where all do."""
        return None

    def safe_index(self) -> Tensor | None:
        """The positions of the rows, int64 `[P]`; None where they are all of the batch's, in order."""
        return self.index

    def total(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, hard and soft."""
        return total(self.call, self.hard, self.soft, self.divisor)


def kd_loss_blocks(
    logits_NV: Tensor, call: Call, upstream: Tensor | None, out_NV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hard, soft; the gradient times `upstream` goes to `out`, which may be the logits themselves."""
    positions, width = logits_NV.shape
    rows = TorchRows(call, positions, width, logits_NV.dtype, upstream=upstream, want_grad=out_NV is not None)
    uncovered = None
    if rows.index is not None and out_NV is not None:
        uncovered = torch.ones(positions, dtype=torch.bool, device=logits_NV.device)
        uncovered[rows.index] = False
    buffer = torch.empty(min(rows.step, rows.rows), width, dtype=rows.dtype, device=logits_NV.device)
    for first in range(0, rows.rows, rows.step):
        at = slice(first, min(first + rows.step, rows.rows))
        x = buffer[: at.stop - first].copy_(logits_NV[at if rows.index is None else rows.index[at]])
        rows.loss_(x, first)
        if out_NV is not None:
            out_NV[at if rows.index is None else rows.index[at]] = x.to(out_NV.dtype)
    if uncovered is not None and out_NV is not None:
        out_NV[uncovered] = 0.0
    return rows.total()
