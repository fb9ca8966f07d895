"""Top-k, tails and draws in pure PyTorch: the path of the CPU, and the twin the Triton kernels are held against.

Rows are taken in blocks small enough for a CPU's last-level cache. In each block, as in the kernels:

1. every group of `GROUP` neighbouring tokens gives its maximum; a row's k best tokens all lie in its k best groups
   (best: larger maximum, then lower number), so only those are looked at token by token;
2. the head is struck out (−inf), and what is left is summed relative to its own maximum at every temperature: the
   tail is never the difference of two numbers that nearly cancel. The full log-partition is head plus tail.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .draws import LOG2E, Tail, draw, exact_transform, exponent_scale, merge, row_keys, units_
from .topk_plan import Plan, Rows, refuse

GROUP = 32
BLOCK_BYTES = {"cpu": 6 << 20}  # of one block of logits in the work type
BLOCK_BYTES_ELSEWHERE = 64 << 20
# Draws are made for many blocks' rows at once: they are some hundred operations on little data.
ROWS_DRAWN = 512


def transform(x: Tensor, plan: Plan) -> Tensor:
    """What the head does to a logit after the matrix product: scale, then softcap. −inf (a masked token) stays."""
    if x.dtype == torch.float32:
        return exact_transform(x, plan.logit_scale, plan.softcap)
    if plan.logit_scale is not None:
        x = x * plan.logit_scale
    if plan.softcap is not None:
        x = torch.where(x.abs() < torch.inf, torch.tanh(x / plan.softcap) * plan.softcap, x)
    return x


def fill_torch(logits_NV: Tensor, out: Rows, plan: Plan, positions_N: Tensor, first_row: int) -> None:
    """Fill `out` from logits `[N, V]` of any stride. `first_row`: the number of the first row in an error message."""
    rows, vocab = logits_NV.shape
    work = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    groups = -(-vocab // GROUP)
    on_cpu = logits_NV.device.type == "cpu"
    budget = BLOCK_BYTES.get(logits_NV.device.type, BLOCK_BYTES_ELSEWHERE)
    block = max(1, min(rows, budget // (groups * GROUP * work.itemsize)))
    threads = torch.get_num_threads() if on_cpu and rows > block else 1
    inference = torch.is_inference_mode_enabled()

    def each(work: Callable[[slice], None], span: slice, step: int) -> None:
        """Call `work` with every `step` rows of a span."""
        parts = [slice(start, min(start + step, span.stop)) for start in range(span.start, span.stop, step)]

        def with_modes(part: slice) -> None:
            with torch.inference_mode(inference), torch.no_grad():  # each thread has its own
                work(part)

        if threads == 1:
            for part in parts:
                work(part)
        else:
            for _ in _pool(threads, os.getpid()).map(with_modes, parts):
                pass  # in order: of several bad rows the first is the one named

    for start in range(0, rows, max(block, ROWS_DRAWN)):
        span = slice(start, min(start + max(block, ROWS_DRAWN), rows))
        state = _State.empty(span.stop - start, groups, plan, logits_NV) if plan.draws else None

        def fill(part: slice, state: _State | None = state, start: int = start) -> None:
            n = part.stop - part.start
            x, spare = _scratch(n, groups * GROUP, work, logits_NV.device)
            x[:, :vocab] = logits_NV[part]
            x[:, vocab:] = -torch.inf  # the last group is filled up with tokens that are no outcomes
            here = None if state is None else state[part.start - start : part.stop - start]
            _fill_block(x, spare, logits_NV[part], out[part], plan, first_row + part.start, here)

        def draw_some(part: slice, state: _State | None = state, start: int = start) -> None:
            assert state is not None
            here = state[part.start - start : part.stop - start]
            _draw(here, logits_NV[part], out[part], plan, positions_N[part])

        each(fill, span, block)
        if plan.draws:
            each(draw_some, span, -(-(span.stop - start) // threads))


@dataclass(frozen=True)
class _State:
    """What the draws of some rows need to know of them."""

    sums: Tensor  # float32 `[n, groups]`: see `draws.Tail`
    edge_x: Tensor  # `[n]`
    edge_id: Tensor  # int64 `[n]`
    tail_top_x: Tensor  # `[n]`: the tail's greatest logit as given
    top: Tensor  # `[n]`: the row's greatest z
    log_total: Tensor  # `[n]`: and the log-partition relative to it
    size: Tensor  # int64 `[n]`: entries in the head
    wanted: Tensor  # bool `[n]`: the row is fine and has a tail

    @classmethod
    def empty(cls, rows: int, groups: int, plan: Plan, like: Tensor) -> "_State":
        work = torch.float64 if like.dtype == torch.float64 else torch.float32
        sums = torch.empty((rows, groups), dtype=torch.float32, device=like.device)
        types = (work, torch.int64, work, work, work, torch.int64, torch.bool)
        return cls(sums, *(torch.empty(rows, dtype=dtype, device=like.device) for dtype in types))

    def __getitem__(self, rows: slice) -> "_State":
        return _State(*(tensor[rows] for tensor in vars(self).values()))


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that run PyTorch on one core each. A forked process needs its own."""
    pool = ThreadPoolExecutor(threads, "fastkd-topk")
    ready = threading.Barrier(threads)

    def alone() -> None:
        torch.set_num_threads(1)
        ready.wait()

    for task in [pool.submit(alone) for _ in range(threads)]:
        task.result()
    torch.set_num_threads(threads)  # part of that setting is the process's
    return pool


