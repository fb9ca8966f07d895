"""The sweeps of top-k, tails and draws on a CPU, by functions that Numba compiles (`numba_kernels.py`).

A row is copied once, in float32, and swept twice: for the maxima of groups of 32 tokens, which lead to the top-k
entries, and for the tail. Entries and draws are those of `torch_impl` to the bit; sums are added up in another order.
"""

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import draws as dr
from .config import TopKCall
from .draws import GROUP, State, exponent_scale, reciprocal, weight_bits
from .fill import Swept, fill_rows, scratch, unfilled
from .numba_kernels import draw_rows, sweep_rows, unit_rows

BLOCK_BYTES = 32 << 20  # of logits per call: the code that is not compiled costs the same for one row as for many


def _room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor, whatever the caller's default type and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _as_rows(logits_NV: Tensor) -> NDArray[np.float32]:
    """Logits as C-contiguous float32 `[n, V]`: themselves if they are, or copied to a buffer of this thread."""
    if _as_they_are(logits_NV):
        return _array(logits_NV)
    room = scratch(logits_NV.numel(), torch.float32, logits_NV.device).view(logits_NV.shape)
    room.copy_(logits_NV)
    return _array(room)


def _as_they_are(logits: Tensor) -> bool:
    """Whether compiled code can read the tensor without a copy. (torch negates some views lazily.)"""
    return logits.dtype == torch.float32 and logits.is_contiguous() and not logits.is_neg()


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().numpy()


def _transform_numbers(call: TopKCall) -> NDArray[np.float32]:
    """Scale, softcap (0: none) and its reciprocal."""
    scale, cap = call.logit_scale, call.softcap
    return np.array([1.0 if scale is None else scale, cap or 0.0, reciprocal(cap) if cap else 0.0], np.float32)


class NumbaSweeps:
    """See `fill.Sweeps`. For logits on a CPU, of float32 or less."""

    def rows(self, vocab_size: int, itemsize: int, device: torch.device) -> int:
        return BLOCK_BYTES // (vocab_size * itemsize)

    def sweep(self, logits_NV: Tensor, call: TopKCall) -> Swept:
        (n, vocab), entries, many = logits_NV.shape, call.entries, len(call.temperatures)
        best_x = _room(n, min(entries + 1, vocab))
        best_id = _room(*best_x.shape, dtype=torch.int64)
        row_top, finite, sums = _room(n), _room(n, dtype=torch.int64), _room(n, many)
        # with `mass`, the tail's top is only known after the sweep
        units = _room(n, -(-vocab // GROUP)) if call.draws and call.mass is None else None
        steps, powers = np.array(call.chains()).T
        sweep_rows(
            _as_rows(logits_NV),
            entries,
            np.array([dr.LOG2E / t for t in call.temperatures], np.float32),
            steps.copy(),
            powers.copy(),
            _transform_numbers(call),
            np.float32(0.0 if units is None else exponent_scale(call.draw_temperature)),
            *map(_array, (best_x, best_id, row_top, finite, sums, _room(0, 1) if units is None else units)),
        )
        return Swept(
            best_x=best_x[:, :entries],
            best_id=best_id[:, :entries],
            tail_top_x=best_x[:, entries] if entries < vocab else torch.full_like(row_top, -torch.inf),
            row_top=row_top,
            finite=finite,
            tail_sums=sums,
            rest=units,
        )

    def units(self, swept: Swept, logits_NV: Tensor, state: State, call: TopKCall) -> Tensor:
        if swept.rest is not None:
            return swept.rest
        units = _room(len(logits_NV), -(-call.vocab_size // GROUP))
        unit_rows(
            _as_rows(logits_NV),
            np.ascontiguousarray(_array(swept.best_id)),
            _array(state.size),
            _array(state.tail_top_x),
            _transform_numbers(call),
            np.float32(exponent_scale(call.draw_temperature)),
            _array(units),
        )
        return units

    def draw(self, state: State, logits_NV: Tensor, keys_N: Tensor, call: TopKCall) -> Tensor:
        if not _as_they_are(logits_NV):
            return dr.draw(state, logits_NV, keys_N, call)  # reads a few tokens per row, so no copy is made
        ids = torch.zeros((len(keys_N), call.draws), dtype=torch.int64, device=keys_N.device)
        rows = (logits_NV, state.sums, state.edge_x, state.edge_id, state.tail_top(call), keys_N, state.wanted)
        draw_rows(
            *map(_array, rows),
            _transform_numbers(call),
            np.float32(exponent_scale(call.draw_temperature)),
            weight_bits(call.vocab_size),
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
