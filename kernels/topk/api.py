"""From a teacher's logits, or its last hidden states, to SparseTargets: top-k, tails at every temperature, draws."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import KDError
from ..targets import SparseTargets
from .config import Plan
from .dispatch import filler

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Least and greatest of each number: beyond, float32 arithmetic on real logits overflows or keeps no digits.
TEMPERATURES = (1e-3, 1e6)
SOFTCAPS = (1e-3, 1e4)
LOGIT_SCALES = (1e-30, 1e30)
CHUNK_TOKENS = 2048  # of the head's product on a GPU, where the product is then as fast as an unchunked one
CHUNK_BYTES = 64 << 20  # of the same on a CPU: the weights are read again for every chunk


@torch.no_grad()
def topk_targets(
    logits: Tensor,
    k: int,
    *,
    temperatures: Sequence[float] = (1.0, 1.5, 2.0, 4.0),
    mass: float | None = None,
    draws: int = 0,
    draw_temperature: float = 1.0,
    seed: int = 0,
    positions: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    impl: str = "auto",
) -> SparseTargets:
    """Sparse targets of a teacher's logits.

    logits `[N, V]` or `[..., V]` (rows in row-major order), bfloat16, float16, float32 or float64, of any stride. −inf
        marks a token that is no outcome. z = logits·logit_scale (1e-30 to 1e30), then softcap·tanh(z/softcap) (1e-3 to
        1e4; right to softcap·1e-7), in float32 (float64 for float64 logits).
    k: size of the exact head, at most V is used: the first k of a stable descending sort of the logits (equal logits:
        lower id first). 0 with draws: no head at all.
    temperatures: where the tail's log-partition is stored; 1.0 among them, each from 0.001 to 1e6.
    mass: cut each head after the entry at which its probability (T = 1) reaches this; what is cut joins the tail.
    draws: tokens drawn a row, with replacement, from the tail's softmax at `draw_temperature`; equal ones are merged
        with their count and follow the head, best first. Rows with an empty tail have none. `draw_temperature` is 0.001
        to 1e6: below, a logit's own rounding decides what is drawn; above, nothing but the number of outcomes does.
    seed, positions: what the draws depend on beside the logits, bit for bit, on any device and in any batching.
        positions int64, shape `[N]` or that of the logits without V: each row's number in the data set (default:
        0 to N - 1). See `draws.py` for what is approximated.
    impl: "triton" (CUDA, or a CPU under the Triton interpreter), "numba" (a CPU, with Numba installed), "torch", or
        "auto": triton for CUDA tensors, except float64 ones and k above 1024; numba on a CPU where it is installed,
        except for float64; else torch. All have the same heads and draws to the bit, and sums within 1e-6.

    Returns ids int32 `[N, K]`, logprobs float32 `[N, K]` (nats), tail float32 `[N, M]` (nats), outcomes int32 `[N]`,
    and draws int32 `[N, K]` or None; K = min(k, V) + draws. Detached from autograd.

    A row with NaN, with +inf, with no finite logit, or with logits that float32 cannot hold after `logit_scale` or
    relative to the row's best, raises KDError on the CPU; on a GPU nothing waits for the device, and the row's logprobs
    and tail are NaN. KDError where the arguments do not fit together.
    """
    if not isinstance(logits, Tensor) or logits.ndim < 1 or logits.dtype not in DTYPES:
        raise KDError(f"logits: got {_describe(logits)}; expected a floating-point tensor (..., V).")
    plan = _plan(
        logits.shape[-1], k, temperatures, mass, draws, draw_temperature, seed, softcap, logit_scale, where="logits"
    )
    positions_N = _positions(positions, logits, "logits")
    fill = filler(impl, logits, plan)
    out = plan.unfilled(positions_N.numel(), logits.device)
    start = 0
    for rows_NV in _as_rows(logits):
        some = slice(start, start + len(rows_NV))
        fill(rows_NV, out[some], plan, positions_N[some], start)
        start = some.stop
    return out


@torch.no_grad()
def linear_topk_targets(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    chunk_tokens: int | None = None,
    temperatures: Sequence[float] = (1.0, 1.5, 2.0, 4.0),
    mass: float | None = None,
    draws: int = 0,
    draw_temperature: float = 1.0,
    seed: int = 0,
    positions: Tensor | None = None,
    impl: str = "auto",
) -> SparseTargets:
    """`topk_targets` of `hidden @ weight.T + bias`, without ever holding those logits for more than a chunk of tokens.

    hidden `[N, D]` or `[..., D]`, weight `[V, D]`, bias `[V]`, all of one dtype on one device. The logits of
    `chunk_tokens` tokens at a time (default: 2048 on a GPU, about 64 MB of logits on a CPU) go to one reused buffer in
    that dtype. The other arguments, the result and the errors are those of `topk_targets`.
    """
    operands: list[tuple[str, Any, str, int]] = [("hidden", hidden, "(..., D)", 0), ("weight", weight, "(V, D)", 2)]
    if bias is not None:
        operands.append(("bias", bias, "(V,)", 1))
    for name, tensor, shape, ndim in operands:
        right_shape = isinstance(tensor, Tensor) and (tensor.ndim == ndim if ndim else tensor.ndim >= 1)
        if not right_shape or tensor.dtype not in DTYPES:
            raise KDError(f"{name}: got {_describe(tensor)}; expected a floating-point tensor {shape}.")
        if tensor.dtype != hidden.dtype or tensor.device != hidden.device:
            raise KDError(
                f"{name}: got {tensor.dtype} on {tensor.device}, hidden is {hidden.dtype} on {hidden.device}; one "
                "dtype and one device are needed."
            )
    if weight.shape[1] != hidden.shape[-1]:
        raise KDError(
            f"weight: found shape {tuple(weight.shape)} for hidden of width {hidden.shape[-1]}; "
            f"(V, {hidden.shape[-1]}) is needed."
        )
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise KDError(f"bias: got shape {tuple(bias.shape)}; expected ({weight.shape[0]},), as of weight.")
    if chunk_tokens is not None:
        chunk_tokens = _integer("chunk_tokens", chunk_tokens, "a positive integer is needed.", least=1)
    vocab = weight.shape[0]
    plan = _plan(vocab, k, temperatures, mass, draws, draw_temperature, seed, softcap, logit_scale, where="weight")
    positions_N = _positions(positions, hidden, "hidden")
    fill = filler(impl, hidden, plan)
    rows = positions_N.numel()
    if chunk_tokens is None:
        chunk_tokens = default_chunk(hidden, vocab)
    out = plan.unfilled(rows, hidden.device)
    buffer = torch.empty((min(chunk_tokens, rows), vocab), dtype=hidden.dtype, device=hidden.device)
    start = 0
    # autocast would turn the operands of a matrix product into another dtype than the buffer's
    with torch.autocast(hidden.device.type, enabled=False):
        for some_hidden in _as_rows(hidden):
            for first in range(0, len(some_hidden), chunk_tokens):
                chunk_CD = some_hidden[first : first + chunk_tokens]
                some = slice(start, start + len(chunk_CD))
                logits_CV = buffer[: len(chunk_CD)]
                if bias is None:
                    torch.mm(chunk_CD, weight.t(), out=logits_CV)
                else:
                    torch.addmm(bias, chunk_CD, weight.t(), out=logits_CV)
                fill(logits_CV, out[some], plan, positions_N[some], start)
                start = some.stop
    return out


def default_chunk(hidden: Tensor, vocab_size: int) -> int:
    """How many tokens' logits `linear_topk_targets` makes at a time of these hidden states."""
    if hidden.device.type != "cpu":
        return CHUNK_TOKENS
    return max(1, CHUNK_BYTES // (vocab_size * hidden.element_size()))


def _as_rows(tensor: Tensor) -> list[Tensor]:
    """`[..., V]` as as few `[n, V]` views as its strides allow, in row-major order. Nothing is copied."""
    if tensor.ndim <= 2:
        return [tensor[None] if tensor.ndim == 1 else tensor]
    try:
        return [tensor.view(-1, tensor.shape[-1])]
    except RuntimeError:  # these leading dimensions have no single stride: logits[:, :-1], for one
        return [rows for part in tensor for rows in _as_rows(part)]


def _plan(
    vocab: int,
    k: int,
    temperatures: Sequence[float],
    mass: float | None,
    draws: int,
    draw_temperature: float,
    seed: int,
    softcap: float | None,
    logit_scale: float | None,
    *,
    where: str,
) -> Plan:
    """The settings of a call, checked."""
    if vocab < 1:
        raise KDError(f"{where}: got a vocabulary of 0 tokens; expected at least one.")
    k = _integer("k", k, "the size of the head, an integer >= 0, is needed.", least=0)
    draws = _integer("draws", draws, "the number of draws a row, an integer >= 0, is needed.", least=0)
    seed = _integer("seed", seed, "an integer is needed.")
    if k == 0 and draws == 0:
        raise KDError("k: got 0 with draws=0, which keeps nothing; expected k >= 1, or draws >= 1.")
    return Plan(
        vocab_size=vocab,
        k=min(k, vocab),
        temperatures=_grid(temperatures),
        mass=_mass(mass),
        draws=draws,
        draw_temperature=_number("draw_temperature", draw_temperature, TEMPERATURES),
        seed=seed,
        softcap=None if softcap is None else _number("softcap", softcap, SOFTCAPS),
        logit_scale=None
        if logit_scale is None or logit_scale == 1
        else _number("logit_scale", logit_scale, LOGIT_SCALES),
    )


def _grid(temperatures: Any) -> tuple[float, ...]:
    least, greatest = TEMPERATURES
    try:
        grid = tuple(float(t) for t in temperatures)
    except (TypeError, ValueError):
        grid = ()
    if 1.0 not in grid or len(set(grid)) != len(grid) or not all(least <= t <= greatest for t in grid):
        raise KDError(
            f"temperatures: got {grid or temperatures!r}; distinct numbers from {least:g} to {greatest:g} with 1.0 "
            "among them are needed."
        )
    return grid


def _mass(mass: Any) -> float | None:
    if mass is None:
        return None
    try:
        number = float(mass)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number <= 1:
        raise KDError(f"mass: got {mass!r}; expected a probability above 0 and at most 1, or None.")
    # a head reaches probability 1 with its last outcome, and there is nothing to cut after that
    return None if number == 1 else number


def _number(name: str, value: Any, bounds: tuple[float, float]) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not bounds[0] <= number <= bounds[1]:
        raise KDError(f"{name}: got {value!r}; expected a number from {bounds[0]:g} to {bounds[1]:g}.")
    return number


def _integer(name: str, value: Any, needed: str, *, least: float = -math.inf) -> int:
    """Any integer type's value (numpy's too); booleans and tensors are none."""
    try:
        number = None if isinstance(value, (bool, Tensor)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise KDError(f"{name}: got {value!r}; {needed}")
    return number


def _positions(positions: Tensor | None, rows: Tensor, what: str) -> Tensor:
    """Global positions int64 `[N]` for `rows` `[..., X]`."""
    leading = tuple(rows.shape[:-1])
    count = math.prod(leading)
    if positions is None:
        return torch.arange(count, device=rows.device)
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
        raise KDError(f"positions: got {_describe(positions)}; expected a tensor of torch.int64.")
    if tuple(positions.shape) not in (leading, (count,)):
        raise KDError(f"positions: got shape {tuple(positions.shape)}; expected ({count},), a row of {what} each.")
    if positions.device != rows.device:
        raise KDError(f"positions: found on {positions.device}, {what} on {rows.device}; move them there.")
    return positions.reshape(-1)


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
