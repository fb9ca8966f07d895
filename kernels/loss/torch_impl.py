"""The loss in pure PyTorch, on any device: blocks of rows, each loaded, turned into its gradient and stored.

A divergence is a sum `Σ_S f(q_k, p_k) + f(q_tail, p_tail)` over the support S (the entries that the treatment keeps)
and the tail. With slope_k = p_k df/dp_k and s the sum of all slopes, its gradient in u = z/T is `slope_k - p_k s` on S;
off S it is the student's share of the tail, `p_j / p_tail`, times `slope_tail - p_tail s`. So the K + 1 outcomes
determine everything, and one sweep over the vocabulary writes it.
"""

import torch
from torch import Tensor

from ..divergences import Divergence, find_divergence
from ..targets import TargetsAt
from .call import Call, RowOptions
from .checks import check_student, check_values
from .ranks import RowStatistics, merge_ranks

# One block of logits in the work type: small enough for the last-level cache, large enough to hide the cost of calls.
BLOCK_BYTES = 16 << 20
_INF = float("inf")


def counted_rows(call: Call, positions: int, width: int) -> tuple[Call, Tensor | None, Tensor]:
    """The call over the rows that count alone, their positions (None: all, in order), and the divisor."""
    check_values(call, positions, width)
    index, (call, counted) = call.targets.index, call.by_row(positions)
    divisor = call.divisor(counted)
    if not bool(counted.all()):
        rows = counted.nonzero()[:, 0]
        call, index = call.take(rows), rows if index is None else index[rows]
    elif index is None and call.rows != positions:
        index = torch.arange(call.rows, device=call.targets.device)
    return call, index, divisor


