"""The choice of an implementation of top-k, tails and draws: Triton, Numba or PyTorch."""

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import KDError
from ..targets import SparseTargets
from .config import TopKCall
from .fill import fill_rows
from .torch_impl import TORCH

IMPLEMENTATIONS = ("auto", "torch", "numba", "triton")
Fill = Callable[[Tensor, SparseTargets, TopKCall, Tensor, int], None]
"""Fill rows of targets from logits `[N, V]`, positions `[N]` and the number of the first row in an error message."""
# Rows a call of the kernels: bounds their scratch memory to some 16 numbers per 128 logits of these rows.
ROWS_AT_ONCE = 8192


def filler(impl: str, rows: Tensor, call: TopKCall) -> Fill:
    """The function that fills in targets of rows of this type on this device. KDError for an `impl` that cannot."""
    if impl not in IMPLEMENTATIONS:
        raise KDError(f"impl: got {impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}.")
    if impl == "auto":
        impl = _best(rows, call)
    elif impl == "triton":
        _check_triton(rows, call)
    elif impl == "numba" and not _numba_can(rows):
        raise KDError(
            f"impl: got 'numba' for {rows.dtype} on {rows.device}; expected a CPU tensor, at most float32, and the "
            "package numba (pip install 'fastkd[cpu]'). Use impl='auto'."
        )
    if impl == "triton":
        return _fill_triton
    if impl == "numba":
        from .numba_impl import NUMBA

        return partial(fill_rows, NUMBA)
    return partial(fill_rows, TORCH)


def prepare_topk(device: torch.device) -> str:
    """Compile the CPU code of `topk_targets` now, not in its first call. Returns a message for the user, or ""."""
    if device.type != "cpu":
        return ""
    if not _numba_installed():
        return "top-k: by PyTorch, at a third of the speed of compiled code: pip install 'fastkd[cpu]' (Numba)"
    from .numba_impl import compile_all

    seconds = compile_all()
    return f"top-k: compiled for this CPU in {seconds:.0f} s, and kept" if seconds > 3 else ""


@lru_cache(maxsize=1)
def _numba_installed() -> bool:
    return find_spec("numba") is not None


def _best(rows: Tensor, call: TopKCall) -> str:
    if rows.device.type == "cuda":
        from .triton_impl import MAX_K

        return "triton" if rows.dtype != torch.float64 and call.entries <= MAX_K else "torch"
    return "numba" if _numba_can(rows) else "torch"


def _numba_can(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype != torch.float64 and _numba_installed()


def _check_triton(rows: Tensor, call: TopKCall) -> None:
    from .triton_impl import INTERPRETED, MAX_K

    if rows.dtype == torch.float64 or call.entries > MAX_K:
        raise KDError(
            f"impl: got 'triton' for {rows.dtype} and {call.entries} top-k entries; expected at most float32 and "
            f"{MAX_K} entries. Use impl='torch'."
        )
    if rows.device.type != "cuda" and not INTERPRETED:
        raise KDError(
            f"impl: got 'triton' for tensors on {rows.device}; expected CUDA tensors, or the Triton interpreter "
            "(TRITON_INTERPRET=1 before triton is imported). Use impl='auto'."
        )


def _fill_triton(logits_NV: Tensor, out: SparseTargets, call: TopKCall, positions_N: Tensor, first_row: int) -> None:
    from .triton_impl import fill_triton

    for start in range(0, len(logits_NV), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        fill_triton(logits_NV[some], out[some], call, positions_N[some], first_row + start)
