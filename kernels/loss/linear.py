"""The LM head fused with the loss: chunks of tokens through one reused buffer of logits, gradients in the forward."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..lm_head import LMHead
from .call import Call, RowOptions
from .torch_impl import TorchRows

# Logit gradients are kept in the LM head's own type, unnormalised where that is float16: 1/N folded into them lost 22%
# of their mass at N = 8192. Times 16, even a flat distribution over 150,000 outcomes is made of normal numbers, and
# gradients up to 4,094 still fit. Row weights are divided by the largest magnitude among them where that is above 1.
FLOAT16_SCALE = 16.0
CUDA_CHUNK = 2048
CPU_CHUNK_BYTES = 48 << 20
MM_ROWS = 8192  # of the weight's gradient at once, where a chunk's share of it needs memory of its own


def default_chunk(device: torch.device, width: int, itemsize: int) -> int:
    """Tokens whose logits are computed at once, by default."""
    if device.type == "cpu":
        return max(64, CPU_CHUNK_BYTES // (width * itemsize) // 64 * 64)
    return CUDA_CHUNK


def add_outer_product_(total_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor, *, first: bool) -> None:
    """total += gradient^T hidden (total = ..., for the first chunk), in float32 whatever the operands' type."""
    gradient_VC, dtype, beta = gradient_CV.t(), total_VD.dtype, 0 if first else 1
    way = "same" if gradient_CV.dtype == dtype else wider_product(gradient_CV.device, gradient_CV.dtype)
    if way == "addmm":
        torch.addmm(total_VD, gradient_VC, hidden_CD, out_dtype=dtype, beta=beta, out=total_VD)
    elif way == "mm" and first:
        torch.mm(gradient_VC, hidden_CD, out_dtype=dtype, out=total_VD)
    elif way == "mm":
        for block_VC, block_VD in zip(gradient_VC.split(MM_ROWS), total_VD.split(MM_ROWS), strict=True):
            block_VD.add_(torch.mm(block_VC, hidden_CD, out_dtype=dtype))
    elif way == "rounded":
        product = torch.mm(gradient_VC, hidden_CD)
        total_VD.copy_(product) if first else total_VD.add_(product)
    else:
        total_VD.addmm_(gradient_VC.to(dtype), hidden_CD.to(dtype), beta=beta)


def wider_product(device: torch.device, dtype: torch.dtype) -> str:
    """How products of half-precision matrices are added up in float32 on a device.

    "addmm", "mm": by that function's `out_dtype`. "rounded": rounded once, then added. "upcast": of converted operands.
    """
    return "upcast" if device.type == "cpu" else try_wider_product(device, dtype)


@cache
def try_wider_product(device: torch.device, dtype: torch.dtype) -> str:
    """`wider_product` on a GPU, found by trying: torch 2.8 and 2.9 have `addmm(out_dtype=)`, but it refuses a matrix to
    add that is not of the operands' type, and some back ends have none of it."""
    total, half = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    found, why = "rounded", ""
    for name, product in (
        ("addmm", lambda: torch.addmm(total, half, half, out_dtype=total.dtype, out=total)),
        ("mm", lambda: torch.mm(half, half, out_dtype=total.dtype, out=total)),
    ):
        try:
            product()
        except torch.OutOfMemoryError:
            raise  # which says nothing about the function
        except (RuntimeError, TypeError) as error:
            why = why or f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            found = name
            break
    if found != "addmm":
        cost = {
            "mm": "It is added in another pass, which takes longer",
            "rounded": "Each chunk's share of the weight's gradient is rounded before it is added, and takes longer",
        }[found]
        warnings.warn(
            f"torch {torch.__version__} cannot add a {dtype} product to a float32 matrix on {device} ({why}). {cost}. "
            "torch 2.10 can on CUDA.",
            stacklevel=2,
        )
    return found