def outcome_terms(
    divergence: Divergence, parameter: float, at: TargetsAt, log_p_CK: Tensor, log_p_tail_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence `[C]`, its gradient in u on the support `[C, K]`, and the tail's `slope - p s` `[C]`.

    log_p `[C, K]` and log_p_tail `[C]` are the student's. Entries outside the support get 0, and so does a whole row
    without support. A row that the treatment cannot take has NaN.
    """
    in_support = at.log_q > -_INF
    has_support = in_support.any(1)
    log_q = torch.cat([at.log_q, at.log_q_tail[:, None]], 1)
    log_p = torch.cat([log_p_CK.masked_fill(~in_support, -_INF), log_p_tail_C[:, None]], 1)
    weight = torch.cat([at.weights, at.log_q_tail.exp()[:, None]], 1)
    term, slope = divergence.torch_terms(weight, log_q, log_p, parameter)
    gradient = slope - log_p.exp() * slope.sum(1)[:, None]
    value = torch.where(has_support, term.sum(1), 0.0)
    gradient = torch.where(has_support[:, None], gradient, 0.0)
    return value.masked_fill(at.log_q_tail.isnan(), torch.nan), gradient[:, :-1] * in_support, gradient[:, -1]


class TorchRows:
    """The rows of one call that count, block by block; `TritonRows` is the same on a GPU."""

    def __init__(self, call: Call, positions: int, width: int, dtype: torch.dtype, options: RowOptions) -> None:
        self.part = call.vocab_part(width, options)
        total, widest = (width, width) if self.part is None else (self.part.total, self.part.widest)
        self.call, self.index, self.divisor = counted_rows(call, positions, total)
        self.rows, self.options = self.call.rows, options
        # of all arithmetic: float64 for float64 logits, else float32
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        divisor = self.divisor.to(self.dtype)
        scale = 1.0 / divisor if options.fixed_scale is None else torch.full_like(divisor, options.fixed_scale)
        self.scale = scale if options.upstream is None else options.upstream.to(self.dtype) * scale
        self.step = max(1, BLOCK_BYTES // (widest * self.dtype.itemsize))
        self.alpha, self.t = self.call.numbers()
        # once for all rows: their number of small operations would show in every block
        self.at = self.call.targets.at(self.t, self.call.treatment(self.t), dtype=self.dtype)
        self.scratch = torch.empty(0, dtype=self.dtype, device=call.targets.device)
        self.hard, self.soft = (torch.empty(self.rows, dtype=self.dtype, device=call.targets.device) for _ in range(2))

    def loss_(self, x_CV: Tensor, first: int) -> None:
        """Losses of the rows from `first` on, whose raw logits x holds; x becomes their gradient, if one is wanted."""
        for start in range(0, len(x_CV), self.step):
            block = x_CV[start : start + self.step]
            work = block.to(self.dtype)
            rows = slice(first + start, first + start + len(block))
            self._block_(work, rows)
            if self.options.want_grad and work is not block:
                block.copy_(work)

    def loss_at_positions(self, logits_NV: Tensor, out_NV: Tensor | None) -> None:
        """Losses of all rows, at their positions in the logits; their gradient goes to `out`."""
        buffer = torch.empty(min(self.step, self.rows), logits_NV.shape[1], dtype=self.dtype, device=logits_NV.device)
        for first in range(0, self.rows, self.step):
            rows = slice(first, min(first + self.step, self.rows))
            at = rows if self.index is None else self.index[rows]
            x = buffer[: rows.stop - first].copy_(logits_NV[at])
            self.loss_(x, first)
            if out_NV is not None:
                out_NV[at] = x.to(out_NV.dtype)
        if out_NV is not None and self.index is not None:
            uncovered = torch.ones(len(out_NV), dtype=torch.bool, device=out_NV.device)
            uncovered[self.index] = False
            out_NV[uncovered] = 0.0

    def counted(self) -> Tensor | None:
        """Which rows count, bool `[P]`; None where all do."""
        return None

    def safe_index(self) -> Tensor | None:
        """The positions of the rows, int64 `[P]`; None where they are all of the batch's, in order."""
        return self.index

    def total(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, hard and soft, 0-d float32. A part with factor 0 adds nothing, even where it is infinite."""
        hard, soft, alpha = self.hard.sum() / self.divisor, self.soft.sum() / self.divisor, self.alpha
        if self.call.labels is None:
            alpha, hard = 0.0, torch.full_like(soft, torch.nan)
        loss = (alpha * hard if alpha else 0.0) + ((1 - alpha) * soft if alpha < 1 else torch.zeros_like(soft))
        return loss.float(), hard.float(), soft.float()

    def _block_(self, x_CV: Tensor, rows: slice) -> None:
        """Losses of a block of rows; x, a contiguous buffer of raw logits in the work type, becomes the gradient."""
        call, at, t = self.call.take(rows), TargetsAt(*(x[rows] for x in self.at)), self.t
        row_weight = torch.ones_like(x_CV[:, 0]) if call.weights is None else call.weights.to(x_CV.dtype)
        cap_slope = self._cap_(x_CV)
        used = at.log_q > -_INF
        # an unused entry may hold any id: it stands for column 0, to which it adds nothing
        ids = call.targets.ids.long().masked_fill(~used, 0)
        columns, here = self._columns(ids, used)
        entries_CK = x_CV.gather(1, columns).masked_fill(~here, -_INF)
        label = z_label = None
        if call.labels is not None:
            label = call.labels.long()[:, None]
            label_column, label_here = self._columns(label, torch.ones_like(label, dtype=torch.bool))
            z_label = x_CV.gather(1, label_column).masked_fill(~label_here, -_INF)[:, 0]
        # Without S, the reduction gives the mass off S itself: 1 - Σ_S p has no digits where the student is certain.
        x_CV.scatter_add_(1, columns, torch.zeros_like(entries_CK).masked_fill_(here, -_INF))
        tempered, m_off, off_1, off_t = self._sums_(x_CV)
        row, factors = RowStatistics(m_off, off_1, off_t, z_label, entries_CK), None
        if self.part is not None:
            row, factors = merge_ranks(row, t, self.part.group)

        m = torch.cat([row.m_off[:, None], row.entries], 1).amax(1)
        shift = torch.where(row.m_off == -_INF, -_INF, row.m_off - m)
        above_CK = row.entries - m[:, None]
        e_CK = above_CK.exp()
        s_1 = row.off_1 * shift.exp() + e_CK.sum(1)
        s_t = row.off_t * (shift / t).exp() + (above_CK / t).exp().sum(1)
        log_s_t = s_t.log()
        log_p_tail = row.off_t.log() + shift / t - log_s_t
        log_p = above_CK / t - log_s_t[:, None]
        check_student(~(m + s_1.log()).isfinite(), self.options.what, rows.start)

        config = call.config
        divergence, on_support, off_support = outcome_terms(
            find_divergence(config.divergence), config.parameter, at, log_p, log_p_tail
        )
        self.soft[rows] = t * t * divergence * row_weight
        if row.z_label is None:
            self.hard[rows] = torch.nan
        else:
            self.hard[rows] = (s_1.log() - (row.z_label - m)) * row_weight
        if not self.options.want_grad:
            return

        row_scale = row_weight * self.scale
        hard_scale = (0.0 if label is None else self.alpha) * row_scale
        # a factor of exactly 0 means that the part is not wanted: 0 * inf must not make it NaN
        soft_scale = (1.0 - (0.0 if label is None else self.alpha)) * t * row_scale
        a = hard_scale * shift.exp() / s_1
        b = torch.where((soft_scale == 0) | (row.off_t == 0), 0.0, soft_scale * off_support / row.off_t)
        if factors is not None:  # x is relative to the reference of these columns alone
            a, b = a * factors[0], b * factors[1]
        self._off_support_(x_CV, tempered, a, b)
        hard_CK = hard_scale[:, None] * (e_CK / s_1[:, None])
        if label is not None:
            on_label = (ids == label) & used
            hard_CK = hard_CK - hard_scale[:, None] * on_label
            elsewhere = ~label_here | on_label.any(1, keepdim=True)
            x_CV.scatter_add_(1, label_column, torch.where(elsewhere, 0.0, -hard_scale[:, None]))
        soft_CK = torch.where(soft_scale[:, None] == 0, 0.0, soft_scale[:, None] * on_support)
        # x is 0 on the support here
        x_CV.scatter_add_(1, columns, torch.where(here, hard_CK + soft_CK, 0.0))
        if cap_slope is not None:
            x_CV.mul_(cap_slope)
        if self.options.logit_scale is not None:
            x_CV.mul_(self.options.logit_scale)

    def _columns(self, ids: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """Ids as columns of the logits here, and which of those used have one; 0 for the others."""
        if self.part is None:
            return ids, used
        columns = ids - self.part.start
        here = used & (columns >= 0) & (columns < self.part.size)
        return columns.masked_fill(~here, 0), here

    def _cap_(self, x_CV: Tensor) -> Tensor | None:
        """Raw logits to logits, in place: the scale multiplies, then the cap. Returns the cap's derivative `[C, V]`."""
        if self.options.logit_scale is not None:
            x_CV.mul_(self.options.logit_scale)
        if self.options.softcap is None:
            return None
        masked = x_CV == -_INF
        capped = torch.tanh(x_CV / self.options.softcap)
        torch.mul(capped, self.options.softcap, out=x_CV).masked_fill_(masked, -_INF)
        return capped.square_().neg_().add_(1.0)

    def _sums_(self, x_CV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reduce a block off its support, whose logits are −inf in x; x becomes e^(z - reference) if T is not 1 or 2,
        and e^((z - reference) / T) if it is. Returns e^((z - reference) / T) `[C, V]`, where the gradient needs it, and
        m_off, off_1 and off_t of `RowStatistics`."""
        t, m_off = self.t, x_CV.amax(1)
        reference = torch.where(m_off == -_INF, 0.0, m_off)
        if t == 2.0:  # (z - m) / 2 in one pass, exact, since the halves are
            torch.add(-0.5 * reference[:, None], x_CV, alpha=0.5, out=x_CV)
        else:
            x_CV.sub_(reference[:, None])
        if t == 1.0:
            tempered = x_CV.exp_()
            off_t = off_1 = tempered.sum(1)
        elif t == 2.0:  # e^z is the square of e^(z/2)
            tempered = x_CV.exp_()
            off_t = tempered.sum(1)
            off_1 = torch.linalg.vector_norm(tempered, dim=1).square_()
        else:
            tempered = torch.div(x_CV, t, out=self._like(x_CV)).exp_()
            off_t = tempered.sum(1)
            off_1 = x_CV.exp_().sum(1)
        return tempered, m_off, off_1, off_t

    def _off_support_(self, x_CV: Tensor, tempered: Tensor, a: Tensor, b: Tensor) -> None:
        """x, as `_sums_` leaves it, becomes a e^z + b e^(z/T)."""
        if self.t == 1.0:
            x_CV.mul_((a + b)[:, None])
        elif self.t == 2.0:
            # two binary operations: addcmul does not vectorise over what is broadcast
            x_CV.mul_(torch.mul(tempered, a[:, None], out=self._like(x_CV)).add_(b[:, None]))
        else:
            x_CV.mul_(a[:, None]).addcmul_(tempered, b[:, None])

    def _like(self, x_CV: Tensor) -> Tensor:
        """Memory of x's shape that is kept: a fresh buffer for each block would cost a page fault for every 4 kB."""
        if self.scratch.numel() < x_CV.numel():
            self.scratch.resize_(x_CV.numel())
        return self.scratch[: x_CV.numel()].view(x_CV.shape)