_kept = threading.local()


def _scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two blocks of uninitialised numbers. On a CPU each thread keeps its own: fresh pages cost more than a sweep."""
    size = rows * columns
    both: Tensor | None
    if device.type != "cpu":
        both = torch.empty(2 * size, dtype=dtype, device=device)
    else:
        both = getattr(_kept, "both", None)
        if both is None or both.dtype != dtype or len(both) < 2 * size:
            with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside it
                _kept.both = both = torch.empty(2 * size, dtype=dtype)
    return both[:size].view(rows, columns), both[size : 2 * size].view(rows, columns)


def _fill_block(
    x: Tensor, spare: Tensor, logits_NV: Tensor, out: Rows, plan: Plan, first_row: int, state: _State | None
) -> None:
    """One block. x `[n, groups·GROUP]`: the raw logits in the work type, overwritten; spare: as much room.

    state: to be filled for the draws, where there are any.
    """
    n, vocab, k = len(x), plan.vocab_size, plan.k
    groups_top = x.view(n, -1, GROUP).amax(-1)

    # the head, and the token after it: the top of the tail
    best_x, best_id = _best_tokens(x, groups_top, min(k + 1, vocab))
    head_x, head_id = best_x[:, :k], best_id[:, :k]
    used = head_x > -torch.inf
    finite = _count_finite(x[:, :vocab])
    tail_top_x = best_x[:, k] if k < vocab else torch.full_like(best_x[:, 0], -torch.inf)
    x.scatter_(1, head_id, -torch.inf)
    tail_top = transform(tail_top_x, plan)
    sums_nM = _tail_sums(x, spare, tail_top, plan)

    head = transform(head_x, plan)
    top = torch.maximum(head[:, 0], tail_top) if k else tail_top
    shifted = tail_top - top  # <= 0; −inf where the tail is empty
    row_top = groups_top.amax(1)  # NaN and +inf are maxima; −inf: nothing but masked tokens
    fine_n = row_top.isfinite() & top.isfinite()
    fine_n &= ~((tail_top_x > -torch.inf) & (shifted == -torch.inf))  # e^shifted may be 0, its logarithm may not
    fine_n &= ~(used & ((head - top[:, None]).float() == -torch.inf)).any(1)
    if plan.draws:
        fine_n &= exact_transform(row_top.float(), plan.logit_scale, plan.softcap).isfinite()
    refuse(fine_n, row_top, first_row)
    total = (head - top[:, None]).exp().sum(1) + sums_nM[:, plan.temperatures.index(1.0)] * shifted.exp()
    # (top, log total) stay two numbers: their sum would lose what is small beside a logit of 1e4
    log_total = torch.where(fine_n, total.log(), torch.nan)
    logprobs = torch.where(used, head - top[:, None] - log_total[:, None], -torch.inf)
    inverse_M = inverse_temperatures(plan.temperatures, x.device, x.dtype)
    tail_nM = sums_nM.log() + (shifted - log_total)[:, None] * inverse_M
    kept = used

    if plan.mass is not None and k:
        mass_n = (shifted - log_total).exp() * sums_nM[:, plan.temperatures.index(1.0)]
        # What lies behind the entries before this one, summed from the far end: exact where 1 - sum would be noise.
        behind = mass_n[:, None] + logprobs.exp().flip(1).cumsum(1).flip(1)
        kept = behind > 1.0 - plan.mass
        kept[:, 0] = True
        kept &= used
        cut = torch.where(kept, -torch.inf, logprobs)
        for m, t in enumerate(plan.temperatures):
            tail_nM[:, m] = torch.logaddexp(tail_nM[:, m], torch.logsumexp(cut / t, 1))
        first_cut = torch.where(used & ~kept, head_x, -torch.inf).amax(1)
        tail_top_x = torch.maximum(tail_top_x, first_cut)

    broken_n1 = ~fine_n[:, None]
    out.ids[:, :k] = torch.where(kept, head_id, 0)
    out.logprobs[:, :k] = torch.where(kept, logprobs, -torch.inf)
    out.logprobs.masked_fill_(broken_n1, torch.nan)
    out.tail.copy_(tail_nM.masked_fill(broken_n1, torch.nan))
    out.outcomes.copy_(finite - kept.sum(1))
    if state is not None:
        state.tail_top_x.copy_(tail_top_x)
        state.top.copy_(top)
        state.log_total.copy_(log_total)
        state.size.copy_(kept.sum(1))
        state.wanted.copy_(fine_n & (tail_top_x > -torch.inf))
        _sum_units(x, logits_NV, head_x, head_id, state, plan)


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


def _tail_sums(x: Tensor, spare: Tensor, top_n: Tensor, plan: Plan) -> Tensor:
    """`Σ e^((z - top)/T)` over the finite x at every temperature, `[n, M]`. Overwrites both."""
    if plan.softcap is not None or plan.logit_scale is not None:
        x.copy_(transform(x, plan))
    x.sub_(torch.where(top_n > -torch.inf, top_n, 0.0)[:, None])
    sums = torch.empty((len(x), len(plan.temperatures)), dtype=x.dtype, device=x.device)
    for m, power in plan.chains():
        if power == 0:  # exp2 is three times as fast as exp on a CPU
            torch.mul(x, LOG2E / plan.temperatures[m], out=spare).exp2_()
        for _ in range(power // 2):  # 2: once, 4: twice
            spare.mul_(spare)
        torch.sum(spare, 1, out=sums[:, m])
    return sums


def _count_finite(x: Tensor) -> Tensor:
    """Tokens above −inf, int64 `[n]`."""
    if x.device.type == "cpu" and bool((x.amin(1) > -torch.inf).all()):  # the minimum is ten times as fast as counting
        return torch.full((len(x),), x.shape[1])
    return (x > -torch.inf).sum(1)


@lru_cache(maxsize=64)
def inverse_temperatures(temperatures: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """1/T `[M]` on a device, copied there once."""
    return 1.0 / torch.tensor(temperatures, dtype=torch.float64).to(device, dtype)


def _sum_units(x: Tensor, logits_NV: Tensor, head_x: Tensor, head_id: Tensor, state: _State, plan: Plan) -> None:
    """Fill a state's edge and sums. x: as `_tail_sums` leaves it, z - top of the tail. Overwrites x.

    head_x, head_id `[n, k]`, of which the first `state.size` are the head.
    """
    n, vocab = logits_NV.shape
    if x.dtype != torch.float32:
        x = x.float()
    if plan.k:
        last_n1 = (state.size - 1).clamp_(min=0)[:, None]
        state.edge_x.copy_(head_x.gather(1, last_n1)[:, 0])
        state.edge_id.copy_(head_id.gather(1, last_n1)[:, 0])
    else:
        state.edge_x.fill_(torch.inf)
        state.edge_id.fill_(-1)
    if plan.mass is not None or logits_NV.dtype == torch.float64:
        # the tail's top may be another now, and z - top has to be rounded from it afresh
        top = exact_transform(state.tail_top_x.float(), plan.logit_scale, plan.softcap)
        x[:, :vocab] = logits_NV
        place = torch.arange(plan.k, device=x.device)
        x.scatter_(1, head_id, head_x.float().masked_fill(place < state.size[:, None], -torch.inf))
        x.copy_(exact_transform(x, plan.logit_scale, plan.softcap))
        x.sub_(torch.where(top > -torch.inf, top, 0.0)[:, None])
    units = units_(x, exponent_scale(plan.draw_temperature))
    torch.sum(units.view(n, -1, GROUP), 2, out=state.sums)
    state.sums[:, -1] -= x.shape[1] - vocab  # what fills up the last group comes last: no token moves


def _draw(state: _State, logits_NV: Tensor, out: Rows, plan: Plan, positions_N: Tensor) -> None:
    """Draw from some rows, and write the draws down."""
    tail = Tail(
        sums=state.sums,
        width=GROUP,
        logits=logits_NV,
        edge_x=state.edge_x,
        edge_id=state.edge_id,
        top=exact_transform(state.tail_top_x.float(), plan.logit_scale, plan.softcap),
        logit_scale=plan.logit_scale,
        softcap=plan.softcap,
        draw_temperature=plan.draw_temperature,
    )
    ids = draw(tail, row_keys(plan.seed, positions_N), state.wanted, plan.draws)
    merge_drawn(logits_NV, ids, state.wanted, state.size, state.top, state.log_total, out, plan)


def merge_drawn(
    logits_NV: Tensor,
    ids_ND: Tensor,
    drawn_N: Tensor,
    kept_N: Tensor,
    top_N: Tensor,
    log_total_N: Tensor,
    out: Rows,
    plan: Plan,
) -> None:
    """Write drawn ids (any order) and their logprobs behind the head. `top`, `log_total`: the row's log-partition."""
    assert out.draws is not None
    ids_ND = ids_ND.clamp(0, plan.vocab_size - 1).sort(1).values
    x_ND = logits_NV.gather(1, ids_ND)
    z_ND = transform(x_ND.to(top_N.dtype), plan)
    merge(
        ids_ND,
        x_ND,
        (z_ND - top_N[:, None] - log_total_N[:, None]).to(out.logprobs.dtype),
        drawn_N,
        kept_N,
        out_ids=out.ids,
        out_logprobs=out.logprobs,
        out_draws=out.draws,
    )
