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
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import KDError
from ..targets import SparseTargets
from .config import TopKCall
from .draws import State, exact_transform, merge_drawn, row_keys, transform, work_type

# Draws are made for many blocks' rows at once: they are some hundred operations on little data.
ROWS_DRAWN = 512
Result = TypeVar("Result")
_kept = threading.local()


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
    rest: Tensor | None  # scratch memory that `units` continues from, or the units themselves


class Sweeps(Protocol):
    """The operations that read every token of a row. Each call runs on one thread."""

    def rows(self, vocab_size: int, itemsize: int, device: torch.device) -> int:
        """Rows a block."""

    def sweep(self, logits_NV: Tensor, call: TopKCall) -> Swept:
        """Sweep a block of any stride and type."""

    def units(self, swept: Swept, logits_NV: Tensor, state: State, call: TopKCall) -> Tensor:
        """The sums of units: `state` without them as yet. May overwrite `swept`."""

    def draw(self, state: State, logits_NV: Tensor, keys_N: Tensor, call: TopKCall) -> Tensor:
        """`draws.draw`, to the bit."""


def fill_rows(
    sweeps: Sweeps, logits_NV: Tensor, out: SparseTargets, call: TopKCall, positions_N: Tensor, first_row: int
) -> None:
    """Fill `out` from logits `[N, V]` of any stride. `first_row`: the number of the first row in an error message."""
    rows, vocab = logits_NV.shape
    device = logits_NV.device
    threads = _threads(device)
    block = sweeps.rows(vocab, work_type(logits_NV).itemsize, device)
    block = max(1, min(block, -(-rows // threads)))

    def fill(part: slice) -> State | None:
        swept = sweeps.sweep(logits_NV[part], call)
        state = finish(swept, out[part], call, first_row + part.start)
        return replace(state, sums=sweeps.units(swept, logits_NV[part], state, call)) if call.draws else None

    for start in range(0, rows, max(block, ROWS_DRAWN)):
        span = slice(start, min(start + max(block, ROWS_DRAWN), rows))
        states = in_blocks(fill, span, block, device)
        if call.draws:
            state = State(*map(torch.cat, zip(*(vars(part).values() for part in states), strict=True)))

            def draw_some(part: slice, state: State = state, start: int = start) -> None:
                here = state[part.start - start : part.stop - start]
                ids = sweeps.draw(here, logits_NV[part], row_keys(call.seed, positions_N[part]), call)
                merge_drawn(logits_NV[part], ids, here, out[part], call)

            in_blocks(draw_some, span, -(-(span.stop - start) // threads), device)


def in_blocks(work: Callable[[slice], Result], span: slice, step: int, device: torch.device) -> list[Result]:
    """The results of `work` on every `step` rows of a span; on a CPU, by PyTorch's number of threads at a time."""
    threads, inference = _threads(device), torch.is_inference_mode_enabled()
    step = max(1, step)
    parts = [slice(start, min(start + step, span.stop)) for start in range(span.start, span.stop, step)]

    def with_modes(part: slice) -> Result:
        with torch.inference_mode(inference), torch.no_grad():  # each thread has its own
            return work(part)

    if threads == 1:
        return [work(part) for part in parts]
    return list(_pool(threads, os.getpid()).map(with_modes, parts))  # of several bad rows the first is named


def _threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 1


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


def finish(swept: Swept, out: SparseTargets, call: TopKCall, first_row: int) -> State:
    """From the result of a block's sweeps to its targets. Returns what its draws start from, without the sums."""
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
    inverse_M = over_temperatures(1.0, call.temperatures, best_z.device, best_z.dtype)
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
    size, edge_x, edge_id = kept.sum(1), torch.full_like(top, torch.inf), torch.full_like(swept.finite, -1)
    if entries:
        last_n1 = (size - 1).clamp_(min=0)[:, None]
        edge_x, edge_id = best_x.gather(1, last_n1)[:, 0], best_id.gather(1, last_n1)[:, 0]
    out.outcomes.copy_(swept.finite - size)
    wanted = valid_n & (tail_top_x > -torch.inf)
    return State(out.logprobs[:, :0], edge_x, edge_id, tail_top_x, top, log_total, size, wanted)


def refuse(valid_n: Tensor, top_x: Tensor, first_row: int) -> None:
    """On the CPU, raise KDError for the first row that is not valid. On a GPU this would synchronize.

    top_x: the rows' greatest logits as they were given.
    """
    if valid_n.device.type != "cpu" or bool(valid_n.all()):
        return
    row = int((~valid_n).nonzero()[0, 0])
    top = float(top_x[row])
    has = "no finite logit" if top == -torch.inf else "NaN" if top != top else "+inf"
    if math.isfinite(top):
        has = f"logits out of float32's range, after logit_scale or relative to the row's best (as given {top:g})"
    raise KDError(
        f"logits: row {first_row + row} has {has}; expected finite numbers (-inf only for tokens that are no "
        "outcomes), at least one.",
        row=first_row + row,
    )


def scratch(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. On a CPU each thread keeps its own: fresh pages cost more than a sweep."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    kept: Tensor | None = getattr(_kept, "memory", None)
    if kept is None or kept.dtype != dtype or len(kept) < size:
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside it
            _kept.memory = kept = torch.empty(size, dtype=dtype, device=device)
    return kept[:size]


@lru_cache(maxsize=64)
def over_temperatures(
    number: float, temperatures: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """number/T `[M]` on a device, copied there once."""
    return torch.tensor([number / t for t in temperatures], dtype=torch.float64, device="cpu").to(device, dtype)
