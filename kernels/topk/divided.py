"""Top-k entries, tails and draws of a vocabulary that is divided over ranks: every rank gets the whole result.

Each rank sweeps its own columns. One all-gather per chunk of rows then brings everyone's best tokens, tail tops and
sums together, from which all ranks compute the same targets (`fill.finish`). Draws take one more for the parts' units,
and one for each round of attempts: a random number names a token of one rank, which alone can tell whether it is drawn.
These read the device, so that on a GPU a chunk waits for the one before.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..targets import SparseTargets
from ..vocab_parallel import VocabPart, all_gather
from . import draws as dr
from .config import TopKCall
from .fill import Swept, finish, in_blocks
from .merge import merge
from .torch_impl import TORCH

# Attempts at a draw that are made before ranks compare: few draws need more than four.
WINDOWS = (4, 16, 64, 172)


class Sweep(Protocol):
    """A sweep over a rank's own columns. `fill.Sweeps` are some."""

    def rows(self, vocab_size: int, itemsize: int, device: torch.device) -> int:
        """Rows a block."""

    def sweep(self, logits_NV: Tensor, call: TopKCall) -> Swept:
        """Sweep a block of any stride and type."""


@dataclass(frozen=True)
class DividedFill:
    """Fills in targets from this rank's logits. sweeps: over these. part: which columns they are."""

    sweeps: Sweep
    part: VocabPart

    @property
    def order(self) -> list[int]:
        """The ranks in the order of their columns."""
        return sorted(range(len(self.part.parts)), key=lambda rank: self.part.parts[rank][0])

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x, in the order of their columns."""
        return all_gather(x, self.part.group)[self.order]

    def __call__(
        self, logits_NV: Tensor, out: SparseTargets, call: TopKCall, positions_N: Tensor, first_row: int
    ) -> None:
        """Fill `out` from logits `[N, columns of this rank]`. All ranks call it, with equal numbers of rows."""
        swept = self._all_ranks(self._own(logits_NV, call), call)
        state = finish(swept, out, call, first_row)
        if call.draws:
            self._draw(logits_NV, state, out, call, dr.row_keys(call.seed, positions_N))

    def _own(self, logits_NV: Tensor, call: TopKCall) -> Swept:
        """The sweep over this rank's columns, with ids of the whole vocabulary."""
        columns = logits_NV.shape[1]
        local = replace(call, vocab_size=columns, draws=0 if call.k else call.draws)
        itemsize = 8 if logits_NV.dtype == torch.float64 else 4
        block = self.sweeps.rows(columns, itemsize, logits_NV.device)

        def sweep(part: slice) -> Swept:
            return replace(self.sweeps.sweep(logits_NV[part], local), rest=None)

        some = in_blocks(sweep, slice(0, len(logits_NV)), block, logits_NV.device)
        cat = {name: torch.cat([getattr(s, name) for s in some]) for name in vars(some[0]) if name != "rest"}
        return Swept(**cat | {"best_id": cat["best_id"] + self.part.start}, rest=None)

    def _all_ranks(self, own: Swept, call: TopKCall) -> Swept:
        """The sweep over all ranks' columns."""
        n, found = own.best_x.shape
        kind, missing = own.best_x.dtype, call.entries - found
        numbers = (own.tail_top_x, own.row_top, own.finite)
        sent = torch.cat(
            [
                torch.nn.functional.pad(own.best_x.double(), (0, missing), value=-torch.inf),
                torch.nn.functional.pad(own.best_id.double(), (0, missing)),  # below 2^53: exact
                *(x.double()[:, None] for x in numbers),
                own.tail_sums.double(),
            ],
            1,
        )
        # in the order of their columns, so that equal logits come in the order of their ids
        gathered = self.gather(sent).transpose(0, 1)  # [n, R, ...]
        widths = [call.entries, call.entries, 1, 1, 1, len(call.temperatures)]
        best_x, best_id, top_x, row_top, finite, sums = torch.split(gathered, widths, 2)
        return merge(
            best_x.reshape(n, -1).to(kind),
            best_id.reshape(n, -1).long(),
            top_x[:, :, 0].to(kind),
            sums.to(kind),
            row_top=row_top[:, :, 0].amax(1).to(kind),
            finite=finite[:, :, 0].sum(1).long(),
            call=call,
        )

    def _draw(self, logits_NV: Tensor, state: dr.State, out: SparseTargets, call: TopKCall, keys_N: Tensor) -> None:
        """Write the draws behind the top-k entries."""
        n, draws, start = len(logits_NV), call.draws, self.part.start
        own = replace(state, edge_id=state.edge_id - start)  # ids of this rank's columns
        own = replace(own, sums=_unit_sums(logits_NV, own, call))
        totals = self.gather(own.sums.sum(1, dtype=torch.float64).long())
        parts_before = sum(other < start for other, _ in self.part.parts)
        share = dr.Share(before=totals[:parts_before].sum(0), total=totals.sum(0))
        top_N = own.tail_top(call)
        before = torch.zeros(own.sums.numel() + 1, dtype=torch.int64, device=keys_N.device)
        torch.cumsum(own.sums.reshape(-1), 0, dtype=torch.int64, out=before[1:])

        drawn_P2 = torch.zeros((n * draws, 2), dtype=torch.float64, device=keys_N.device)  # id and logit
        wanted_P = state.wanted.repeat_interleave(draws)
        first = 0
        for count in WINDOWS:
            some = wanted_P.nonzero()[:, 0]
            if not len(some):
                break
            row_R = some // draws
            attempt_A = torch.arange(first, first + count, device=keys_N.device)
            u_RC = dr.uniforms(keys_N[row_R][:, None], (some % draws)[:, None], attempt_A)
            named, good = dr.attempt(own, logits_NV, call, top_N, before, row_R, u_RC, share)
            which = torch.where(good, attempt_A - first, count).amin(1)
            named = named.gather(1, which[:, None].clamp(max=count - 1))[:, 0]
            x = logits_NV[row_R, named.clamp(0, logits_NV.shape[1] - 1)]
            mine = torch.stack([which.double(), (named + start).double(), x.double()], 1)
            everyones = self.gather(mine)
            winner = everyones[:, :, 0].argmin(0)
            best = everyones[winner, torch.arange(len(some), device=winner.device)]
            done = best[:, 0] < count
            drawn_P2[some[done]] = best[done, 1:]
            wanted_P[some[done]] = False
            first += count
        ids, values = drawn_P2.view(n, draws, 2).unbind(2)
        dr.merge_values(values.to(logits_NV.dtype), ids.long(), state, out, call)


