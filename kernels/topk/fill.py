"""Top-k entries, tails and draws block by block: all but the sweeps over the vocabulary (`Sweeps`: two kinds).

Rows are taken in blocks, and blocks by threads. What a block's sweeps return for each row (its top-k entries, the sums
of its tail) becomes targets here. The tail is summed relative to its own maximum, without the top-k entries: it is
never the difference of two numbers that nearly cancel. The full log-partition is top-k entries plus tail.
"""

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ..errors import KDError
from ..targets import SparseTargets
from .config import TopKCall
from .draws import Tail, exact_transform, merge, row_keys

GROUP = 32  # tokens per group of units, for the draws
# Draws are made for many blocks' rows at once: they are some hundred operations on little data.
ROWS_DRAWN = 512


@dataclass(frozen=True)
class Swept:
    """The result of the sweeps over some rows. x: logits as given; z: after the LM head's transform. In the work type:
    float32, or float64 for such logits."""

    best_x: Tensor  # `[n, entries]`: the first entries of a stable descending sort, −inf last
    best_id: Tensor  # int64 `[n, entries]`
    tail_top_x: Tensor  # `[n]`: the next one; −inf where there is none
    row_top: Tensor  # `[n]`: the greatest x; NaN where the row has one
    finite: Tensor  # int64 `[n]`: tokens above −inf
    tail_sums: Tensor  # `[n, M]`: Σ e^((z - z of tail_top_x)/T) over all but the top-k entries
    rest: Tensor | None  # scratch memory that `units` continues from, if it needs it


class Sweeps(Protocol):
    """The operations that read every token of a row. Each call runs on one thread."""

    def rows(self, vocab_size: int, itemsize: int, device: torch.device) -> int:
        """Rows a block."""

    def sweep(self, logits_NV: Tensor, call: TopKCall, units_nG: Tensor | None) -> Swept:
        """Sweep a block of any stride and type. units_nG: memory for the units, if there are draws; it may be filled
        here, where that is cheaper, and `units` then does nothing."""

    def units(self, swept: Swept, logits_NV: Tensor, state: "State", call: TopKCall) -> None:
        """Fill `state.sums`; the rest of `state` is filled. May overwrite `swept`."""

    def draw(self, tail: Tail, keys_N: Tensor, wanted_N: Tensor, draws: int) -> Tensor:
        """`draws.draw`, to the bit."""


def transform(x: Tensor, call: TopKCall) -> Tensor:
    """The LM head's transform of a logit: scale, then softcap. −inf (a masked token) stays."""
    if x.dtype == torch.float32:
        return exact_transform(x, call.logit_scale, call.softcap)
    if call.logit_scale is not None:
        x = x * call.logit_scale
    if call.softcap is not None:
        x = torch.where(x.abs() < torch.inf, torch.tanh(x / call.softcap) * call.softcap, x)
    return x


