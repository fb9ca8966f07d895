"""The sweeps of top-k, tails and draws on a CPU, by functions that Numba compiles (`numba_kernels.py`).

A row is copied once, in float32, and swept twice: for the maxima of groups of 32 tokens, which lead to the top-k
entries, and for the tail. Entries and draws are those of `torch_impl` to the bit; sums are added up in another order.
"""

import threading
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import draws as dr
from .config import TopKCall
from .draws import Tail, exponent_scale, reciprocal, weight_bits
from .fill import GROUP, State, Swept, fill_rows, unfilled
from .numba_kernels import draw_rows, sweep_rows, unit_rows

BLOCK_BYTES = 32 << 20  # of logits per call: the code that is not compiled costs the same for one row as for many

_kept = threading.local()


def _room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor, whatever the caller's default type and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _as_rows(logits_NV: Tensor) -> NDArray[np.float32]:
    """Logits as C-contiguous float32 `[n, V]`: themselves if they are, or copied to a buffer of this thread."""
    if _as_they_are(logits_NV):
        return _array(logits_NV)
    kept: Tensor | None = getattr(_kept, "room", None)
    if kept is None or kept.numel() < logits_NV.numel():
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside it
            _kept.room = kept = _room(logits_NV.numel())
    room = kept[: logits_NV.numel()].view(logits_NV.shape)
    room.copy_(logits_NV)
    return _array(room)


def _as_they_are(logits: Tensor) -> bool:
    """Whether compiled code can read the tensor without a copy. (torch negates some views lazily.)"""
    return logits.dtype == torch.float32 and logits.is_contiguous() and not logits.is_neg()


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().numpy()


def _transform_numbers(of: TopKCall | Tail) -> NDArray[np.float32]:
    """Scale, softcap (0: none) and its reciprocal."""
    scale, cap = of.logit_scale, of.softcap
    return np.array([1.0 if scale is None else scale, cap or 0.0, reciprocal(cap) if cap else 0.0], np.float32)


class NumbaSweeps:
    """See `fill.Sweeps`. For logits on a CPU, of float32 or less."""

    def rows(self, vocab_size: int, itemsize: int, device: torch.device) -> int:
        return BLOCK_BYTES // (vocab_size * itemsize)

    def sweep(self, logits_NV: Tensor, call: TopKCall, units_nG: Tensor | None) -> Swept:
        (n, vocab), entries, many = logits_NV.shape, call.entries, len(call.temperatures)
        best_x = _room(n, min(entries + 1, vocab))
        best_id = _room(*best_x.shape, dtype=torch.int64)
        row_top, finite, sums = _room(n), _room(n, dtype=torch.int64), _room(n, many)
        at_once = (
            units_nG is not None and call.mass is None
        )  # with `mass`, the tail's top is only known after the sweep
        units = units_nG if units_nG is not None and at_once else _room(0, 1)
        steps, powers = np.array(call.chains()).T
        sweep_rows(
            _as_rows(logits_NV),
            entries,
            np.array([dr.LOG2E / t for t in call.temperatures], np.float32),
            steps.copy(),
            powers.copy(),
            _transform_numbers(call),
            np.float32(exponent_scale(call.draw_temperature) if at_once else 0.0),
            *map(_array, (best_x, best_id, row_top, finite, sums, units)),
        )
        return Swept(
            best_x=best_x[:, :entries],
            best_id=best_id[:, :entries],
            tail_top_x=best_x[:, entries] if entries < vocab else torch.full_like(row_top, -torch.inf),
            row_top=row_top,
            finite=finite,
            tail_sums=sums,
            rest=None,
        )

    def units(self, swept: Swept, logits_NV: Tensor, state: State, call: TopKCall) -> None:
        if call.mass is None:
            return  # `sweep` has filled them
        unit_rows(
            _as_rows(logits_NV),
            np.ascontiguousarray(_array(swept.best_id)),
            _array(state.size),
            _array(state.tail_top_x),
            _transform_numbers(call),
            np.float32(exponent_scale(call.draw_temperature)),
            _array(state.sums),
        )

    def draw(self, tail: Tail, keys_N: Tensor, wanted_N: Tensor, draws: int) -> Tensor:
        ids = torch.zeros((len(keys_N), draws), dtype=torch.int64, device=keys_N.device)
        if not _as_they_are(tail.logits):
            return dr.draw(tail, keys_N, wanted_N, draws)  # reads a few tokens per row, so no copy is made
        draw_rows(
            *map(_array, (tail.logits, tail.sums, tail.edge_x, tail.edge_id, tail.top, keys_N, wanted_N)),
            _transform_numbers(tail),
            np.float32(exponent_scale(tail.draw_temperature)),
            weight_bits(tail.logits.shape[1]),
            _array(ids),
        )
        return ids


NUMBA = NumbaSweeps()


def compile_all() -> float:
    """Compile all functions, or load them from disk, instead of in the first call. Returns the seconds taken."""
    began = time.perf_counter()
    logits = _room(1, GROUP).zero_()
    for mass in (None, 0.5):
        call = TopKCall(k=1, mass=mass, draws=1, temperatures=(1.0,), vocab_size=GROUP)
        fill_rows(NUMBA, logits, unfilled(call, 1, logits.device), call, _room(1, dtype=torch.int64).zero_(), 0)
    return time.perf_counter() - began