def linear_kd_loss_chunks(
    hidden_ND: Tensor, lm_head: LMHead, call: Call, *, chunk: int, dtype: torch.dtype, want: list[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Loss, hard, soft, and the gradients in hidden (its type), weight and bias (float32), None for those not wanted;
    last what they are still to be multiplied by, or None.

    Matrix products run in `dtype` (autocast's, or the tensors' own). Peak memory beyond what is returned: one buffer
    `[chunk, V]`, and `[V, D]` in float32 for the weight's gradient.
    """
    width, device = lm_head.weight.shape[0], hidden_ND.device
    rescale_later = dtype == torch.float16
    largest = call.max_abs_weight(hidden_ND.shape[0]) if rescale_later and call.weights is not None else None
    options = RowOptions(
        upstream=None if largest is None else 1.0 / largest,
        fixed_scale=FLOAT16_SCALE if rescale_later else None,
        softcap=lm_head.softcap,
        logit_scale=lm_head.logit_scale,
        want_grad=any(want),
        what="hidden @ weight.T",
    )
    rows = rows_of(call, hidden_ND.shape[0], width, dtype, options)
    weight_VD = lm_head.weight.to(dtype)
    bias_V = None if lm_head.bias is None else lm_head.bias.to(dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32

    # Compact targets: a row that lies outside the batch has the index N. What it reads does not matter, its loss being
    # NaN; what it writes goes to one row more than there are positions.
    n, index = hidden_ND.shape[0], rows.safe_index()
    d_hidden = None
    if want[0]:
        d_hidden = (
            hidden_ND.new_empty(hidden_ND.shape) if index is None else hidden_ND.new_zeros(n + 1, hidden_ND.shape[1])
        )
    d_weight = torch.empty(weight_VD.shape, dtype=accumulator, device=device) if want[1] else None
    if d_weight is not None and rows.rows == 0:
        d_weight.zero_()
    counted = rows.counted() if d_weight is not None else None
    d_bias = torch.zeros(width, dtype=accumulator, device=device) if want[2] else None
    buffer = torch.empty(min(chunk, rows.rows), width, dtype=dtype, device=device)
    for first in range(0, rows.rows, chunk):
        at = slice(first, min(first + chunk, rows.rows))
        hidden_CD = hidden_ND[at] if index is None else hidden_ND[index[at].clamp(max=n - 1)]
        hidden_CD, x_CV = hidden_CD.to(dtype), buffer[: at.stop - first]
        if bias_V is None:
            torch.mm(hidden_CD, weight_VD.t(), out=x_CV)
        else:
            torch.addmm(bias_V, hidden_CD, weight_VD.t(), out=x_CV)
        rows.loss_(x_CV, first)
        if d_hidden is not None:
            if index is None and d_hidden.dtype == dtype:
                torch.mm(x_CV, weight_VD, out=d_hidden[at])
            else:
                d_hidden[at if index is None else index[at]] = torch.mm(x_CV, weight_VD).to(d_hidden.dtype)
        if d_weight is not None:
            if counted is not None:
                # a row that does not count may hold anything: its gradient is 0, and 0 * NaN would stay
                hidden_CD = hidden_CD.masked_fill(~counted[at][:, None], 0.0)
            add_outer_product_(d_weight, x_CV, hidden_CD, first=first == 0)
        if d_bias is not None:
            d_bias += x_CV.sum(0, dtype=accumulator)
    rescale = None
    if rescale_later:
        rescale = (1.0 if largest is None else largest) / (rows.divisor * FLOAT16_SCALE)
    if index is not None and d_hidden is not None:
        d_hidden = d_hidden[:n]
    return *rows.total(), [d_hidden, d_weight, d_bias, rescale]


def rows_of(call: Call, positions: int, width: int, dtype: torch.dtype, options: RowOptions) -> Any:
    """The rows of a call, by the implementation that its config names: torch or triton."""
    if call.config.impl == "triton":
        from .triton_impl import TritonRows

        return TritonRows(call, positions, width, dtype, options)
    return TorchRows(call, positions, width, dtype, options)