def fill_rows(
    sweeps: Sweeps, logits_NV: Tensor, out: SparseTargets, call: TopKCall, positions_N: Tensor, first_row: int
) -> None:
    """Fill `out` from logits `[N, V]` of any stride. `first_row`: the number of the first row in an error message."""
    rows, vocab = logits_NV.shape
    groups = -(-vocab // GROUP)
    threads = torch.get_num_threads() if logits_NV.device.type == "cpu" else 1
    block = sweeps.rows(vocab, work_type(logits_NV).itemsize, logits_NV.device)
    block = max(1, min(block, -(-rows // threads)))
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
        state = State.empty(span.stop - start, groups, call, logits_NV) if call.draws else None

        def fill(part: slice, state: State | None = state, start: int = start) -> None:
            here = None if state is None else state[part.start - start : part.stop - start]
            swept = sweeps.sweep(logits_NV[part], call, None if here is None else here.sums)
            _finish(swept, out[part], call, first_row + part.start, here)
            if here is not None:
                sweeps.units(swept, logits_NV[part], here, call)

        def draw_some(part: slice, state: State | None = state, start: int = start) -> None:
            assert state is not None
            here = state[part.start - start : part.stop - start]
            _draw(sweeps, here, logits_NV[part], out[part], call, positions_N[part])

        each(fill, span, block)
        if call.draws:
            each(draw_some, span, -(-(span.stop - start) // threads))


def unfilled(call: TopKCall, rows: int, device: torch.device) -> SparseTargets:
    """Targets of some rows, to be filled."""
    return SparseTargets.empty(
        rows,
        call.width(call.vocab_size),
        vocab_size=call.vocab_size,
        temperatures=call.temperatures,
        draws=call.draws > 0,
        draw_temperature=call.draw_temperature,
        device=device,
    )


def work_type(logits: Tensor) -> torch.dtype:
    """The type in which sums are computed."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class State:
    """The inputs of the draws of some rows."""

    sums: Tensor  # float32 `[n, groups]`: see `draws.Tail`
    edge_x: Tensor  # `[n]`
    edge_id: Tensor  # int64 `[n]`
    tail_top_x: Tensor  # `[n]`: the tail's greatest logit as given
    top: Tensor  # `[n]`: the row's greatest z
    log_total: Tensor  # `[n]`: and the log-partition relative to it
    size: Tensor  # int64 `[n]`: top-k entries that are kept
    wanted: Tensor  # bool `[n]`: the row is fine and has a tail

    @classmethod
    def empty(cls, rows: int, groups: int, call: TopKCall, like: Tensor) -> "State":
        work = work_type(like)
        sums = torch.empty((rows, groups), dtype=torch.float32, device=like.device)
        types = (work, torch.int64, work, work, work, torch.int64, torch.bool)
        return cls(sums, *(torch.empty(rows, dtype=dtype, device=like.device) for dtype in types))

    def __getitem__(self, rows: slice) -> "State":
        return State(*(tensor[rows] for tensor in vars(self).values()))


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


def _finish(swept: Swept, out: SparseTargets, call: TopKCall, first_row: int, state: State | None) -> None:
    """From the result of a block's sweeps to its targets. state: filled but for its sums; None without draws."""
    best_x, best_id, tail_top_x, sums_nM = swept.best_x, swept.best_id, swept.tail_top_x, swept.tail_sums
    row_top, entries = swept.row_top, call.entries
    used = best_x > -torch.inf
    best_z, tail_top = transform(best_x, call), transform(tail_top_x, call)
    top = torch.maximum(best_z[:, 0], tail_top) if entries else tail_top
    shifted = tail_top - top  # <= 0; −inf where the tail is empty
    valid_n = row_top.isfinite() & top.isfinite()
    valid_n &= ~((tail_top_x > -torch.inf) & (shifted == -torch.inf))  # e^shifted may be 0, its logarithm may not
    valid_n &= ~(used & ((best_z - top[:, None]).float() == -torch.inf)).any(1)
    if call.draws:
        valid_n &= exact_transform(row_top.float(), call.logit_scale, call.softcap).isfinite()
    refuse(valid_n, row_top, first_row)
    total = (best_z - top[:, None]).exp().sum(1) + sums_nM[:, call.temperatures.index(1.0)] * shifted.exp()
    # (top, log total) stay two numbers: their sum would lose what is small beside a logit of 1e4
    log_total = torch.where(valid_n, total.log(), torch.nan)
    logprobs = torch.where(used, best_z - top[:, None] - log_total[:, None], -torch.inf)
    inverse_M = inverse_temperatures(call.temperatures, best_z.device, best_z.dtype)
    tail_nM = sums_nM.log() + (shifted - log_total)[:, None] * inverse_M
    kept = used

    if call.mass is not None and entries:
        mass_n = (shifted - log_total).exp() * sums_nM[:, call.temperatures.index(1.0)]
        # What lies behind the entries before this one, summed from the far end: exact where 1 - sum would be noise.
        behind = mass_n[:, None] + logprobs.exp().flip(1).cumsum(1).flip(1)
        kept = behind > 1.0 - call.mass
        kept[:, 0] = True
        kept &= used
        cut = torch.where(kept, -torch.inf, logprobs)
        for m, t in enumerate(call.temperatures):
            tail_nM[:, m] = torch.logaddexp(tail_nM[:, m], torch.logsumexp(cut / t, 1))
        first_cut = torch.where(used & ~kept, best_x, -torch.inf).amax(1)
        tail_top_x = torch.maximum(tail_top_x, first_cut)

    broken_n1 = ~valid_n[:, None]
    out.ids[:, :entries] = torch.where(kept, best_id, 0)
    out.logprobs[:, :entries] = torch.where(kept, logprobs, -torch.inf)
    out.logprobs.masked_fill_(broken_n1, torch.nan)
    out.tail.copy_(tail_nM.masked_fill(broken_n1, torch.nan))
    out.outcomes.copy_(swept.finite - kept.sum(1))
    if state is not None:
        state.tail_top_x.copy_(tail_top_x)
        state.top.copy_(top)
        state.log_total.copy_(log_total)
        state.size.copy_(kept.sum(1))
        state.wanted.copy_(valid_n & (tail_top_x > -torch.inf))
        if entries:
            last_n1 = (state.size - 1).clamp_(min=0)[:, None]
            state.edge_x.copy_(best_x.gather(1, last_n1)[:, 0])
            state.edge_id.copy_(best_id.gather(1, last_n1)[:, 0])
        else:
            state.edge_x.fill_(torch.inf)
            state.edge_id.fill_(-1)


def _draw(
    sweeps: Sweeps, state: State, logits_NV: Tensor, out: SparseTargets, call: TopKCall, positions_N: Tensor
) -> None:
    """Draw from some rows, and write the draws to their targets."""
    tail = Tail(
        sums=state.sums,
        width=GROUP,
        logits=logits_NV,
        edge_x=state.edge_x,
        edge_id=state.edge_id,
        top=exact_transform(state.tail_top_x.float(), call.logit_scale, call.softcap),
        logit_scale=call.logit_scale,
        softcap=call.softcap,
        draw_temperature=call.draw_temperature,
    )
    ids = sweeps.draw(tail, row_keys(call.seed, positions_N), state.wanted, call.draws)
    merge_drawn(logits_NV, ids, state.wanted, state.size, state.top, state.log_total, out, call)


def refuse(valid_n: Tensor, top_x: Tensor, first_row: int) -> None:
    """On the CPU, raise KDError for the first row that is not valid. On a GPU this would synchronize.

    top_x: the rows' greatest logits as they were given.
    """
    if valid_n.device.type != "cpu" or bool(valid_n.all()):
        return
    row = int((~valid_n).nonzero()[0, 0])
    top = float(top_x[row])
    if math.isfinite(top):
        raise KDError(
            f"logits: row {first_row + row} has logits out of float32's range, after logit_scale or relative to the "
            f"row's best (as given {top:g}); expected smaller numbers, or -inf for tokens that are no outcomes.",
            row=first_row + row,
        )
    has = "no finite logit" if top == -torch.inf else "NaN" if top != top else "+inf"
    raise KDError(
        f"logits: row {first_row + row} has {has}; expected finite numbers (-inf only for tokens that are no "
        "outcomes), at least one.",
        row=first_row + row,
    )


@lru_cache(maxsize=64)
def inverse_temperatures(temperatures: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """1/T `[M]` on a device, copied there once."""
    return 1.0 / torch.tensor(temperatures, dtype=torch.float64, device="cpu").to(device, dtype)


def merge_drawn(
    logits_NV: Tensor,
    ids_ND: Tensor,
    drawn_N: Tensor,
    kept_N: Tensor,
    top_N: Tensor,
    log_total_N: Tensor,
    out: SparseTargets,
    call: TopKCall,
) -> None:
    """Write drawn ids (any order) and their logprobs behind the top-k entries. top_N, log_total_N: the
    row's log-partition."""
    assert out.draws is not None
    ids_ND = ids_ND.clamp(0, call.vocab_size - 1).sort(1).values
    x_ND = logits_NV.gather(1, ids_ND)
    z_ND = transform(x_ND.to(top_N.dtype), call)
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
