"""The sweeps of top-k, tails and draws in PyTorch: on any device, and the reference of the other implementations.

Blocks are small enough for a CPU's last-level cache. In each:

1. every group of `GROUP` neighbouring tokens gives its maximum; a row's best tokens all lie in as many of its best
   groups (best: larger maximum, then lower number), so only these are searched token by token;
2. the top-k entries are set to −inf, and the rest is summed at every temperature.
"""

import torch
from torch import Tensor

from .config import TopKCall
from .draws import GROUP, LOG2E, State, draw, exact_transform, exponent_scale, transform, units_, work_type
from .fill import Swept, scratch

BLOCK_BYTES = {"cpu": 6 << 20}  # of one block of logits in the work type
BLOCK_BYTES_ELSEWHERE = 64 << 20


class TorchSweeps:
    """See `fill.Sweeps`."""

    draw = staticmethod(draw)

    def rows(self, vocab_size: int, itemsize: int, device: torch.device) -> int:
        budget = BLOCK_BYTES.get(device.type, BLOCK_BYTES_ELSEWHERE)
        return budget // (-(-vocab_size // GROUP) * GROUP * itemsize)

    def sweep(self, logits_NV: Tensor, call: TopKCall) -> Swept:
        (n, vocab), entries = logits_NV.shape, call.entries
        columns = -(-vocab // GROUP) * GROUP
        x, spare = scratch(2 * n * columns, work_type(logits_NV), logits_NV.device).view(2, n, columns)
        x[:, :vocab] = logits_NV
        x[:, vocab:] = -torch.inf  # the last group is filled up with tokens that are no outcomes
        groups_top = x.view(n, -1, GROUP).amax(-1)
        # the top-k entries, and the token after them: the top of the tail
        best_x, best_id = _best_tokens(x, groups_top, min(entries + 1, vocab))
        finite = _count_finite(x[:, :vocab])
        tail_top_x = best_x[:, entries] if entries < vocab else torch.full_like(best_x[:, 0], -torch.inf)
        x.scatter_(1, best_id[:, :entries], -torch.inf)
        return Swept(
            best_x=best_x[:, :entries],
            best_id=best_id[:, :entries],
            tail_top_x=tail_top_x,
            row_top=groups_top.amax(1),  # NaN is a maximum
            finite=finite,
            tail_sums=_tail_sums(x, spare, transform(tail_top_x, call), call),
            rest=x,
        )

    def units(self, swept: Swept, logits_NV: Tensor, state: State, call: TopKCall) -> Tensor:
        n, vocab = logits_NV.shape
        x = swept.rest  # z - top of the tail, as `_tail_sums` leaves it
        assert x is not None
        if x.dtype != torch.float32:
            x = x.float()
        if call.mass is not None or logits_NV.dtype == torch.float64:
            # the tail's top may be another now, and z - top has to be rounded from it afresh
            top = state.tail_top(call)
            x[:, :vocab] = logits_NV
            place = torch.arange(call.entries, device=x.device)
            x.scatter_(1, swept.best_id, swept.best_x.float().masked_fill(place < state.size[:, None], -torch.inf))
            x.copy_(exact_transform(x, call.logit_scale, call.softcap))
            x.sub_(torch.where(top > -torch.inf, top, 0.0)[:, None])
        sums = units_(x, exponent_scale(call.draw_temperature)).view(n, -1, GROUP).sum(2)
        sums[:, -1] -= x.shape[1] - vocab  # what fills up the last group comes last: no token moves
        return sums


TORCH = TorchSweeps()


def _best_tokens(x: Tensor, groups_top: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the first `count` of a stable descending sort of each row (−inf last)."""
    n, groups = groups_top.shape
    take = min(count, groups)
    chosen = stable_best(groups_top, take)[1].sort(1).values
    tokens = x.view(n, groups, GROUP).gather(1, chosen[:, :, None].expand(-1, -1, GROUP)).view(n, -1)
    values, places = stable_best(tokens, count)
    return values, chosen.gather(1, places // GROUP) * GROUP + places % GROUP


def stable_best(values_NC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` of a stable descending sort along dimension 1: values and places."""
    if values_NC.dtype != torch.float32:
        best = values_NC.sort(dim=1, descending=True, stable=True)
        return best.values[:, :count], best.indices[:, :count]
    # torch.topk promises nothing about ties, so it gets none: an order-preserving integer above, the place below
    bits = (values_NC + 0.0).view(torch.int32)  # + 0.0: -0.0 ties with 0.0
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    place = torch.arange(values_NC.shape[1], device=values_NC.device)
    key = ordered.long().bitwise_left_shift_(32).bitwise_or_(0x7FFFFFFF - place)
    places = 0x7FFFFFFF - (key.topk(count, dim=1).values & 0xFFFFFFFF)
    return values_NC.gather(1, places), places


def _tail_sums(x: Tensor, spare: Tensor, top_n: Tensor, call: TopKCall) -> Tensor:
    """`Σ e^((z - top)/T)` over the finite x at every temperature, `[n, M]`. Overwrites both."""
    if call.softcap is not None or call.logit_scale is not None:
        x.copy_(transform(x, call))
    x.sub_(torch.where(top_n > -torch.inf, top_n, 0.0)[:, None])
    sums = torch.empty((len(x), len(call.temperatures)), dtype=x.dtype, device=x.device)
    for m, power in call.chains():
        if power == 0:  # exp2 is three times as fast as exp on a CPU
            torch.mul(x, LOG2E / call.temperatures[m], out=spare).exp2_()
        for _ in range(power // 2):  # 2: once, 4: twice
            spare.mul_(spare)
        torch.sum(spare, 1, out=sums[:, m])
    return sums


def _count_finite(x: Tensor) -> Tensor:
    """Tokens above −inf, int64 `[n]`."""
    if x.device.type == "cpu" and bool((x.amin(1) > -torch.inf).all()):  # the minimum is ten times as fast as counting
        return torch.full((len(x),), x.shape[1], device=x.device)
    return (x > -torch.inf).sum(1)
