"""Rows of logits whose columns lie on several ranks: what each rank reduces its own to, and how that is merged.

The largest logit and the sums over a rank's own columns off the support S, and the logits that are looked up by name:
those of S and of the label. With them merged, every rank goes on as if it had reduced the whole row, so that all ranks
compute the same bits, and each writes the gradient of its own columns. One all-gather for all divergences: the logits
of S are K numbers more than the sums that forward KL could do with, and spare the other divergences a second one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..vocab_parallel import all_gather

SUMS = 4  # columns of packed statistics before those of S: m_off, off_1, off_t, z_label
_INF = float("inf")


class RowStatistics(NamedTuple):
    """What is known of C rows, each `[C]` unless noted. reference: m_off, or 0 where that is −inf.

    A NaN or +inf among a rank's logits makes its sums NaN, and the merged ones of all ranks.
    """

    m_off: Tensor  # the largest logit off S; −inf where there is none
    off_1: Tensor  # Σ e^(z - reference) off S
    off_t: Tensor  # Σ e^((z - reference) / T) off S
    z_label: Tensor | None  # the label's logit; −inf on the ranks that do not hold it
    entries: Tensor  # [C, K]: the logits of S; −inf for those that are elsewhere, or unused

    def packed(self) -> Tensor:
        """As one tensor `[C, SUMS + K]`, the same on all ranks."""
        z_label = torch.full_like(self.m_off, -_INF) if self.z_label is None else self.z_label
        return torch.cat([torch.stack([self.m_off, self.off_1, self.off_t, z_label], 1), self.entries], 1)


def merge_ranks(own: RowStatistics, t: float | Tensor, group: str) -> tuple[RowStatistics, tuple[Tensor, Tensor]]:
    """The statistics of whole rows, of each rank's own columns; and this rank's factors e^(own reference - reference)
    and e^((own reference - reference) / T), 0 where it holds nothing off S. All ranks of the group call it."""
    by_rank = all_gather(own.packed(), group)
    m_RC, off_1_RC, off_t_RC = by_rank[:, :, 0], by_rank[:, :, 1], by_rank[:, :, 2]
    m_off = m_RC.amax(0)

    def above(m: Tensor) -> Tensor:
        # −inf, not NaN, where no rank holds anything
        return torch.where(m == -_INF, -_INF, m - m_off)

    d_RC, d = above(m_RC), above(own.m_off)
    merged = RowStatistics(
        m_off,
        (off_1_RC * d_RC.exp()).sum(0),
        (off_t_RC * (d_RC / t).exp()).sum(0),
        None if own.z_label is None else by_rank[:, :, 3].amax(0),
        by_rank[:, :, SUMS:].amax(0),
    )
    return merged, (d.exp(), (d / t).exp())
