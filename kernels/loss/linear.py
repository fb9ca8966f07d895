"""The LM head fused with the loss: chunks of tokens through one reused buffer of logits, gradients in the forward."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..lm_head import LMHead
from ..vocab_parallel import all_reduce_sum_
from .call import Call, RowOptions
from .torch_impl import TorchRows

# Logit gradients are kept in the LM head's own type, unnormalised where that is float16: 1/N folded into them lost 22%
# of their mass at N = 8192. Times 16, even a flat distribution over 150,000 outcomes is made of normal numbers, and
# gradients up to 4,094 still fit. Row weights are divided by the largest magnitude among them where that is above 1.
FLOAT16_SCALE = 16.0
# Positions whose logits bound the memory on a GPU: 2 C V + 4 V D bytes in half precision and 32 MB, beyond inputs and
# gradients.
CUDA_CHUNK = 2048
SPARE_BYTES = 32 << 20
# Each chunk reads and writes the float32 sum of the weight's gradient, 8 V D bytes beside 6 C V D operations: of 8192
# positions, 4% of the products' time at 735 TFLOP/s and 3 TB/s. Longer chunks only take memory.
LONGEST_CHUNK = 8192
CHUNK_STEP = 128  # rows of a product's tile
LEAST_UNSPLIT = 1 << 24  # elements of a product whose tiles alone fill a GPU
ROW_STEP = 64  # elements
CPU_CHUNK_BYTES = 48 << 20
MM_ROWS = 8192  # of the weight's gradient at once, where a chunk's share of it needs memory of its own


def default_chunk(device: torch.device, width: int, itemsize: int, *, rows: int = 0, longer: int = 0) -> int:
    """Tokens whose logits are computed at once, by default.

    longer: on a GPU, how many more than CUDA_CHUNK fit into memory that is free then: with a gradient of the weight to
    return, which is not there yet, it is the hidden size. rows: all of them, which are cut into chunks of equal length.
    """
    if device.type == "cpu":
        return max(64, CPU_CHUNK_BYTES // (width * itemsize) // 64 * 64)
    if longer:
        longer += SPARE_BYTES // (width * itemsize)
    longest = max(CUDA_CHUNK, min(CUDA_CHUNK + longer, LONGEST_CHUNK) // CHUNK_STEP * CHUNK_STEP)
    chunks = max(1, -(-rows // longest))
    return max(CUDA_CHUNK, -(-rows // chunks // CHUNK_STEP) * CHUNK_STEP)


def weight_gradient_type(weight_VD: Tensor, dtype: torch.dtype, rows: int, chunk: int) -> torch.dtype:
    """The type in which the weight's gradient is computed: float32 (float64 of float64), or bfloat16.

    bfloat16 if one product over all rows gives it: that adds up in float32, and rounds once, without a float32 matrix
    to write and read. chunk: the tokens of a chunk; 0: the default, which is then all rows if their logits take no more
    memory than a chunk and that matrix. (Not so in float16, whose range is too small for a sum over positions; nor for
    a small weight, whose product may be split along the positions, and the parts be rounded.)
    """
    width, hidden = weight_VD.shape
    if dtype == weight_VD.dtype == torch.bfloat16 and width * hidden >= LEAST_UNSPLIT:
        if chunk == 0:
            chunk = default_chunk(weight_VD.device, width, dtype.itemsize)
            chunk += 0 if weight_VD.device.type == "cpu" else 2 * hidden
        if rows <= chunk:
            return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_outer_product_(total_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor, *, first: bool) -> None:
    """total += gradient^T hidden (total = ..., for the first chunk), in total's type whatever the operands'."""
    gradient_VC, dtype, beta = gradient_CV.t(), total_VD.dtype, 0 if first else 1
    if dtype == torch.bfloat16 and total_VD.device.type == "cpu":
        # most have no instructions for it: six times as slow as the converted operands
        total_VD.copy_(torch.mm(gradient_VC.float(), hidden_CD.float()))
        return
    way = "same" if gradient_CV.dtype == dtype else wider_product(gradient_CV.device, gradient_CV.dtype)
    if way == "addmm":
        torch.addmm(total_VD, gradient_VC, hidden_CD, out_dtype=dtype, beta=beta, out=total_VD)
    elif way == "mm" and first:
        torch.mm(gradient_VC, hidden_CD, out_dtype=dtype, out=total_VD)
    elif way == "mm":
        for block_VC, block_VD in zip(torch.split(gradient_VC, MM_ROWS), torch.split(total_VD, MM_ROWS), strict=True):
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
    products: dict[str, Callable[[], Tensor]] = {
        "addmm": lambda: torch.addmm(total, half, half, out_dtype=total.dtype, out=total),
        "mm": lambda: torch.mm(half, half, out_dtype=total.dtype, out=total),
    }
    for name, product in products.items():
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
    hidden_ND: Tensor, lm_head: LMHead, call: Call, *, chunk: int, dtype: torch.dtype, weight_type: torch.dtype,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """Loss, hard, soft, and the gradients in hidden (its type), weight (weight_type) and bias (float32), None for those
    not wanted; last what they are still to be multiplied by, or None.

    Matrix products run in `dtype` (autocast's, or the tensors' own). Peak memory beyond what is returned: one buffer
    `[chunk, V]`. chunk: 0 for the default; all rows if weight_type is bfloat16.
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
        chunk=0 if want[1] and weight_type == torch.bfloat16 else chunk,
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
    d_weight = torch.empty(weight_VD.shape, dtype=weight_type, device=device) if want[1] else None
    if d_weight is not None and rows.rows == 0:
        d_weight.zero_()
    counted = rows.counted() if d_weight is not None else None
    d_bias = torch.zeros(width, dtype=accumulator, device=device) if want[2] else None
    if d_weight is not None and weight_type == torch.bfloat16:
        chunk = max(rows.rows, 1)
    elif chunk == 0:
        longer = 0 if d_weight is None else weight_VD.shape[1]
        chunk = default_chunk(device, width, dtype.itemsize, rows=rows.rows, longer=longer)
    stride = row_stride(width, device, call.config.impl)
    buffer = torch.empty(min(chunk, rows.rows), stride, dtype=dtype, device=device)[:, :width]
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
    if d_hidden is not None and call.group is not None:
        # each rank has the share that comes through its own columns
        all_reduce_sum_(d_hidden, call.group)
    rescale = None
    if rescale_later:
        rescale = (1.0 if largest is None else largest) / (rows.divisor * FLOAT16_SCALE)
    if index is not None and d_hidden is not None:
        d_hidden = d_hidden[:n]
    return *rows.total(), [d_hidden, d_weight, d_bias, rescale]


def row_stride(width: int, device: torch.device, impl: str) -> int:
    """Elements from a row of a buffer of logits to the next: rows begin at a multiple of 128 bytes, so that kernels and
    products load whole vectors, whatever the width."""
    return width if device.type == "cpu" and impl != "triton" else -(-width // ROW_STEP) * ROW_STEP


def rows_of(call: Call, positions: int, width: int, dtype: torch.dtype, options: RowOptions) -> Any:
    """The rows of a call, by the implementation that its config names: torch or triton."""
    if call.config.impl == "triton":
        from .triton_impl import TritonRows

        return TritonRows(call, positions, width, dtype, options)
    return TorchRows(call, positions, width, dtype, options)
