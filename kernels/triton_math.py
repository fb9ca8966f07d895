# mypy: allow-untyped-defs, allow-untyped-decorators
"""Functions on numbers and small vectors that Triton kernels, and the Triton forms of divergences, share."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INF = tl.constexpr(float("inf"))


def is_interpreted(kernel: Any) -> bool:
    """True for a kernel that was imported under TRITON_INTERPRET=1, which is how kernels run on CPU tensors."""
    return not isinstance(kernel, triton.JITFunction)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The device of a tensor as the current one: kernels are launched on that, wherever their arguments are."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def back_end() -> tuple[str, int]:
    """Triton's back end, "cuda" or "hip", and the threads of its warps. ("cuda", 32) where no GPU is there."""
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # kernels are interpreted
        return "cuda", 32
    return target.backend, target.warp_size


@triton.jit
def finite_or_zero(x):
    """A reference to subtract: −inf (nothing there) as 0, so that e^(−inf - reference) is 0 and not NaN."""
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def log(x):
    """Natural logarithm, −inf of 0 (written out: the interpreter warns of it)."""
    return tl.where(x == 0.0, -INF, tl.log(tl.where(x == 0.0, 1.0, x)))


@triton.jit
def logsumexp(x):
    """log Σ e^x of a small vector; −inf for an empty one."""
    m = tl.max(x)
    ref = finite_or_zero(m)
    return ref + tl.log(tl.sum(tl.exp(x - ref)))


@triton.jit
def log_add(x, y):
    """log(e^x + e^y)."""
    m = tl.maximum(x, y)
    ref = finite_or_zero(m)
    return ref + tl.log(tl.exp(x - ref) + tl.exp(y - ref))


@triton.jit
def times(weight, x):
    """weight * x, and 0 where the weight is 0, whatever x is."""
    return tl.where(weight == 0.0, 0.0, weight * x)