def _unit_sums(logits_NV: Tensor, state: dr.State, call: TopKCall) -> Tensor:
    """Units of every group of dr.GROUP of this rank's tokens, float32 `[n, groups]`. state: with ids of its columns."""
    (n, columns), scale, top = logits_NV.shape, dr.exponent_scale(call.draw_temperature), state.tail_top(call)
    groups = -(-columns // dr.GROUP)
    ids = torch.arange(columns, device=logits_NV.device)

    def sums(part: slice) -> Tensor:
        x, edge_x = logits_NV[part], state.edge_x[part, None].to(logits_NV.dtype)
        in_topk = (x == edge_x).logical_and_(ids <= state.edge_id[part, None]).logical_or_(x > edge_x)
        d = dr.exact_transform(x.float().masked_fill(in_topk, -torch.inf), call.logit_scale, call.softcap)
        d = d - torch.where(top[part] > -torch.inf, top[part], 0.0)[:, None]
        units = dr.units_(torch.nn.functional.pad(d, (0, groups * dr.GROUP - columns), value=-torch.inf), scale)
        found = units.view(len(x), groups, dr.GROUP).sum(2)
        found[:, -1] -= groups * dr.GROUP - columns
        return found

    block = TORCH.rows(columns, 4, logits_NV.device)
    return torch.cat(in_blocks(sums, slice(0, n), block, logits_NV.device))
